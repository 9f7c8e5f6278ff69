"""Passes that break a module in every way a pass can, each under the name of what it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from tests.pass_models import audio_model, fused_model, text_image_model

Break = Callable[[Module], object]


@dataclasses.dataclass(frozen=True)
class WrongPass:
    """A way to break a module.

    Attributes:
        name: What it does.
        break_: The function that does it to a module; what it returns is the claim, True when that is None.
        model: Builder of the module that it breaks.
        fidelity: What it declares.
        reason: A part of the reason that the report must give.
    """

    name: str
    break_: Break
    model: Callable[[], Module]
    fidelity: Fidelity
    reason: str

    def make(self) -> Pass:
        """The pass."""
        break_ = self.break_

        def run(self: Pass, module: Module, context: PassContext) -> object:
            claim = break_(module)
            return True if claim is None else claim

        namespace = {"run": run, "name": self.name, "fidelity": self.fidelity}
        return dataclasses.make_dataclass("Wrong", [], bases=(Pass,), namespace=namespace, frozen=True)()


WRONG: list[WrongPass] = []


def wrong(reason: str, *, model=text_image_model, fidelity=Fidelity.EXACT) -> Callable[[Break], Break]:
    def decorate(function: Break) -> Break:
        name = function.__name__.replace("_", "-")
        WRONG.append(WrongPass(name, function, model, fidelity, reason))
        return function

    return decorate


def find(module: Module, output: str) -> ir.Node:
    """The node that makes the value ``output``."""
    return next(node for node in module.graph.all_nodes() if any(value.name == output for value in node.outputs))


def weight(module: Module, name: str) -> np.ndarray:
    return module.graph.initializers[name].const_value.numpy()


def set_weight(module: Module, name: str, array: np.ndarray) -> None:
    module.graph.initializers[name].const_value = ir.tensor(array, name=name)


def new_weight(module: Module, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    module.graph.register_initializer(value)
    return value


def skip(module: Module, output: str, position: int = 0) -> None:
    """Replace the node that makes ``output`` with its input at ``position``."""
    node = find(module, output)
    node.outputs[0].replace_all_uses_with(node.inputs[position])
    module.graph.remove(node, safe=True)


def insert_after(module: Module, value: ir.Value, *ops: tuple[str, dict]) -> None:
    """Put a chain of one-input operators between ``value`` and its uses."""
    uses = list(value.uses())
    current, previous = value, value.producer()
    for number, (op, attributes) in enumerate(ops):
        node = ir.node(op, [current], attributes, name=f"inserted_{value.name}_{number}")
        node.outputs[0].name = f"inserted_{value.name}_{number}_out"
        module.graph.insert_after(previous, node)
        current, previous = node.outputs[0], node
    for usage in uses:
        usage.node.replace_input_with(usage.idx, current)


# --- values -----------------------------------------------------------------------------------------------------------


@wrong("output 'difference'")
def swap_operands_of_sub(module):
    node = find(module, "difference")
    first, second = node.inputs
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)


@wrong("output")
def drop_bias_of_convolution(module):
    find(module, "convolved").replace_input_with(2, None)


@wrong("output")
def drop_bias_of_gemm(module):
    find(module, "head").replace_input_with(2, None)


@wrong("output")
def softmax_over_wrong_axis(module):
    find(module, "weights").attributes["axis"] = ir.AttrInt64("axis", 1)


@wrong("output")
def slice_off_by_one(module):
    find(module, "part").replace_input_with(1, new_weight(module, "starts_1", np.array([3], np.int64)))
    find(module, "part").replace_input_with(2, new_weight(module, "ends_1", np.array([11], np.int64)))


@wrong("")
def slice_one_short(module):
    find(module, "part").replace_input_with(2, new_weight(module, "ends_1", np.array([9], np.int64)))


@wrong("output")
def change_epsilon_of_layer_norm(module):
    find(module, "normed").attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)


@wrong("output")
def change_epsilon_of_batch_norm(module):
    find(module, "bn").attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)


@wrong("output")
def transpose_square_weight(module):
    set_weight(module, "value_weight", np.ascontiguousarray(weight(module, "value_weight").T))


@wrong("output")
def read_gemm_weight_transposed(module):
    node = find(module, "value")
    gemm = ir.node("Transpose", [node.inputs[1]], {"perm": [1, 0]}, name="flip")
    gemm.outputs[0].name = "flipped"
    module.graph.insert_before(node, gemm)
    node.replace_input_with(1, gemm.outputs[0])


@wrong("output")
def cast_through_int(module):
    insert_after(module, find(module, "normed").outputs[0], ("Cast", {"to": 6}), ("Cast", {"to": 1}))


@wrong("output")
def cast_through_half_and_call_it_exact(module):
    insert_after(module, find(module, "context").outputs[0], ("Cast", {"to": 10}), ("Cast", {"to": 1}))


@wrong("output", fidelity=Fidelity.ROUNDING)
def cast_through_bfloat_and_call_it_rounding(module):
    # The casts make bfloat16 the coarsest format, but it was not before: the pass must have said LOSSY.
    insert_after(module, find(module, "normed").outputs[0], ("Cast", {"to": 16}), ("Cast", {"to": 1}))


@wrong("output")
def lose_attention_mask(module):
    skip(module, "masked")


@wrong("output")
def lose_pooling_mask(module):
    skip(module, "kept")


@wrong("output")
def overwrite_shared_weight(module):
    """Scale folded into the query's projection, which is the key's too."""
    set_weight(module, "shared", weight(module, "shared") / np.float32(4))
    skip(module, "scores")


@wrong("read-only")
def write_into_shared_memory(module):
    module.graph.initializers["head_bias"].const_value.numpy()[...] = 0


@wrong("output")
def drop_residual(module):
    skip(module, "residual")


@wrong("output")
def remove_relu(module):
    skip(module, "activated")


@wrong("output")
def mean_instead_of_sum(module):
    node = find(module, "count")
    mean = ir.node("ReduceMean", node.inputs, {"keepdims": 1}, name="mean")
    mean.outputs[0].name = "count_mean"
    module.graph.insert_before(node, mean)
    node.outputs[0].replace_all_uses_with(mean.outputs[0])
    module.graph.remove(node, safe=True)


@wrong("output")
def max_pool_for_average_pool(module):
    node = find(module, "pooled")
    other = ir.node("GlobalMaxPool", node.inputs, name="max_pool")
    other.outputs[0].name = "max_pooled"
    module.graph.insert_before(node, other)
    node.outputs[0].replace_all_uses_with(other.outputs[0])
    module.graph.remove(node, safe=True)


@wrong("output")
def shift_padding(module):
    find(module, "convolved").attributes["pads"] = ir.AttrInt64s("pads", [0, 0, 2, 2])


@wrong("output")
def drop_clip_bound(module):
    find(module, "clipped").replace_input_with(2, None)


@wrong("output")
def scale_twice(module):
    set_weight(module, "head_weight", weight(module, "head_weight") * 0.5)


@wrong("output")
def divide_by_wrong_root(module):
    set_weight(module, "root", np.float32(16))


@wrong("output")
def swap_rows_of_table(module):
    set_weight(module, "table", weight(module, "table")[::-1].copy())


@wrong("output 'label'")
def take_last_of_equal_maxima_and_least(module):
    node = find(module, "label")
    other = ir.node("ArgMin", node.inputs, {"axis": 1, "keepdims": 0}, name="argmin")
    module.graph.insert_before(node, other)
    other.outputs[0].name, node.outputs[0].name = "label", "old_label"
    other.outputs[0].shape, other.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    module.graph.outputs[1] = other.outputs[0]
    module.graph.remove(node, safe=True)


@wrong("output")
def noise_on_weights(module):
    rng = np.random.default_rng(0)
    array = weight(module, "value_weight")
    set_weight(module, "value_weight", array + rng.standard_normal(array.shape).astype(np.float32) * 1e-4)


@wrong("output", fidelity=Fidelity.ROUNDING)
def round_weights_to_eight_bits_and_call_it_rounding(module):
    array = weight(module, "head_weight")
    step = np.abs(array).max() / 127
    set_weight(module, "head_weight", (np.round(array / step) * step).astype(np.float32))


@wrong("NaN or infinity")
def nan_from_zero_by_zero(module):
    set_weight(module, "half", np.float32(np.nan))


@wrong("NaN or infinity", fidelity=Fidelity.LOSSY)
def overflow_and_call_it_lossy(module):
    set_weight(module, "image_bias", weight(module, "image_bias") + np.float32(np.inf))


@wrong("no longer runs")
def bake_in_batch(module):
    set_weight(module, "row", np.array([2, 8], np.int64))


@wrong("output", model=audio_model)
def tanh_for_erf_and_call_it_exact(module):
    node = find(module, "erf")
    other = ir.node("Tanh", node.inputs, name="tanh")
    other.outputs[0].name = "tanh_out"
    module.graph.insert_before(node, other)
    node.outputs[0].replace_all_uses_with(other.outputs[0])
    module.graph.remove(node, safe=True)


@wrong("output", model=audio_model)
def swap_branches_of_if(module):
    node = find(module, "chosen")
    then, other = node.attributes["then_branch"].as_graph(), node.attributes["else_branch"].as_graph()
    node.attributes["then_branch"] = ir.AttrGraph("then_branch", other)
    node.attributes["else_branch"] = ir.AttrGraph("else_branch", then)


@wrong("output", model=audio_model)
def swap_operands_in_branch_not_taken_first(module):
    node = next(iter(find(module, "chosen").attributes["else_branch"].as_graph()))
    first, second = node.inputs
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)


@wrong("output", model=audio_model)
def drop_sequence_lengths(module):
    find(module, "state").replace_input_with(4, None)


@wrong("output", model=audio_model)
def mix_up_lstm_gates(module):
    gates = weight(module, "W").reshape(1, 4, 6, 5)
    set_weight(module, "W", gates[:, [0, 2, 1, 3]].reshape(1, 24, 5).copy())


@wrong("output", model=audio_model)
def swap_branches_of_where(module):
    node = find(module, "audio")
    first, second = node.inputs[1], node.inputs[2]
    node.replace_input_with(1, second)
    node.replace_input_with(2, first)


@wrong("output", model=fused_model)
def change_body_of_fused_function(module):
    function = next(iter(module.model.functions.values()))
    node = next(node for node in function if node.op_type == "Add")
    node.replace_input_with(1, node.inputs[0])


# --- signature --------------------------------------------------------------------------------------------------------


@wrong("the outputs are")
def lose_output(module):
    del module.graph.outputs[1]


@wrong("the outputs are")
def add_output(module):
    module.graph.outputs.append(find(module, "pooled").outputs[0])


@wrong("the outputs are")
def reorder_outputs(module):
    outputs = list(module.graph.outputs)
    module.graph.outputs[:] = outputs[::-1]


@wrong("the outputs are")
def rename_output(module):
    module.graph.outputs[2].name = "delta"


@wrong("the inputs are")
def reorder_inputs(module):
    inputs = list(module.graph.inputs)
    module.graph.inputs[:] = [inputs[1], inputs[0], inputs[2]]


@wrong("the inputs are")
def rename_input(module):
    module.graph.inputs[0].name = "ids"


@wrong("the inputs are")
def add_input(module):
    module.graph.inputs.append(ir.Value(name="extra", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1])))


@wrong("has shape")
def fix_size_of_input(module):
    module.graph.inputs[0].shape = ir.Shape([2, 7])


@wrong("type")
def change_type_of_input(module):
    module.graph.inputs[0].dtype = ir.DataType.INT32


# --- what a module says about itself ----------------------------------------------------------------------------------


@wrong("stale-shape")
def stale_shape_inside(module):
    find(module, "convolved").outputs[0].shape = ir.Shape(["batch", 8, 8, 8])


@wrong("is declared")
def stale_shape_of_output(module):
    module.graph.outputs[2].shape = ir.Shape([2, 16])


@wrong("is tensor(float16)")
def wrong_type_inside(module):
    find(module, "embedded").outputs[0].dtype = ir.DataType.FLOAT16


@wrong("says that it did not")
def change_and_deny_it(module):
    find(module, "normed").doc_string = "changed"
    return False


@wrong("nothing is different")
def change_nothing_and_claim_it(module):
    return True


@wrong("must return whether")
def return_nothing_of_use(module):
    skip(module, "activated")
    return "done"


# --- structure --------------------------------------------------------------------------------------------------------


@wrong("undefined-value")
def dangling_value(module):
    module.graph.remove(find(module, "context"))


@wrong("used-before-definition")
def cycle(module):
    find(module, "normed").replace_input_with(0, find(module, "residual").outputs[0])


@wrong("used-before-definition")
def node_moved_behind_its_user(module):
    node = find(module, "flat")
    module.graph.remove(node)
    module.graph.append(node)


@wrong("duplicate-name")
def same_value_name_twice(module):
    find(module, "convolved").outputs[0].name = "embedded"


@wrong("duplicate-node-name")
def same_node_name_twice(module):
    find(module, "convolved").name = find(module, "embedded").name


@wrong("unknown-operator")
def operator_that_does_not_exist(module):
    find(module, "activated").op_type = "Rellu"


@wrong("missing-opset")
def domain_without_import(module):
    find(module, "activated").domain = "com.example"


@wrong("undefined-function", model=fused_model)
def function_that_is_not_there(module):
    module.model.functions.clear()


@wrong("undefined-value")
def initializer_that_is_not_registered(module):
    value = ir.Value(name="loose", type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(np.float32(1)))
    find(module, "hidden").replace_input_with(0, value)


@wrong("empty-initializer")
def initializer_without_data(module):
    module.graph.initializers["half"].const_value = None


@wrong("initializer-shape")
def initializer_of_another_shape(module):
    module.graph.initializers["head_bias"].const_value = ir.tensor(np.zeros((1, 1), np.float32), name="head_bias")


@wrong("unknown-attribute")
def attribute_that_does_not_exist(module):
    find(module, "weights").attributes["axes"] = ir.AttrInt64("axes", -1)


@wrong("missing-attribute")
def required_attribute_removed(module):
    del find(module, "joined").attributes["axis"]


@wrong("arity")
def too_many_inputs(module):
    node = find(module, "activated")
    node.resize_inputs(2)
    node.replace_input_with(1, node.inputs[0])


@wrong("type")
def integers_where_floats_belong(module):
    find(module, "residual").replace_input_with(1, module.graph.inputs[0])


@wrong("raised ValueError: half-way")
def raise_half_way(module):
    skip(module, "activated")
    raise ValueError("half-way")


@wrong("RecursionError")
def recurse_for_ever(module):
    return recurse_for_ever(module)
