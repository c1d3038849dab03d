"""Programs that the benchmark runs inside dom0."""
