"""Parts of ``benchmarks.quantization``."""
