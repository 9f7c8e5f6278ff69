"""Kernel templates for the CPU, one a file."""
