"""What the analysis of dataflow has to know about operators: which inputs are data, which only steer, which learn."""

from __future__ import annotations

DEAD = frozenset({"Shape", "Size"})
"""Their output says nothing about the contents of their input."""

STEERING_INPUTS: dict[str, frozenset[int]] = {
    "Branch": frozenset({0}),
    "Clip": frozenset({1, 2}),
    "Col2Im": frozenset({1, 2}),
    "Compress": frozenset({1}),
    "ConstantOfShape": frozenset({0}),
    "CumSum": frozenset({1}),
    "Dropout": frozenset({1, 2}),
    "Expand": frozenset({1}),
    "GRU": frozenset({4}),
    "LSTM": frozenset({4}),
    "MaxUnpool": frozenset({1, 2}),
    "OneHot": frozenset({1}),
    "Pad": frozenset({1, 3}),
    "RNN": frozenset({4}),
    "Range": frozenset({0, 1, 2}),
    "ReduceL1": frozenset({1}),
    "ReduceL2": frozenset({1}),
    "ReduceLogSum": frozenset({1}),
    "ReduceLogSumExp": frozenset({1}),
    "ReduceMax": frozenset({1}),
    "ReduceMean": frozenset({1}),
    "ReduceMin": frozenset({1}),
    "ReduceProd": frozenset({1}),
    "ReduceSum": frozenset({1}),
    "ReduceSumSquare": frozenset({1}),
    "Reshape": frozenset({1}),
    "Resize": frozenset({1, 2, 3}),
    "ReverseSequence": frozenset({1}),
    "RotaryEmbedding": frozenset({1, 2, 3}),
    "ScatterElements": frozenset({1}),
    "ScatterND": frozenset({1}),
    "TensorScatter": frozenset({2}),
    "Slice": frozenset({1, 2, 3, 4}),
    "Split": frozenset({1}),
    "Squeeze": frozenset({1}),
    "Tile": frozenset({1}),
    "TopK": frozenset({1}),
    "Trilu": frozenset({1}),
    "Unsqueeze": frozenset({1}),
    "Upsample": frozenset({1}),
    "Where": frozenset({0}),
    "Attention": frozenset({3, 6}),
    "com.microsoft.Attention": frozenset({3, 4, 5}),
    "com.microsoft.MultiHeadAttention": frozenset({4, 5}),
    "com.microsoft.GroupQueryAttention": frozenset({5, 6, 7, 8, 9, 10}),
    "com.microsoft.RotaryEmbedding": frozenset({1, 2, 3}),
    "com.microsoft.EmbedLayerNormalization": frozenset({7, 8}),
}
"""Positions of inputs that only steer where data goes: shapes, axes, masks, conditions, lengths."""

SIZED_BY_DATA = frozenset({"NonZero", "Compress", "Unique", "NonMaxSuppression", "StringSplit"})
"""The contents of their inputs decide how large their output is."""

SIZED_BY_STEERING = frozenset(
    {"ConstantOfShape", "Expand", "OneHot", "Pad", "Range", "Reshape", "Resize", "Slice", "Split", "Tile", "TopK"}
)
"""The contents of their steering inputs decide how large their output is."""

GATHERS = frozenset({"Gather", "GatherElements", "GatherND"})
"""Pick from input 0 by the indices in input 1; a look-up when input 0 is a table of weights."""

DECISIONS = frozenset(
    {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor", "IsInf", "IsNaN"}
    | {"ArgMax", "ArgMin", "NonZero"}
)
"""Turn data into truth values or positions: what comes out steers and no longer carries the data."""

QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})

LAYOUT = frozenset(
    {"Identity", "Cast", "CastLike", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Dropout"}
    | QUANTIZERS
)
"""Same elements (up to repetition and rounding), other shape, order or type."""

SELECTION = frozenset(
    {"Slice", "Split", "Pad", "Tile", "Concat", "DepthToSpace", "SpaceToDepth", "Resize", "Upsample"}
    | {"ReverseSequence", "Element", "Merge", "Collect", "Branch", "Compress", "TopK", "SplitToSequence", "SequenceAt"}
    | {"ConcatFromSequence", "SequenceConstruct", "SequenceInsert"}
)
"""Choose among elements or put them side by side."""

ACTIVATIONS = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Gelu", "Sigmoid", "HardSigmoid", "Tanh", "Erf", "Softplus"}
    | {"Softsign", "HardSwish", "Mish", "Swish", "ThresholdedRelu", "com.microsoft.Gelu", "com.microsoft.FastGelu"}
    | {"com.microsoft.BiasGelu", "com.microsoft.QuickGelu", "Clip"}
)

UNARY = ACTIVATIONS | frozenset(
    {"Abs", "Neg", "Sqrt", "Exp", "Log", "Floor", "Ceil", "Round", "Sign", "Reciprocal", "Sin", "Cos", "Atan"}
)

NORMS = frozenset(
    {"LayerNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"}
    | {"LpNormalization", "MeanVarianceNormalization", "LRN", "SimplifiedLayerNormalization"}
    | {"com.microsoft.SimplifiedLayerNormalization"}
)

ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Mod", "Sum", "Mean", "BitShift", "PRelu"})

ADDITIVE = frozenset({"Add", "Sub", "Sum", "Mean", "QLinearAdd", "com.microsoft.QLinearAdd"})

MULTIPLICATIVE = frozenset({"Mul", "Div", "com.microsoft.QLinearMul"})

REDUCTIONS = frozenset(name for name in STEERING_INPUTS if name.startswith("Reduce"))

POOLS = frozenset({"MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"})

CONVOLUTIONS: dict[str, tuple[int, int]] = {
    "Conv": (0, 1),
    "ConvTranspose": (0, 1),
    "ConvInteger": (0, 1),
    "DeformConv": (0, 1),
    "QLinearConv": (0, 3),
    "com.microsoft.FusedConv": (0, 1),
    "com.microsoft.NhwcConv": (0, 1),
}
"""Operator to the positions of (data, filter)."""

PRODUCTS: dict[str, tuple[int, int]] = {
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "MatMulInteger": (0, 1),
    "QLinearMatMul": (0, 3),
    "Einsum": (0, 1),
    "com.microsoft.FusedMatMul": (0, 1),
    "com.microsoft.FusedGemm": (0, 1),
    "com.microsoft.TransposeMatMul": (0, 1),
    "com.microsoft.MatMulIntegerToFloat": (0, 1),
    "com.microsoft.DynamicQuantizeMatMul": (0, 1),
    "com.microsoft.MatMulNBits": (0, 1),
    "com.microsoft.MatMulBnb4": (0, 1),
    "com.microsoft.QGemm": (0, 3),
}
"""Operator to the positions of its two factors."""

RECURRENT = frozenset({"LSTM", "GRU", "RNN", "com.microsoft.DynamicQuantizeLSTM"})
"""Inputs: sequence 0, weights 1 and 2, lengths 4, initial states 5 and 6."""

ATTENTIONS: dict[str, tuple[int, ...]] = {
    "Attention": (0, 1, 2),
    "com.microsoft.MultiHeadAttention": (0, 1, 2),
    "com.microsoft.GroupQueryAttention": (0, 1, 2),
}
"""Whole attention in one node, to the positions of query, key and value."""

SPECTRAL = frozenset({"STFT", "DFT"})

SCATTERS = frozenset({"ScatterND", "ScatterElements", "Scatter", "TensorScatter"})
"""Overwrite elements of input 0."""

SELECTORS = SCATTERS | {"Where"}
"""Put elements of one tensor at chosen places of another."""

TRADITIONAL = "ai.onnx.ml."
"""Prefix of the operators of traditional machine learning: trees, scalers, encoders of tables."""

TEXT_OPERATORS = frozenset({"StringNormalizer", "TfIdfVectorizer", "RegexFullMatch", "StringSplit"})


def is_contraction(op: str) -> bool:
    """Whether the operator mixes features by a sum of products: convolution, product of matrices, recurrence."""
    return op in CONVOLUTIONS or op in PRODUCTS or op in RECURRENT or op in ATTENTIONS
