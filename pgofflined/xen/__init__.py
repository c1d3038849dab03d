"""The only package that touches Xen: the ports over Xen's stable libraries, through ctypes."""
