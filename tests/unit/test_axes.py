"""Groups of coupled axes, operator family by family: which there are, and that slicing them is masking them."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from mmopt.analysis.axes import Group, Place, Role, find_groups
from tests.axes import Case, check_cuts, free, with_weights

_MLP = {"w": (6, 8), "b": (8,), "v": (8, 3)}

CASES = {
    "linear layers": Case("h = MatMul(x, w) a = Add(h, b) r = Relu(a) y = MatMul(r, v)", _MLP, [("neurons", 8)]),
    "a unit that is not zero at zero": Case(
        "h = MatMul(x, w) a = Add(h, b) r = Exp(a) y = MatMul(r, v)", _MLP, [("neurons", 8)]
    ),
    "Gemm, transposed": Case(
        "h = Gemm<transB = 1>(x, w, b) r = Tanh(h) y = Gemm<transB = 1, alpha = 0.5>(r, v)",
        {"w": (8, 6), "b": (8,), "v": (3, 8)},
        [("neurons", 8)],
        x="float[4, 6]",
        y="float[4, 3]",
    ),
    "weight on the left": Case(
        "h = MatMul(w, x) r = Relu(h) y = MatMul(v, r)",
        {"w": (8, 6), "v": (3, 8)},
        [("neurons", 8)],
        x="float[2, 6, 5]",
        y="float[2, 3, 5]",
    ),
    "weight behind Transpose and Cast": Case(
        "t = Transpose(w) c = Cast<to = 1>(t) h = MatMul(x, c) r = Relu(h) y = MatMul(r, v)",
        {"w": (8, 6), "v": (8, 3)},
        [("neurons", 8)],
    ),
    "einsum": Case(
        'h = Einsum<equation = "bsi,oi->bso">(x, w) y = Einsum<equation = "...o,oc->...c">(h, v)',
        {"w": (8, 6), "v": (8, 3)},
        [("neurons", 8)],
    ),
    "einsum with heads": Case(
        'q = Einsum<equation = "bsi,ihd->bhsd">(x, w) k = Einsum<equation = "bsi,ihd->bhsd">(x, u)'
        ' a = Einsum<equation = "bhsd,bhtd->bhst">(q, k) p = Softmax(a)'
        ' o = Einsum<equation = "bhst,bhtd->bshd">(p, k) y = Einsum<equation = "bshd,hdo->bso">(o, v)',
        {"w": (6, 2, 4), "u": (6, 2, 4), "v": (2, 4, 3)},
        [("heads", 2), ("head size", 4)],
    ),
    "residual": Case(
        "h = MatMul(x, w) g = MatMul(h, u) s = Add(h, g) y = MatMul(s, v)",
        {"w": (6, 8), "u": (8, 8), "v": (8, 3)},
        [("features", 8)],
    ),
    "product": Case(
        "h = MatMul(x, w) g = MatMul(x, u) s = Mul(h, g) y = MatMul(s, v)",
        {"w": (6, 8), "u": (6, 8), "v": (8, 3)},
        [("features", 8)],
    ),
    "concat": Case(
        "h = MatMul(x, w) g = MatMul(x, u) s = Concat<axis = -1>(h, g) r = Relu(s) y = MatMul(r, v)",
        {"w": (6, 8), "u": (6, 5), "v": (13, 3)},
        [("neurons", 8), ("neurons", 5)],
    ),
    "split": Case(
        "h = MatMul(x, w) a, b = Split<axis = -1, num_outputs = 2>(h) s = Sigmoid(a) p = Mul(s, b) y = MatMul(p, v)",
        {"w": (6, 10), "v": (5, 3)},
        [("neurons", 5)],
    ),
    "split in unequal parts": Case(
        "h = MatMul(x, w) a, b = Split<axis = 2>(h, sizes) c = MatMul(a, u) d = MatMul(b, v) y = Add(c, d)",
        {"w": (6, 10), "u": (4, 3), "v": (6, 3)},
        [("neurons", 4), ("neurons", 6)],
        numbers={"sizes": [4, 6]},
    ),
    "slices with steps": Case(
        "h = MatMul(x, w) a = Slice(h, zero, all, last, two) b = Slice(h, one, all, last, two) s = Mul(a, b)"
        " y = MatMul(s, v)",
        {"w": (6, 10), "v": (5, 3)},
        [("neurons", 5)],
        numbers={"zero": [0], "one": [1], "two": [2], "all": [2**62], "last": [-1]},
    ),
    "slices that overlap": Case(
        "h = MatMul(x, w) a = Slice(h, zero, six, last) b = Slice(h, two, eight, last) s = Add(a, b) y = MatMul(s, v)",
        {"w": (6, 8), "v": (6, 3)},
        [("neurons", 2)],
        numbers={"zero": [0], "two": [2], "six": [6], "eight": [8], "last": [-1]},
    ),
    "reversed": Case(
        "h = MatMul(x, w) r = Slice(h, last, start, last, last) y = MatMul(r, v)",
        {"w": (6, 8), "v": (8, 3)},
        [("neurons", 8)],
        numbers={"last": [-1], "start": [-(2**62)]},
    ),
    "gather by constants": Case(
        "h = MatMul(x, w) r = Gather<axis = 2>(h, order) y = MatMul(r, v)",
        {"w": (6, 4), "v": (4, 3)},
        [("neurons", 4)],
        numbers={"order": [2, 0, 3, 1]},
    ),
    "padded shortcut": Case(
        "h = MatMul(x, w) g = MatMul(x, u) p = Pad(h, pads) s = Add(p, g) y = MatMul(s, v)",
        {"w": (6, 5), "u": (6, 8), "v": (8, 3)},
        [("features", 5), ("neurons", 3)],
        numbers={"pads": [0, 0, 1, 0, 0, 2]},
    ),
    "table of words, tied to the output by a product": Case(
        "h = Gather(w, x) r = Relu(h) t = Transpose<perm = [1, 0]>(w) y = MatMul(r, t)",
        {"w": (7, 6)},
        [("features", 6)],
        x="int64[2, 5]",
        y="float[2, 5, 7]",
    ),
    "broadcast scale and mask": Case(
        "h = MatMul(x, w) s = Mul(h, scale) m = Add(s, shift) y = MatMul(m, v)",
        {"w": (6, 8), "scale": (1, 1, 8), "shift": (5, 1), "v": (8, 3)},
        [("neurons", 8)],
    ),
    "one bias for two layers": Case(
        "h = MatMul(x, w) a = Add(h, b) r = Relu(a) g = MatMul(r, u) c = Add(g, b) y = MatMul(c, v)",
        {"w": (6, 8), "b": (8,), "u": (8, 8), "v": (8, 3)},
        [("neurons", 8), ("neurons", 8)],
    ),
    "flattened space": Case(
        "c = Conv<pads = [1, 1, 1, 1]>(x, w, b) f = Flatten(c) y = Gemm(f, v)",
        {"w": (4, 3, 3, 3), "b": (4,), "v": (4 * 16, 3)},
        [("channels", 4)],
        x="float[2, 3, 4, 4]",
        y="float[2, 3]",
    ),
    "convolutions with batch norm and pooling": Case(
        "c = Conv(x, w) n = BatchNormalization(c, s, b, m, positive) p = MaxPool<kernel_shape = [2, 2]>(n)"
        " d = Conv(p, v) y = GlobalAveragePool(d)",
        {"w": (6, 3, 3, 3), "s": (6,), "b": (6,), "m": (6,), "positive": (6,), "v": (2, 6, 1, 1)},
        [("channels", 6)],
        x="float[2, 3, 6, 6]",
        y="float[2, 2, 1, 1]",
    ),
    "grouped convolution": Case(
        "c = Conv(x, w) g = Conv<group = 3>(c, u, b) y = Conv(g, v)",
        {"w": (12, 3, 1, 1), "u": (6, 4, 1, 1), "b": (6,), "v": (2, 6, 1, 1)},
        [("groups", 3), ("channels", 4), ("channels", 2)],
        x="float[2, 3, 4, 4]",
        y="float[2, 2, 4, 4]",
    ),
    "depthwise convolution with a multiplier": Case(
        "c = Conv(x, w) g = Conv<group = 6>(c, u) y = Conv(g, v)",
        {"w": (6, 3, 1, 1), "u": (12, 1, 1, 1), "v": (2, 12, 1, 1)},
        [("groups", 6), ("channels", 2)],
        x="float[2, 3, 4, 4]",
        y="float[2, 2, 4, 4]",
    ),
    "transposed convolutions": Case(
        "c = ConvTranspose<strides = [2, 2]>(x, w, b) d = ConvTranspose<group = 2>(c, u) y = Conv(d, v)",
        {"w": (3, 8, 2, 2), "b": (8,), "u": (8, 3, 1, 1), "v": (2, 6, 1, 1)},
        [("groups", 2), ("channels", 4), ("channels", 3)],
        x="float[2, 3, 4, 4]",
        y="float[2, 2, 8, 8]",
    ),
    "channels to space": Case(
        'c = Conv(x, w) d = DepthToSpace<blocksize = 2, mode = "DCR">(c) e = Conv(d, v)'
        ' f = DepthToSpace<blocksize = 2, mode = "CRD">(e) s = SpaceToDepth<blocksize = 4>(f) y = Conv(s, u)',
        {"w": (12, 3, 1, 1), "v": (8, 3, 1, 1), "u": (2, 32, 1, 1)},
        [("channels", 3), ("channels", 2)],
        x="float[2, 3, 4, 4]",
        y="float[2, 2, 4, 4]",
    ),
    "resized": Case(
        'c = Conv(x, w) r = Resize<mode = "nearest">(c, , , sizes) y = Conv(r, v)',
        {"w": (6, 3, 1, 1), "v": (2, 6, 1, 1)},
        [("channels", 6)],
        x="float[2, 3, 4, 4]",
        y="float[2, 2, 8, 8]",
        numbers={"sizes": [2, 6, 8, 8]},
    ),
    "layer norm": Case(
        "h = MatMul(x, w) n = LayerNormalization<axis = -1>(h, s, b) y = MatMul(n, v)",
        {"w": (6, 8), "s": (8,), "b": (8,), "v": (8, 3)},
        [("features", 8)],
    ),
    "RMS norm": Case(
        "h = MatMul(x, w) n = RMSNormalization<axis = -1>(h, s) y = MatMul(n, v)",
        {"w": (6, 8), "s": (8,), "v": (8, 3)},
        [("features", 8)],
    ),
    "layer norm spelled out": Case(
        "h = MatMul(x, w) m = ReduceMean(h, last) d = Sub(h, m) q = Mul(d, d) v2 = ReduceMean(q, last)"
        " r = Sqrt(v2) n = Div(d, r) y = MatMul(n, v)",
        {"w": (6, 8), "v": (8, 3)},
        [("neurons", 8)],
        numbers={"last": [-1]},
    ),
    "group norm": Case(
        "c = Conv(x, w) n = GroupNormalization<num_groups = 3>(c, s, b) y = Conv(n, v)",
        {"w": (12, 3, 1, 1), "s": (12,), "b": (12,), "v": (2, 12, 1, 1)},
        [("channels", 3), ("channels", 4)],
        x="float[2, 3, 4, 4]",
        y="float[2, 2, 4, 4]",
    ),
    "group norm by instance norm": Case(
        "c = Conv(x, w) r = Reshape(c, cut) n = InstanceNormalization(r, s, b) o = Reshape(n, back) y = Conv(o, v)",
        {"w": (12, 3, 1, 1), "s": (3,), "b": (3,), "v": (2, 12, 1, 1)},
        [("channels", 3), ("channels", 4)],
        x="float[2, 3, 4, 4]",
        y="float[2, 2, 4, 4]",
        numbers={"cut": [0, 3, -1], "back": [2, 12, 4, 4]},
    ),
    "instance norm and normalization by length": Case(
        "c = Conv(x, w) n = InstanceNormalization(c, s, b) p = GlobalAveragePool(n) f = Flatten(p)"
        " l = LpNormalization<axis = 1>(f) y = MatMul(l, v)",
        {"w": (6, 3, 1, 1), "s": (6,), "b": (6,), "v": (6, 3)},
        [("channels", 6)],
        x="float[2, 3, 4, 4]",
        y="float[2, 3]",
    ),
    "every reduction": Case(
        "h = MatMul(x, w) s = ReduceSum<keepdims = 0>(h, last) m = ReduceMax<keepdims = 0>(h, last)"
        " n = ReduceMin<keepdims = 0>(h, last) l = ReduceL2<keepdims = 0>(h, last)"
        " g = ReduceMean<keepdims = 0>(h, last) e = ReduceLogSumExp<keepdims = 0>(h, last)"
        " p = ReduceProd<keepdims = 0>(h, last)"
        " f = Sum(s, m, n, l, g, e, p) u = Unsqueeze(f, last) y = Mul(u, v)",
        {"w": (6, 8), "v": (3,)},
        [("neurons", 8)],
        numbers={"last": [-1]},
    ),
    "shares by softmax": Case(
        "h = MatMul(x, w) s = Softmax<axis = -1>(h) g = MatMul(x, u) p = Mul(s, g) y = MatMul(p, v)",
        {"w": (6, 8), "u": (6, 8), "v": (8, 3)},
        [("features", 8)],
    ),
    "attention spelled out": Case(
        "q = MatMul(x, w) k = MatMul(x, u) v = MatMul(x, t) q4 = Reshape(q, cut) k4 = Reshape(k, cut)"
        " v4 = Reshape(v, wide) qt = Transpose<perm = [0, 2, 1, 3]>(q4) kt = Transpose<perm = [0, 2, 3, 1]>(k4)"
        " vt = Transpose<perm = [0, 2, 1, 3]>(v4) a = MatMul(qt, kt) p = Softmax(a) o = MatMul(p, vt)"
        " ot = Transpose<perm = [0, 2, 1, 3]>(o) m = Reshape(ot, merged) y = MatMul(m, z)",
        {"w": (6, 12), "u": (6, 12), "t": (6, 15), "z": (15, 3)},
        [("heads", 3), ("head size", 4), ("head size", 5)],
        numbers={"cut": [2, 5, 3, 4], "wide": [0, 0, 3, 5], "merged": [2, 5, -1]},
    ),
    "packed attention": Case(
        "h = MatMul(x, w) c = Reshape(h, cut) t = Transpose<perm = [2, 0, 3, 1, 4]>(c)"
        " q = Gather(t, zero) k = Gather(t, one) v = Gather(t, two) kt = Transpose<perm = [0, 1, 3, 2]>(k)"
        " a = MatMul(q, kt) p = Softmax(a) o = MatMul(p, v) ot = Transpose<perm = [0, 2, 1, 3]>(o)"
        " m = Reshape(ot, merged) y = MatMul(m, z)",
        {"w": (6, 24), "z": (8, 3)},
        [("heads", 2), ("head size", 4)],
        numbers={"cut": [2, 5, 3, 2, 4], "zero": 0, "one": 1, "two": 2, "merged": [2, 5, 8]},
    ),
    "the operator, heads inside the projections": Case(
        "q = MatMul(x, w) k = MatMul(x, u) v = MatMul(x, t)"
        " a = Attention<q_num_heads = 3, kv_num_heads = 3>(q, k, v) y = MatMul(a, z)",
        {"w": (6, 12), "u": (6, 12), "t": (6, 15), "z": (15, 3)},
        [("heads", 3), ("head size", 4), ("head size", 5)],
    ),
    "grouped queries": Case(
        "q = MatMul(x, w) k = MatMul(x, u) v = MatMul(x, t)"
        " a = Attention<q_num_heads = 6, kv_num_heads = 2>(q, k, v) y = MatMul(a, z)",
        {"w": (6, 24), "u": (6, 8), "t": (6, 8), "z": (24, 3)},
        [("heads", 2), ("heads", 3), ("head size", 4), ("head size", 4)],
    ),
    "grouped queries by repetition": Case(
        "q = MatMul(x, w) k = MatMul(x, u) q4 = Reshape(q, cut_q) k4 = Reshape(k, cut_k)"
        " qt = Transpose<perm = [0, 2, 1, 3]>(q4) kt = Transpose<perm = [0, 2, 1, 3]>(k4) ku = Unsqueeze(kt, two)"
        " ke = Expand(ku, wide) kr = Reshape(ke, all) ks = Transpose<perm = [0, 1, 3, 2]>(kr) a = MatMul(qt, ks)"
        " p = Softmax(a) o = MatMul(p, kr) ot = Transpose<perm = [0, 2, 1, 3]>(o) m = Reshape(ot, merged)"
        " y = MatMul(m, z)",
        {"w": (6, 24), "u": (6, 8), "z": (24, 3)},
        [("heads", 2), ("heads", 3), ("head size", 4)],
        numbers={
            "cut_q": [2, 5, 6, 4],
            "cut_k": [2, 5, 2, 4],
            "two": [2],
            "wide": [2, 2, 3, 5, 4],
            "all": [2, 6, 5, 4],
            "merged": [2, 5, 24],
        },
    ),
    "attention with an axis of heads and a mask": Case(
        "q = MatMul(x, w) k = MatMul(x, u) q4 = Reshape(q, cut) k4 = Reshape(k, cut)"
        " qt = Transpose<perm = [0, 2, 1, 3]>(q4) kt = Transpose<perm = [0, 2, 1, 3]>(k4)"
        " a = Attention(qt, kt, kt, mask) ot = Transpose<perm = [0, 2, 1, 3]>(a) m = Reshape(ot, merged)"
        " y = MatMul(m, z)",
        {"w": (6, 12), "u": (6, 12), "z": (12, 3), "mask": (3, 5, 5)},
        [("heads", 3), ("head size", 4)],
        numbers={"cut": [2, 5, 3, 4], "merged": [2, 5, 12]},
    ),
    "rotary embedding by halves": Case(
        "q = MatMul(x, w) k = MatMul(x, u) v = MatMul(x, t) qr = RotaryEmbedding<num_heads = 2>(q, c, s)"
        " kr = RotaryEmbedding<num_heads = 2>(k, c, s) a = Attention<q_num_heads = 2, kv_num_heads = 2>(qr, kr, v)"
        " y = MatMul(a, z)",
        {"w": (6, 16), "u": (6, 16), "t": (6, 16), "c": (2, 5, 4), "s": (2, 5, 4), "z": (16, 3)},
        [("heads", 2), ("head size", 4), ("head size", 8)],
    ),
    "rotary embedding of neighbours": Case(
        "q = MatMul(x, w) k = MatMul(x, u) v = MatMul(x, t)"
        " qr = RotaryEmbedding<num_heads = 2, interleaved = 1>(q, c, s)"
        " kr = RotaryEmbedding<num_heads = 2, interleaved = 1>(k, c, s)"
        " a = Attention<q_num_heads = 2, kv_num_heads = 2>(qr, kr, v) y = MatMul(a, z)",
        {"w": (6, 16), "u": (6, 16), "t": (6, 16), "c": (2, 5, 4), "s": (2, 5, 4), "z": (16, 3)},
        [("heads", 2), ("head size", 4), ("head size", 8)],
    ),
    "LSTM in both directions": Case(
        "t = Transpose<perm = [1, 0, 2]>(x)"
        ' h, last, cell = LSTM<hidden_size = 4, direction = "bidirectional">(t, w, r, b, , h0, c0, p)'
        " f = Transpose<perm = [2, 0, 1, 3]>(h) m = Reshape(f, merged) y = MatMul(m, v)",
        {
            "w": (2, 16, 6),
            "r": (2, 16, 4),
            "b": (2, 32),
            "h0": (2, 2, 4),
            "c0": (2, 2, 4),
            "p": (2, 12),
            "v": (8, 3),
        },
        [("hidden units", 4)],
        numbers={"merged": [2, 5, 8]},
    ),
    "GRU and RNN, the state of one starting the other": Case(
        "t = Transpose<perm = [1, 0, 2]>(x) h, last = GRU<hidden_size = 4, linear_before_reset = 1>(t, w, r, b)"
        " s = Squeeze(h, one) g, end = RNN<hidden_size = 4>(s, u, q, , , last) o = Squeeze(g, one)"
        " f = Transpose<perm = [1, 0, 2]>(o) y = MatMul(f, v)",
        {"w": (1, 12, 6), "r": (1, 12, 4), "b": (1, 24), "u": (1, 4, 4), "q": (1, 4, 4), "v": (4, 3)},
        [("hidden units", 4)],
        numbers={"one": [1]},
    ),
    "shuffled channels": Case(
        "c = Conv(x, w) a, b = Split<axis = 1, num_outputs = 2>(c) d = Conv(b, u) j = Concat<axis = 1>(a, d)"
        " r = Reshape(j, cut) t = Transpose<perm = [0, 2, 1, 3, 4]>(r) s = Reshape(t, back) y = Conv(s, v)",
        {"w": (8, 3, 1, 1), "u": (4, 4, 1, 1), "v": (2, 8, 1, 1)},
        [("channels", 4), ("channels", 4)],
        x="float[2, 3, 4, 4]",
        y="float[2, 2, 4, 4]",
        numbers={"cut": [2, 2, 4, 4, 4], "back": [2, 8, 4, 4]},
    ),
    "sizes by Shape and Concat": Case(
        "h = MatMul(x, w) s = Shape(x) n = Gather(s, firsts) m = Concat<axis = 0>(n, cut) r = Reshape(h, m)"
        " t = ReduceSum<keepdims = 0>(r, two) y = MatMul(t, v)",
        {"w": (6, 12), "v": (4, 3)},
        [("neurons", 3), ("neurons", 4)],
        x="float[batch, length, 6]",
        y="float[batch, length, 3]",
        numbers={"firsts": [0, 1], "cut": [3, 4], "two": [2]},
    ),
    "batch merged with heads": Case(
        "h = MatMul(x, w) s = Shape(x) n = Gather(s, firsts) m = Concat<axis = 0>(n, cut) r = Reshape(h, m)"
        " t = Transpose<perm = [0, 2, 1, 3]>(r) l = Slice(s, one, two) c = Concat<axis = 0>(neg, l, four)"
        " f = Reshape(t, c) g = Transpose<perm = [0, 2, 1]>(f) a = MatMul(f, g) p = Softmax(a) o = MatMul(p, f)"
        " b = Slice(s, zero, one) d = Concat<axis = 0>(b, three, l, four) e = Reshape(o, d)"
        " i = Transpose<perm = [0, 2, 1, 3]>(e) j = Concat<axis = 0>(n, neg) k = Reshape(i, j) y = MatMul(k, v)",
        {"w": (6, 12), "v": (12, 3)},
        [("neurons", 3), ("head size", 4)],
        x="float[batch, length, 6]",
        y="float[batch, length, 3]",
        numbers={
            "firsts": [0, 1],
            "cut": [3, 4],
            "zero": [0],
            "one": [1],
            "two": [2],
            "neg": [-1],
            "three": [3],
            "four": [4],
        },
    ),
    "zeros of a computed size": Case(
        "h = MatMul(x, w) s = Shape(h) z = ConstantOfShape(s) a = Add(h, z) y = MatMul(a, v)",
        {"w": (6, 8), "v": (8, 3)},
        [("neurons", 8)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_slices_equal_masks(name: str) -> None:
    case = CASES[name]
    opset = 21 if name == "group norm" else 23
    groups = check_cuts(case.module(opset))
    found = collections.Counter((group.kind, group.units) for group in free(groups))
    assert found == collections.Counter(case.groups), [(g.name, g.kind, g.units, g.frozen) for g in groups]


FROZEN = {
    "an output": ("h = MatMul(x, w) y = Relu(h)", {"w": (6, 3)}, "the output 'y' shows it"),
    "an input": ("y = MatMul(x, w)", {"w": (6, 3)}, "the input 'x' shows it"),
    "TopK": ("h = MatMul(x, w) y, i = TopK<axis = -1>(h, k)", {"w": (6, 8)}, "TopK sorts it"),
    "CumSum": ("h = MatMul(x, w) c = CumSum(h, k2) y = MatMul(c, v)", {"w": (6, 8), "v": (8, 3)}, "CumSum runs along"),
    "an operator of a foreign domain": (
        "h = MatMul(x, w) c = other.Thing(h) y = MatMul(c, v)",
        {"w": (6, 8), "v": (8, 3)},
        "what other.Thing does with it is not understood",
    ),
    "Det": ("h = MatMul(x, w) d = Det(h) y = Mul(x, d)", {"w": (6, 5)}, "what Det does with it is not understood"),
    "sizes computed with": (
        "h = MatMul(x, w) s = Shape<start = 2>(h) f = Cast<to = 1>(s) d = Div(h, f) y = MatMul(d, v)",
        {"w": (6, 8), "v": (8, 3)},
        "Div computes with its size",
    ),
    "a body": (
        "h = MatMul(x, w) c = Cast<to = 9>(k0) i = If(c) <then_branch = t () => (float[2, 5, 8] a) { a = Relu(h) },"
        " else_branch = e () => (float[2, 5, 8] b) { b = Neg(h) }> y = MatMul(i, v)",
        {"w": (6, 8), "v": (8, 3)},
        "If",
    ),
    "local response normalization": (
        "u = Unsqueeze(x, k1) c = Conv(u, w) n = LRN<size = 3>(c) y = Conv(n, v)",
        {"w": (8, 1, 1, 1), "v": (2, 8, 1, 1)},
        "LRN normalizes by neighbouring channels",
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_the_reason_names_what_freezes_a_group(name: str) -> None:
    nodes, weights, reason = FROZEN[name]
    arrays = {key: np.ones(shape, dtype=np.float32) for key, shape in weights.items()}
    arrays |= {"k": np.array([3]), "k0": np.array(1), "k1": np.array([1]), "k2": np.array(2)}  # type: ignore[dict-item]
    module = with_weights(f"g (float[2, 5, 6] x) => (float[?, ?, ?] y) {{ {nodes} }}".replace("[?, ?, ?]", ""), arrays)
    module.model.opset_imports["other"] = 1
    groups = find_groups(module)
    assert free(groups) == []
    assert any(reason in group.frozen for group in groups), [group.frozen for group in groups]


def _group(groups: tuple[Group, ...], kind: str) -> Group:
    (found,) = [group for group in groups if group.kind == kind and not group.frozen]
    return found


def test_places_say_what_a_weight_is_to_its_units() -> None:
    groups = find_groups(CASES["LSTM in both directions"].module())
    places = _group(groups, "hidden units").weights
    assert Place("r", 2, ((0,), (1,), (2,), (3,)), Role.CONSUMER, "LSTM_1") in places
    gates = tuple((j, 4 + j, 8 + j, 12 + j) for j in range(4))
    assert Place("w", 1, gates, Role.PRODUCER, "LSTM_1") in places
    assert Place("r", 1, gates, Role.PRODUCER, "LSTM_1") in places
    halves = tuple(tuple(4 * k + j for k in range(8)) for j in range(4))
    assert Place("b", 1, halves, Role.PARAMETER, "LSTM_1") in places
    assert Place("v", 0, ((0, 4), (1, 5), (2, 6), (3, 7)), Role.CONSUMER, "MatMul_4") in places
    assert {(p.value, p.axis) for p in places} == {
        ("w", 1), ("r", 1), ("r", 2), ("b", 1), ("h0", 2), ("c0", 2), ("p", 1), ("v", 0),
    }  # fmt: skip


def test_a_key_head_goes_with_its_queries() -> None:
    groups = find_groups(CASES["grouped queries"].module())
    heads = next(group for group in groups if group.kind == "heads" and group.units == 2)
    queries = next(place for place in heads.weights if place.value == "w")
    assert queries.positions == (tuple(range(12)), tuple(range(12, 24)))
    keys = next(place for place in heads.weights if place.value == "u")
    assert keys.positions == (tuple(range(4)), tuple(range(4, 8)))


def test_a_vector_of_two_layers_has_a_place_for_each() -> None:
    first, second = free(find_groups(CASES["one bias for two layers"].module()))
    readers = [[p.node for p in group.weights if p.value == "b"] for group in (first, second)]
    assert readers == [["Add_1"], ["Add_4"]]


def test_names_are_those_of_the_layers_and_no_two_are_the_same() -> None:
    module = CASES["attention spelled out"].module()
    module.graph.initializers["w"].name = "encoder.attention.query.weight"
    names = [group.name for group in find_groups(module)]
    assert len(set(names)) == len(names)
    assert any("encoder.attention.query" in name and name.endswith(":heads") for name in names), names


def test_activations_are_listed_with_the_positions_of_their_units() -> None:
    (group,) = free(find_groups(CASES["flattened space"].module()))
    places = {place.value: place for place in group.activations}
    assert places["c"].axis == 1
    assert places["f"].positions[1] == tuple(range(16, 32))
    assert {place.role for place in group.activations} == {Role.ACTIVATION}
