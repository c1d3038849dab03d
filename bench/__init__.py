"""What the daemon costs, measured: ``python -m bench``."""
