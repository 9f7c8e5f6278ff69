"""Kernel templates for NVIDIA GPUs."""
