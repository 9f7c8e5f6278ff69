"""From what a user names (artifacts, peers, models, inputs) to contenders and arrays."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from mmopt.bench.peers import PEERS, Spec, peer_specs
from mmopt.errors import LoadError, UserError, did_you_mean
from mmopt.runnable import OPTIMIZED
from mmopt.runtime.store import Store

PRECISIONS = ("fp32", "bf16", "fp16")


def contenders(
    artifacts: Sequence[str],
    store: Store,
    *,
    against: str | None,
    models: Iterable[str],
    threads: int,
    precision: str,
    trust_code: bool,
    pin: bool = False,
) -> tuple[list[Spec], dict[str, str]]:
    """Who takes part, as the options of ``mmopt bench`` say.

    Args:
        artifacts: Paths of artifacts.
        store: The first of them. It must stay open while peers run: a zip's files are extracted for its lifetime.
        against: Names of peers with commas, ``none``, or None for all that have something to run.
        models: What peers run instead of the artifact's own ``optimized.onnx``.
        threads: Threads each may use.
        precision: What OpenVINO and torch compute in.
        trust_code: Whether ``module:function`` may be called and a ``.pt2`` file read, which can hold code.
        pin: Whether artifacts bind each thread to a CPU of its own.

    Returns:
        The artifacts, then the peers; and the reason for each peer left out.

    Raises:
        UserError: An option makes no sense.
        LoadError: A model is not there.
    """
    if precision not in PRECISIONS:
        raise UserError(f"no precision {precision!r}", where="--precision", hint=did_you_mean(precision, PRECISIONS))
    sources = model_sources(models, store, trust_code=trust_code)
    others, left_out = peers(against, sources, threads, precision)
    return [*artifact_specs(artifacts, threads, pin=pin), *others], left_out


def artifact_specs(artifacts: Sequence[str], threads: int, *, pin: bool = False) -> list[Spec]:
    """A spec for each artifact, labelled by its file name, or by its path where file names repeat.

    Raises:
        UserError: An artifact is named twice.
    """
    if len(set(artifacts)) < len(artifacts):
        raise UserError("an artifact is named twice", hint="to see the noise, copy it: the copies need different paths")
    stems = [pathlib.Path(artifact).name.removesuffix(".zip").removesuffix(".mmopt") for artifact in artifacts]
    clear = len(set(stems)) == len(stems) and not set(stems) & set(PEERS)
    labels = stems if clear else artifacts
    pairs = zip(labels, artifacts, strict=True)
    return [Spec("mmopt", label, artifact, threads, pin=pin) for label, artifact in pairs]


def model_sources(models: Iterable[str], store: Store, *, trust_code: bool) -> dict[str, str]:
    """What peers run: the models given, else the artifact's own ``optimized.onnx``.

    Raises:
        UserError: Something else is given, two of one kind, or code that is not trusted.
        LoadError: A file is not there.
    """
    sources: dict[str, str] = {}
    for model in models:
        family = _family(model)
        if family in sources:
            raise UserError(f"two models of one kind: {sources[family]}, {model}", where="--model")
        if model.endswith((".onnx", ".pt2")) and not pathlib.Path(model).is_file():
            raise LoadError("no such file", where=model, hint="check the path")
        if family == "torch" and not trust_code:
            raise UserError("this can run code of the model", where=model, hint="allow it with --trust-code")
        sources[family] = model
    if "onnx" not in sources and OPTIMIZED in store.manifest.files:
        sources["onnx"] = str(store.file(OPTIMIZED))
    return sources


def peers(
    against: str | None, sources: Mapping[str, str], threads: int, precision: str
) -> tuple[list[Spec], dict[str, str]]:
    """Peers asked for with ``--against``: names with commas, ``none``, or None for all that have something to run."""
    if against is None:
        able = [peer for peer in PEERS if peer != "torch.compile" and ("torch" in sources or peer != "torch")]
        return peer_specs(able, sources, threads, precision)
    names = [name.strip() for name in against.split(",") if name.strip()]
    return peer_specs([] if names == ["none"] else names, sources, threads, precision)


def parse_fraction(text: str) -> float:
    """``5%`` or ``0.05``.

    Raises:
        UserError: Anything else, a negative number, or one of 1 and more without a percent sign.
    """
    hint = "write 5% or 0.05"
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        raise UserError(f"{text!r} is no fraction", where="--fail-over", hint=hint) from None
    value = value / 100 if text.strip().endswith("%") else value
    if not 0 <= value < (100 if "%" in text else 1):
        raise UserError(f"{text!r} is out of range", where="--fail-over", hint=hint)
    return value


def _family(model: str) -> str:
    if model.endswith(".onnx"):
        return "onnx"
    if model.endswith(".pt2") or (":" in model and importlib.util.find_spec("torch")):
        return "torch"
    if ":" in model:
        raise UserError("torch is not installed", where=model, hint="pip install 'mmopt[torch]'")
    raise UserError("not a model", where=model, hint="give a .onnx or .pt2 file, or package.module:function")
