"""Measurements; each module prints its own figures."""
