"""Reference models for tests and benchmarks: known architectures, trained files, and the textbook fusion networks."""

from benchmarks.zoo.model import Built, FileModel, Structure, TorchModel, ZooModel
from benchmarks.zoo.registry import ZOO

__all__ = ["ZOO", "Built", "FileModel", "Structure", "TorchModel", "ZooModel"]
