"""Programs that tests run inside dom0, where the project is installed."""
