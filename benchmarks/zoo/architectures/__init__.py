"""Well-known architectures in miniature: every way in which axes are coupled, in networks that run in milliseconds.

They stand beside the reference models for what asks about structure and not about speed. Reading the registry imports
neither torch nor transformers.
"""

from benchmarks.zoo.architectures.registry import ARCHITECTURES, Architecture

__all__ = ["ARCHITECTURES", "Architecture"]
