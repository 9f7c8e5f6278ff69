"""Passes that lift what exporters spelled out into high-level standard operators."""
