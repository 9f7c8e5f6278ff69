"""What a quantized model is worth: a score for each sample of the test, and intervals by resampling the samples."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from benchmarks.quantizing.methods import LINEAR, Arrays, batches

Array = np.ndarray[Any, Any]

RESAMPLES = 4000

_ROUNDING = ("QuantizeLinear", "DynamicQuantizeLinear")


def outputs(model: pathlib.Path, inputs: Arrays) -> Array:
    """The first output, sample by sample, by onnxruntime: ``[samples, …]``."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # By itself it rounds what products with weights of few bits read.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not any(node.op_type in _ROUNDING for node in ir.load(model).graph.all_nodes()):
        # Weights alone are integers: they are widened once, instead of in every run.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_outputs()[-1].name if len(session.get_outputs()) > 1 else None
    # In batches of one: ranges found at run time are those of a sample, as in use.
    return np.concatenate([session.run(name and [name], feeds)[0] for feeds in batches(inputs)])


def scores(found: Array, plain: Array, labels: Array | None) -> Array:
    """How good each sample is, in percent: right or wrong; without labels, what is left of its similarity to another.

    Args:
        found: Outputs of the quantized model.
        plain: Those of the float model.
        labels: Right classes, or ``None`` for embeddings.
    """
    if labels is not None:
        return np.asarray((found.argmax(axis=1) == labels) * 100.0)
    return np.asarray(100 * (1 - np.abs(similarities(found) - similarities(plain))))


def similarities(embeddings: Array) -> Array:
    """Cosine between each sentence and one other, always the same."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    other = np.random.default_rng(0).permutation(len(unit))
    return np.asarray((unit * unit[other]).sum(axis=1))


def relative_error(found: Array, plain: Array) -> float:
    """Root mean square error of the outputs, of their root mean square."""
    return float(np.sqrt(((found - plain) ** 2).mean() / (plain**2).mean()))


def losses(found: Array, plain: Array) -> Array:
    """Mean square error of each sample's outputs, of the mean square of all."""
    return np.asarray(((found - plain) ** 2).mean(axis=1) / (plain**2).mean())


def ratio(first: Array, second: Array, seed: int = 0) -> tuple[float, float, float]:
    """Sum of ``first`` over that of ``second`` over the same samples, and its 95 % interval (paired bootstrap)."""
    places = np.random.default_rng(seed).integers(0, len(first), (RESAMPLES, len(first)), dtype=np.int32)
    low, high = np.percentile(first[places].sum(axis=1) / second[places].sum(axis=1), [2.5, 97.5])
    return float(first.sum() / second.sum()), float(low), float(high)


def interval(first: Array, second: Array, seed: int = 0) -> tuple[float, float, float]:
    """Mean of ``first − second`` over the same samples, and its 95 % interval (paired bootstrap, percentiles)."""
    difference = first - second
    random = np.random.default_rng(seed)
    places = random.integers(0, len(difference), (RESAMPLES, len(difference)), dtype=np.int32)
    means = difference[places].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def nbytes(model: ir.Model) -> int:
    """Bytes of the constants of a model, wherever they are kept."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def coverage(model: ir.Model) -> tuple[int, int]:
    """Layers with weights, and products of activations, that read nothing but integers."""
    layers = products = 0
    for node in model.graph.all_nodes():
        if node.op_type not in LINEAR:
            continue
        data, weight = (_source(value) for value in node.inputs[:2])
        if data is None or weight is None:
            continue
        if weight.is_initializer():
            layers += 1
        else:
            products += 1
    return layers, products


def _source(value: ir.Value | None) -> ir.Value | None:
    """What a DequantizeLinear before ``value`` reads, through movement."""
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type in ("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze"):
        value = producer.inputs[0]
        producer = None if value is None else value.producer()
    return producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else None
