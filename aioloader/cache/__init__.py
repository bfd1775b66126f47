"""Keeps samples from one epoch to the next: in memory, or in a directory."""
