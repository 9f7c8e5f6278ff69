"""Runs artifacts; TVM's runtime and onnxruntime are loaded when a segment first needs them, its compiler never."""

from mmopt.runtime.artifact import EntryPoint, Program, Segment, TensorSpec
from mmopt.runtime.session import Entry, Session, load_artifact

__all__ = ["Entry", "EntryPoint", "Program", "Segment", "Session", "TensorSpec", "load_artifact"]
