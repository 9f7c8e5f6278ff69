"""What Torch-Pruning would keep of the networks of :mod:`benchmarks.trained`, in terms of mmopt's groups.

It works on torch modules, which are built again here with the weights of the exported model, batch norms folded. It
cannot follow a concatenation with what recurrent layers give, so it sees the network of digits as two chains that end
in the linear parts of what reads them. What it chooses is cut by mmopt, so that repair and judging are alike for all.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from benchmarks.trained import Digits, Polarity
from mmopt.analysis.axes import Group
from mmopt.transforms.prune.costs import CostModel

Arrays = dict[str, np.ndarray[Any, Any]]
Keep = dict[str, tuple[int, ...]]
_ATTENTION = ("query", "key", "value")


def torch_network(name: str, path: pathlib.Path) -> nn.Module:
    """The trained network as a torch module, from its ONNX file."""
    model = onnx.load(path)
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    network: nn.Module = Digits() if name == "digits" else Polarity()
    if name == "digits":
        for place, layer in enumerate(network.image):
            if isinstance(layer, nn.BatchNorm2d):
                network.image[place] = nn.Identity()
                before = network.image[place - 1]
                before.bias = nn.Parameter(torch.from_numpy(arrays[f"image.{place - 1}.weight_bias"].copy()))
        arrays.update(_recurrent_weights(model, arrays))
    else:
        arrays.update(_linear_weights(model, arrays))
    state = {key: torch.from_numpy(arrays[key].copy()) for key in network.state_dict() if key in arrays}
    network.load_state_dict(state, strict=False)
    return network.eval()


_ORDERS = {"LSTM": ("follow", (0, 2, 3, 1)), "GRU": ("read", (1, 0, 2))}
"""Layers by operator, and where torch's gates are among those of ONNX."""


def _recurrent_weights(model: onnx.ModelProto, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What the export stacked and put into another order."""
    found = {}
    for node in model.graph.node:
        if node.op_type not in _ORDERS:
            continue
        layer, order = _ORDERS[node.op_type]

        def turned(array: Any, order: tuple[int, ...] = order) -> Any:
            gates = np.split(array, len(order))
            return np.concatenate([gates[place] for place in order])

        for way, bias in enumerate(arrays[node.input[3]]):
            end = "_reverse" if way else ""
            for key, part in zip(("bias_ih_l0", "bias_hh_l0"), np.split(bias, 2), strict=True):
                found[f"{layer}.{key}{end}"] = turned(part)
            for key, value in (("weight_ih_l0", node.input[1]), ("weight_hh_l0", node.input[2])):
                if value in arrays:
                    found[f"{layer}.{key}{end}"] = turned(arrays[value][way])
    return found


class _Chains(nn.Module):  # type: ignore[misc]
    """The convolutions and linear layers of the network of digits, without what Torch-Pruning cannot follow."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.image, self.listen, self.last = network.image, network.listen, network.head[2]
        width = network.image[11].out_channels
        self.first = _linear(network.head[0].weight[:, :width], network.head[0].bias)
        follow = network.follow
        self.follow = _linear(torch.cat([follow.weight_ih_l0, follow.weight_ih_l0_reverse]), None)
        if network.head[0].weight.grad is not None:
            self.first.weight.grad = network.head[0].weight.grad[:, :width].clone()
            self.first.bias.grad = network.head[0].bias.grad.clone()
            self.follow.weight.grad = torch.cat([follow.weight_ih_l0.grad, follow.weight_ih_l0_reverse.grad])

    def forward(self, image: torch.Tensor, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Something that depends on every layer as in the network."""
        seen = self.last(torch.relu(self.first(self.image(image))))
        return seen, self.follow(self.listen(audio).transpose(1, 2))


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _linear_weights(model: onnx.ModelProto, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of linear layers, which the export wrote transposed and under other names, by that of their bias."""
    adds = {name: node for node in model.graph.node if node.op_type == "Add" for name in node.input}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays and node.output[0] in adds:
            bias = next(name for name in adds[node.output[0]].input if name != node.output[0])
            found[bias.removesuffix("bias") + "weight"] = arrays[node.input[1]].T
    return found


def by_torch_pruning(
    name: str,
    path: pathlib.Path,
    groups: Sequence[Group],
    samples: Arrays,
    cost: CostModel,
    budget: float,
    criterion: str,
    seed: int,
) -> Keep:
    """What Torch-Pruning keeps at the least ratio that meets ``budget``.

    Args:
        name: ``digits`` or ``polarity``.
        path: The exported network.
        groups: Groups that can be cut.
        samples: Calibration samples.
        cost: Cost of sizes.
        budget: The most it may be.
        criterion: ``l2`` or ``taylor`` (to the network's own decisions, as there are no labels).
        seed: Seed of the samples for the gradients.
    """
    low, high, best = 0.0, 1.0, {}
    for _ in range(8):
        ratio = (low + high) / 2
        keep = _torch_pruned(torch_network(name, path), name, groups, samples, ratio, criterion, seed)
        sizes = {group.name: len(keep.get(group.name, range(group.units))) for group in groups}
        if cost.total(sizes) <= budget:
            high, best = ratio, keep
        else:
            low = ratio
    return best


def _torch_pruned(
    network: nn.Module, name: str, groups: Sequence[Group], samples: Arrays, ratio: float, criterion: str, seed: int
) -> Keep:
    import torch_pruning as tp

    importance: Any = tp.importance.GroupMagnitudeImportance(p=2)
    if criterion == "taylor":
        importance = tp.importance.GroupTaylorImportance()
    example = tuple(torch.from_numpy(array[:2]) for array in samples.values())
    if criterion == "taylor":
        chosen = np.random.default_rng(seed).permutation(len(next(iter(samples.values()))))[:128]
        logits = network(*(torch.from_numpy(array[chosen]) for array in samples.values()))
        nn.functional.cross_entropy(logits, logits.argmax(dim=1)).backward()
    if name == "digits":
        network, example = _Chains(network), example[:2]
        ignored = [network.last, network.follow]
    else:
        ignored = [network.head, *(m for key, m in network.named_modules() if key.rpartition(".")[2] in _ATTENTION)]
    pruner = tp.pruner.BasePruner(
        network, example, importance=importance, pruning_ratio=ratio, max_pruning_ratio=0.9, global_pruning=True,
        ignored_layers=ignored, round_to=4,
    )  # fmt: skip
    modules = {id(module): {"first": "head.0"}.get(key, key) for key, module in network.named_modules()}
    ours = {group.name.rpartition("/")[2].partition(":")[0]: group for group in groups if group.kind != "heads"}
    keep: Keep = {}
    for found in pruner.step(interactive=True):
        for dependency, places in found:
            key = modules.get(id(dependency.target.module), "")
            group = ours.get(key)
            is_output = dependency.handler in (
                tp.prune_conv_out_channels, tp.prune_linear_out_channels, tp.prune_embedding_out_channels,
            )  # fmt: skip
            if group is not None and is_output and max(places, default=0) < group.units:
                gone = set(places) | (set(range(group.units)) - set(keep.get(group.name, range(group.units))))
                keep[group.name] = tuple(unit for unit in range(group.units) if unit not in gone)
    return keep
