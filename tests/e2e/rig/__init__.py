"""The rig: Debian 13 on Xen 4.20, or Debian 12 on Xen 4.17, under QEMU's software emulation."""
