"""Decisions and decoding: pure functions and values, no I/O, no clock."""
