"""What the benchmarks run in dom0 of an emulated host."""
