"""Runs kernels on memory that ends at a page nobody may touch: reading or writing beyond an end stops the process.

``python -m tests.guarded_kernels PROFILE`` (or ``PROFILE narrow``, for products in narrow numbers, ``PROFILE
operators`` for ONNX's own models of operators) prints the name of each case before it runs, so that the last line names
the one that went too far. Arrays whose sizes are multiples of 64
bytes end exactly at the page; others within 63 bytes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx.backend.test.case.node import collect_testcases
from tvm import tirx

from mmopt.backends.compute import SUM, Reduction, compute
from mmopt.backends.cpu.kernels.matmul_blocking import Blocking
from mmopt.backends.cpu.kernels.tile import Tile, lanes_of
from mmopt.backends.profile import Profile, load_profile
from mmopt.ir.module import Module
from mmopt.lowering.ops.matmul import pack_panels
from tests.kernels import Arrays, Case, Memory, failures, profiles
from tests.programs import Example, Programs, assert_close
from tests.unit import (
    test_compute,
    test_conv_narrow,
    test_kernel_attention,
    test_kernel_conv,
    test_kernel_matmul,
    test_kernel_recurrent,
    test_kernel_winograd,
    test_narrow_products,
)
from tests.unit.test_kernel_conv import Geometry
from tests.unit.test_kernel_recurrent import Layer


def rows(profile: str) -> list[Case]:
    """Every length of a row, sixteen rows each, so that the array ends at the page."""
    cases = []
    for length in (1, 3, 8, 15, 16, 17, 33, 100):
        data = Arrays()
        x = data.source((16, length))
        a = data[x]
        exp = compute(x.shape, "float32", lambda i, j, x=x: tirx.exp(x[i, j]))
        cases.append(data.case(f"exp of rows of {length}", exp, np.exp(a)))
        for axis in (0, 1):
            total = test_compute.reduced(x, [axis])
            cases.append(data.case(f"sum of rows of {length} over {axis}", total, a.sum(axis)))
        soft = test_compute.softmax_of(x)
        cases.append(data.case(f"softmax of rows of {length}", soft, np.exp(a) / np.exp(a).sum(1, keepdims=True)))
        turned = compute((length, 16), "float32", lambda j, i, x=x: x[i, j])
        cases.append(data.case(f"transpose of rows of {length}", turned, a.T))
    return cases


def products(profile: str) -> list[Case]:
    """Tails in rows and columns over both kinds of second operand, sizes known and not."""
    cases = []
    n = tirx.Var("n", "int64")
    for height, width in [(1, 1), (5, 17), (13, 33), (30, 47), (3, 64)]:
        for known in (height, n) if width == 33 else (height,):
            data, sizes = Arrays(), {"n": height}
            a, b, c = data.source((known, 48), **sizes), data.source((48, width)), data.data((48, width), "float32")
            d = data.source((width, 48))
            best = test_kernel_matmul.blocking_for(profiles()[profile], a, width)
            weight = data.constant(np.ascontiguousarray(pack_panels(c, best.tile.columns)))
            copied = dataclasses.replace(best, copy=True)
            made = {
                "packed": test_kernel_matmul.product(a, weight, best, columns=width),
                "in place": test_kernel_matmul.product(a, b, best),
                "copied": test_kernel_matmul.product(a, b, copied),
                "transposed": test_kernel_matmul.product(a, test_kernel_matmul.turned_of(d), copied),
            }
            wants = {"packed": data[a] @ c.astype(np.float64), "transposed": data[a] @ data[d].T}
            for name, nest in made.items():
                label = f"{name} {'any' if known is n else height}×{width}"
                cases.append(data.case(label, nest.output, wants.get(name, data[a] @ data[b]), sizes=sizes))
    return cases


def blocks(profile: str) -> list[Case]:
    """Products walked in blocks of the depth, with panels and rows left over."""
    cases, lanes = [], lanes_of(profiles()[profile], "float32")
    for rows, depth, columns in [(24, 64, 8 * lanes), (23, 50, 7 * lanes + 3)]:
        for tiles, panels, step in [(2, 1, 0), (3, 4, 16), (4, 3, 48)]:
            data = Arrays()
            a, b = data.source((rows, depth)), data.data((depth, columns), "float32")
            weight = data.constant(np.ascontiguousarray(pack_panels(b, 2 * lanes)))
            blocking = Blocking(Tile(4, 2, lanes), tiles, panels, step)
            nest = test_kernel_matmul.product(a, weight, blocking, columns=columns)
            label = f"{rows}×{depth}×{columns} in {tiles} tiles, {panels} panels, {step} steps"
            cases.append(data.case(label, nest.output, data[a] @ b.astype(np.float64)))
    return cases


def attentions(profile: str) -> list[Case]:
    """Tails of rows, keys and features; masks that end before the keys; sizes known and not."""
    made = [*test_kernel_attention.own_choice(), *test_kernel_attention.many_blocks(profile)]
    made += [*test_kernel_attention.masks()[::2], *test_kernel_attention.symbolic(profile)[:6:2]]
    return test_kernel_attention.cases(made, profile)


FAMILIES: list[Callable[[str], list[Case]]] = [
    rows,
    products,
    blocks,
    lambda profile: test_conv_narrow.bare(profile),
    lambda _: test_compute.guards(),
    lambda _: test_compute.row_chains()[:12],
    lambda profile: test_kernel_conv.cut_up(profiles()[profile], 12),
    lambda profile: test_kernel_winograd.grid(lanes_of(profiles()[profile], "float32"))[::2],
]


def models() -> list[Example]:
    """Convolutions and recurrent layers whose inputs end at the page."""
    made = [test_kernel_conv.example(g) for g in [
        Geometry((1, 16, 7, 9), (32, 16, 3, 3)),
        Geometry((2, 16, 5, 5), (16, 16, 1, 1), strides=(2, 2)),
        Geometry((1, 16, 5, 7), (20, 16, 2, 3)),
        Geometry((16, 3, 7, 5), (16, 3, 3, 3)),
        Geometry((1, 16, 9, 9), (16, 1, 3, 3), groups=16, strides=(2, 2)),
        Geometry((1, 16, 6, 6), (16, 16, 3, 3), pads=(1, 1, 1, 1)),
        Geometry((16, 5, 7), (9, 5, 3)),
    ]]  # fmt: skip
    made.append(test_kernel_conv.example(Geometry((3, 16, 5, 9), (16, 16, 3, 3)), symbolic=["n", 16, "h", "w"]))
    for op in ("LSTM", "GRU", "RNN"):
        layer = Layer(op, steps=3, batch=5, depth=16, hidden=19, direction="bidirectional", initial=True)
        made.append(test_kernel_recurrent.example(layer))
    return made


def narrow() -> list[Example]:
    """Products in narrow numbers with tails in each direction, sizes known and not."""
    few = [*test_narrow_products.quantized()[:11], *test_narrow_products.halves()[2::3]]
    return [*few, *test_narrow_products.integer_operators()[::7], *test_narrow_products.stored()[::3]]


_CASES = """
    maxpool_1d_default maxpool_2d_same_upper maxpool_2d_ceil maxpool_2d_dilations maxpool_3d_default averagepool_2d_pads
    averagepool_2d_ceil averagepool_3d_default lppool_2d_pads top_k top_k_smallest top_k_negative_axis scatternd_add
    scatter_elements_with_axis scatter_elements_with_duplicate_indices nonmaxsuppression_suppress_by_IOU
    cumsum_2d_axis_1 cumsum_1d_reverse_exclusive concat_3d_axis_0 concat_3d_axis_2 constant_pad edge_pad reflect_pad
    wrap_pad transpose_all_permutations_1 transpose_all_permutations_4 det_nd resize_upsample_scales_linear
    resize_downsample_scales_cubic resize_upsample_sizes_nearest gather_1 gather_negative_indices gather_elements_1
    attention_4d_causal attention_4d_gqa attention_4d_diff_heads_sizes_softcap attention_4d_attn_mask_bool_4d
    convtranspose convtranspose_dilations instancenorm_example layer_normalization_3d_axis1_epsilon
    group_normalization_epsilon depthtospace_example spacetodepth_example gridsample_bilinear col2im_pads
    slice_neg_steps onehot_with_axis hardmax_axis_1 logsoftmax_axis_1 argmax_keepdims_example
    reduce_l2_keep_dims_example reduce_log_sum_exp_default_axes_keepdims_example einsum_batch_matmul tril_neg
    reversesequence_batch matmulinteger qlinearmatmul_2D_uint8_float32 qlinearconv convinteger_with_padding dft
    rotary_embedding scan9_sum stft
"""
OPERATORS = _CASES.split()
"""Cases of ONNX's own suite, a few for each template: all of them have tails, for their arrays are small."""


def operators() -> list[Example]:
    """The cases of :data:`OPERATORS`."""
    cases = {case.name.removeprefix("test_"): case for case in collect_testcases(None)}
    made = []
    for name in OPERATORS:
        model, (given, want) = cases[name].model, cases[name].data_sets[0]
        feeds = dict(zip((value.name for value in model.graph.input), given, strict=True))
        made.append(Example(name, model, feeds, want))
    return made


def run_models(examples: Sequence[Example], profile: Profile) -> list[str]:
    """Run ``examples`` with guarded inputs; weights are guarded too, for they come in as arrays."""
    compiled = Programs([Module(ir.from_proto(e.model)) for e in examples], profile, memory=Memory(guard=True))
    wrong: list[str] = []
    for number, example in enumerate(examples):
        print(example.name, flush=True)
        memory = Memory(guard=True)
        try:
            got = compiled.run(number, {name: memory.array(a) for name, a in example.feeds.items()})
            for actual, expected in zip(got, example.expected(), strict=True):
                assert_close(actual, expected)
        except AssertionError as error:
            wrong.append(f"{example.name}: {error}")
    return wrong


def beyond() -> Case:
    """A kernel that is wrong: it reads a page behind its input."""
    data = Arrays()
    x = data.source((64,))
    total = Reduction((1,), (2048,), ("float32",), lambda i, k: x[k], SUM)
    return data.case("beyond", total, np.zeros(1))


if __name__ == "__main__":
    name = sys.argv[1]
    if sys.argv[2:] == ["beyond"]:
        failures([beyond()], name, guard=True, tell=lambda case: print(case, flush=True))
        sys.exit("the page could be touched")
    if sys.argv[2:] == ["operators"]:
        sys.exit("\n".join(run_models(operators(), profiles()[name])) or 0)
    if sys.argv[2:] == ["narrow"]:
        sys.exit("\n".join(run_models(narrow(), load_profile(name))) or 0)
    found = [w for f in FAMILIES for w in failures(f(name), name, guard=True, tell=lambda c: print(c, flush=True))]
    found += run_models(models(), profiles()[name])
    sys.exit("\n".join(found) if found else 0)
