"""A simulated Xen host behind the same ports as the real one."""
