"""Operator lowerings, one file per family."""
