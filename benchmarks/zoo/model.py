"""What an entry of the zoo is: a name, how to get the model, realistic inputs, and the structure it must show."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from benchmarks.zoo.inputs import Inputs
from mmopt.errors import UnsupportedError, UserError, did_you_mean

if TYPE_CHECKING:
    import torch

_HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Structure:
    """What the analysis of towers must find, as plain data.

    Attributes:
        modalities: Modality of every input, by input name: ``text``, ``image``, ``audio``, ``video``, ``tabular`` or
            ``unknown``.
        towers: The inputs of every tower, by a name of the tower.
        fusion: Kinds of operation that join the towers, those nearest to the inputs first: ``concat``, ``add``,
            ``weighted`` (learned constant shares), ``attention`` (shares computed from the features, or cross
            attention), ``product``, ``similarity``, ``scatter``. Empty for one tower.
        level: Where they are joined: ``feature``, ``decision`` (after the heads), ``deep`` (at several depths), or
            "" for one tower.
        shared_weights: Whether two towers use the same weights.
    """

    modalities: Mapping[str, str]
    towers: Mapping[str, tuple[str, ...]]
    fusion: tuple[str, ...] = ()
    level: str = ""
    shared_weights: bool = False


class Built(NamedTuple):
    """What ``build`` returns.

    Attributes:
        module: The network, in evaluation mode.
        inputs: Example inputs by name, in the order of the parameters of ``forward``, batch 2.
        dynamic_shapes: What ``torch.export.export`` takes to keep batch and lengths symbolic.
    """

    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    dynamic_shapes: dict[str, dict[int, Any]]


@dataclasses.dataclass(frozen=True)
class ZooModel(abc.ABC):
    """One reference model.

    Attributes:
        name: Kebab-case name, the key in the registry.
        description: One line for people.
        expected_towers: The structure an analysis must find.
        make_inputs: From a generator, the batch and the lengths in ``sizes`` to inputs by name.
        sizes: Usual length of each dimension that may vary besides the batch.
    """

    name: str
    description: str
    expected_towers: Structure
    make_inputs: Callable[..., Inputs]
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict, kw_only=True)

    _remedy: ClassVar[str]

    @abc.abstractmethod
    def missing(self) -> str:
        """What must be there before the model can be had; "" when all is there."""

    @abc.abstractmethod
    def export(self, folder: pathlib.Path, *, batch: int = 1, dynamic: bool = False) -> pathlib.Path:
        """Write the model as ONNX under ``folder/name``, unless the same is there already.

        Args:
            folder: Where the models are kept.
            batch: Batch size of a static export.
            dynamic: Leave batch and lengths symbolic.

        Returns:
            ``folder/name/b<batch>.onnx`` or ``folder/name/dyn.onnx``; weights above 1 MB lie beside it in ``.data``.

        Raises:
            UnsupportedError: Something is :meth:`missing`.
        """

    def inputs(self, batch: int = 1, seed: int = 0, **sizes: int) -> Inputs:
        """Realistic inputs by name.

        Args:
            batch: Batch size.
            seed: Same seed, same inputs.
            sizes: Lengths other than those of ``self.sizes``.

        Raises:
            UserError: A length has no such name.
        """
        for size in sizes:
            if size not in self.sizes:
                raise UserError(f"{self.name} has no length {size!r}", hint=did_you_mean(size, self.sizes))
        return self.make_inputs(np.random.default_rng(seed), batch, **{**self.sizes, **sizes})

    def _require(self) -> None:
        if missing := self.missing():
            raise UnsupportedError(f"{self.name} cannot be had here: {missing} is missing", hint=self._remedy)


@dataclasses.dataclass(frozen=True)
class FileModel(ZooModel):
    """A model that is an ONNX file; its batch is symbolic already.

    Attributes:
        file: Path of the file.
    """

    file: pathlib.Path

    _remedy = "put the file there"

    def missing(self) -> str:
        """The file's path unless it is there."""
        return "" if self.file.is_file() else str(self.file)

    def onnx_path(self) -> pathlib.Path:
        """The file itself."""
        self._require()
        return self.file

    def export(self, folder: pathlib.Path, *, batch: int = 1, dynamic: bool = False) -> pathlib.Path:
        """Copy the file, whatever the batch."""
        source = self.onnx_path()
        path = _place(folder, self.name, batch, dynamic)
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        if not _is_current(path, digest):
            with _written_whole(path, digest) as target:
                shutil.copyfile(source, target)
        return path


@dataclasses.dataclass(frozen=True)
class TorchModel(ZooModel):
    """A model that is a torch module with seeded or trained weights.

    Attributes:
        network: Makes the module; imports torch itself, so that the registry can be read without it.
        axes: Name of every symbolic dimension, by input and axis. Equal names are equal dimensions.
        outputs: Names of the outputs, in order.
        requires: Packages that must be installed.
        trained: The weights are trained ones and left as they are.
    """

    network: Callable[[], torch.nn.Module]
    axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    requires: tuple[str, ...] = ("torch",)
    trained: bool = False

    _remedy = "pip install 'mmopt[torch,bench]'"

    def missing(self) -> str:
        """The packages of ``requires`` that are not installed."""
        return ", ".join(package for package in self.requires if importlib.util.find_spec(package) is None)

    def build(self) -> Built:
        """Make the module with its weights, example inputs and symbolic dimensions.

        Raises:
            UnsupportedError: Something is :meth:`missing`.
        """
        self._require()
        import torch

        from benchmarks.zoo import weights

        module = weights.seeded(self.network, trained=self.trained, inputs=self.inputs(4, seed=1))
        example = {name: torch.from_numpy(array) for name, array in self.inputs(2).items()}
        names = sorted({name for axes in self.axes.values() for name in axes.values()})
        dims = {name: torch.export.Dim(name, min=1) for name in names}
        shapes = {name: {axis: dims[dim] for axis, dim in self.axes.get(name, {}).items()} for name in example}
        return Built(module, example, shapes)

    def export(self, folder: pathlib.Path, *, batch: int = 1, dynamic: bool = False) -> pathlib.Path:
        """Export through ``torch.onnx.export(..., dynamo=True)``."""
        self._require()
        path = _place(folder, self.name, batch, dynamic)
        digest = _builder_digest()
        if _is_current(path, digest):
            return path
        from benchmarks.zoo import onnx_export

        built = self.build()
        arrays = self.inputs(2 if dynamic else batch)
        shapes = built.dynamic_shapes if dynamic else None
        with _written_whole(path, digest) as target:
            onnx_export.write(built.module, arrays, self.outputs, shapes, target)
        return path


def _place(folder: pathlib.Path, name: str, batch: int, dynamic: bool) -> pathlib.Path:
    return pathlib.Path(folder) / name / ("dyn.onnx" if dynamic else f"b{batch}.onnx")


def _digest_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.digest")


def _is_current(path: pathlib.Path, digest: str) -> bool:
    """Whether ``path`` was written by a builder with this digest."""
    note = _digest_file(path)
    return path.is_file() and note.is_file() and note.read_text() == digest


@contextlib.contextmanager
def _written_whole(path: pathlib.Path, digest: str) -> Iterator[pathlib.Path]:
    """A place to write the model to; it and its weights move to ``path`` together once they are complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _digest_file(path).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
        yield pathlib.Path(scratch) / path.name
        for file in sorted(pathlib.Path(scratch).iterdir(), reverse=True):
            file.replace(path.parent / file.name)
    _digest_file(path).write_text(digest)


def _builder_digest() -> str:
    """Changes with the zoo's sources and with the packages that decide what an export looks like."""
    digest = hashlib.sha256()
    for source in sorted(_HERE.glob("[!_]*.py")):
        digest.update(source.read_bytes())
    for package in ("torch", "transformers", "onnxscript"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()
