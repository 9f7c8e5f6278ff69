"""Training as a pass."""
