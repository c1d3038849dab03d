"""Tests on real Xen, booted under QEMU."""
