"""Retires failing memory pages on Xen hosts while their owners run on."""
