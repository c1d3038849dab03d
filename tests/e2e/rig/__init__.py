"""The rig: a Debian 13 dom0 on real Xen 4.20, under QEMU's software emulation."""
