"""Xen's binary interface: constants and structures, one module per public header.

Paths in the modules are relative to ``xen/include/public`` of the Xen source.  Everything here is
for x86-64 and for a 64-bit caller.  ``tests/abi`` compares it with what a compiler makes of the
headers of two Xen releases.
"""
