"""From an IRModule of Relax functions and kernels to a library with machine code of a GPU inside.

TVM writes CUDA C++ for the device and would keep it as text, to be compiled where it runs. Here it is compiled at once,
and the image takes the place of the text in what TVM's runtime reads: ``[format][functions][code]``, where the format
``cubin`` means an image for the driver.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
import struct
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.tirx import compilation_pipeline

from mmopt.backends.cpu.joined_run import Ordered, in_memory_of
from mmopt.backends.cpu.joining import join_kernels
from mmopt.backends.cpu.pipeline import legalize, plain
from mmopt.backends.cuda.compiler import Compiled, compile_source, fat_binary
from mmopt.backends.cuda.launching import launches, takes_memory
from mmopt.backends.cuda.resources import described
from mmopt.backends.cuda.together import side_by_side
from mmopt.backends.linking import Library, linker_for
from mmopt.backends.profile import Profile
from mmopt.errors import BackendError
from mmopt.runtime.artifact import Order

_CPU, _CUDA = 1, 2  # DLPack's kinds of devices
_BOUNDED = re.compile(r"__launch_bounds__\((\d+)\) (\w+)\(")
_FIRST_KERNEL = 'extern "C" __global__'
DEVICE_CODE = ("products.cuh", "attention.cuh", "weights.cuh")
"""Files with functions that templates call, in the order in which they are included."""
_PLACEHOLDER = b"mmopt: machine code goes here"


@dataclasses.dataclass
class Generated:
    """What code generation gives.

    Attributes:
        executable: The virtual machine's code and the host's, with the device's kernels imported as source text.
        source: CUDA C++ of all kernels.
        workspace: Bytes of device memory that a call needs.
        repeatable: As in :class:`mmopt.backends.linking.Library`.
        together: For kernels that are launched with others, the name of what launches them.
    """

    executable: relax.VMExecutable
    source: str
    workspace: int
    repeatable: dict[str, Order]
    together: dict[str, str] = dataclasses.field(default_factory=dict)


def target_of(profile: Profile) -> tvm.target.Target:
    """TVM's form of a CUDA profile."""
    device = {
        "kind": "cuda",
        "arch": f"sm_{profile.sm}",
        "max_threads_per_block": 1024,
        "max_shared_memory_per_block": profile.shared_bytes,
        "thread_warp_size": 32,
    }
    return tvm.target.Target(device, host={"kind": "llvm", "mtriple": profile.triple})


def _lowering(device: int) -> tuple[tvm.transform.Pass, object, object]:
    """TVM's passes from kernels to host and device code. Loops are not vectorized: threads are the lanes."""
    from tvm import s_tir

    _, host, finish_device = compilation_pipeline.get_tir_pipeline("s_tir")
    homes = tirx.transform.prim_func_pass(lambda f, module, context: _at_home(f, device), opt_level=0)
    passes = [
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.VectorizeLoop(False),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.FP8ComputeLegalize(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        homes,
        tirx.transform.MakePackedAPI(),
        tirx.transform.FP8StorageLegalize(),
        tirx.transform.BF16StorageLegalize(),
    ]
    return tvm.transform.Sequential(passes), host, finish_device


def _at_home(function: tirx.PrimFunc, device: int) -> tirx.PrimFunc:
    """Says of host functions where their temporaries are; for the emulator, that their tensors are the CPU's."""
    target = function.attrs.get("target") if function.attrs else None
    if target is None or target.kind.name != "cuda" or target.host is None or "calling_conv" in function.attrs:
        return function
    function = function.with_body(in_memory_of(device, function.body))
    return function if device == _CUDA else function.with_attr("target", target.host.with_host(target.host))


compilation_pipeline.register_tir_pipeline("mmopt-cuda", lambda: _lowering(_CUDA))
compilation_pipeline.register_tir_pipeline("mmopt-cuda-emulated", lambda: _lowering(_CPU))


def generate(
    module: tvm.IRModule, profile: Profile, kernels: Sequence[str], *, emulated: bool = False, batched: bool = True
) -> Generated:
    """Generate code for host and device.

    Args:
        module: Relax functions and the kernels they call.
        profile: A ``cuda`` profile.
        kernels: Names of the kernels.
        emulated: Tensors are in the CPU's memory, for an emulator that runs the kernels there.
        batched: Small kernels share launches; see :func:`~.together.side_by_side`.

    Raises:
        BackendError: Code generation failed.
    """
    target = target_of(profile)
    try:
        with target, tvm.transform.PassContext(opt_level=3, config={"tirx.disable_vectorize": True}), _source_only():
            calling, together = side_by_side(plain(module), profile) if batched else (plain(module), {})
            joined = join_kernels(calling, {name: n for n, name in enumerate(kernels)}, on_device=takes_memory)
            lowered = legalize()(joined.module)
            name = "mmopt-cuda-emulated" if emulated else "mmopt-cuda"
            nothing = tvm.transform.Sequential([])
            executable = relax.build(lowered, target=target, relax_pipeline=nothing, tir_pipeline=name)
    except (RuntimeError, ValueError, TypeError) as error:
        raise BackendError(f"code generation failed: {error}", where=f"target {profile.name}") from error
    sources = [m.inspect_source("cuda") for m in _device_modules(executable.mod)]
    repeatable = {name: _order(joined.module, steps) for name, steps in joined.repeatable.items()}
    return Generated(executable, sources[0] if sources else "", joined.workspace, repeatable, together)


def _order(module: tvm.IRModule, steps: Sequence[Ordered]) -> Order:
    """How many kernels each step launches, and what it waits for; nothing where that depends on sizes."""
    counts = [launches(module[step.kernel].body) for step in steps]
    if any(count is None for count in counts):
        return ()
    return tuple((count or 0, step.after) for count, step in zip(counts, steps, strict=True))


def with_device_code(source: str) -> str:
    """Generated ``source`` with the functions it calls in front of its kernels.

    The compiler would rather spill a few registers of a template than keep blocks off a multiprocessor; it is told that
    one will do.
    """
    if "mmopt_" not in source:
        return source
    start = source.index(_FIRST_KERNEL)
    folder = pathlib.Path(__file__).parent / "kernels"
    code = "".join((folder / name).read_text(encoding="utf-8") for name in DEVICE_CODE)
    first, *parts = re.split(_BOUNDED, source[start:])
    bodies = list(zip(parts[::3], parts[1::3], parts[2::3], strict=True))
    templates = {name for _, name, body in bodies if "mmopt_" in body}
    written = [f"__launch_bounds__({n}{', 1' if name in templates else ''}) {name}({body}" for n, name, body in bodies]
    return source[:start] + code + first + "".join(written)


@contextlib.contextmanager
def _source_only() -> Iterator[None]:
    """Where TVM's CUDA runtime is loaded it would compile the text at once, for the GPU it finds; not inside this."""
    name = "tvm_callback_cuda_compile"
    before = tvm_ffi.get_global_func(name, allow_missing=True)
    tvm_ffi.register_global_func(name, lambda *_: _PLACEHOLDER, override=True)
    try:
        yield
    finally:
        if before is not None:
            tvm_ffi.register_global_func(name, before, override=True)


def _device_modules(module: Any) -> list[Any]:
    found = [m for m in module.imports if m.kind == "cuda"]
    return found + [inner for m in module.imports for inner in _device_modules(m)]


def generate_kernel(function: tirx.PrimFunc, profile: Profile, *, emulated: bool = False) -> Generated:
    """Host and device code of one kernel, called ``kernel``; as :func:`generate`.

    Args:
        function: The kernel: host code that launches, for tensors in a GPU's memory.
        profile: A ``cuda`` profile.
        emulated: As in :func:`generate`.
    """
    target = target_of(profile)
    name = "mmopt-cuda-emulated" if emulated else "mmopt-cuda"
    with target, tvm.transform.PassContext(opt_level=3, config={"tirx.disable_vectorize": True}), _source_only():
        module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
        executable = tvm.compile(module, target=target, tir_pipeline=name)
    sources = [m.inspect_source("cuda") for m in _device_modules(executable.mod)]
    return Generated(executable, sources[0] if sources else "", 0, {})


def build_kernel(function: tirx.PrimFunc, profile: Profile, *, spills: bool = False) -> bytes:
    """A shared library with one kernel, called ``kernel``, and its machine code.

    Args:
        function: As in :func:`generate_kernel`.
        profile: A ``cuda`` profile.
        spills: Registers may be spilled.

    Raises:
        UserError: NVIDIA's compiler is not installed.
        BackendError: Code generation, compiling or linking failed, or there are not registers enough.
    """
    made = generate_kernel(function, profile)
    if not made.source:
        return link(made, b"", profile)
    compiled = compiled_kernels(made, profile.sm)
    spilled = sum(taken.spills for taken in compiled.resources.values())
    if spilled and not spills:
        raise BackendError(f"{spilled} bytes do not find a register", where=f"target {profile.name}")
    return link(made, fat_binary([compiled]), profile)


def build_library(module: tvm.IRModule, profile: Profile, kernels: Sequence[str]) -> Library:
    """Compile ``module`` and link it, with a fat binary for ``profile`` inside.

    Args:
        module: Relax functions and the kernels they call.
        profile: A ``cuda`` profile.
        kernels: Names of the kernels.

    Returns:
        The shared library, the bytes of device memory that a call needs, and what kernels take of a multiprocessor.

    Raises:
        UserError: NVIDIA's compiler is not installed.
        BackendError: Code generation, compiling or linking failed.
    """
    made = generate(module, profile, kernels)
    if not made.source:
        return Library(link(made, b"", profile), made.workspace, repeatable=made.repeatable)
    compiled = compiled_kernels(made, profile.sm)
    taken = described(compiled.resources, made.source, profile)
    launchers = {name: made.together.get(name, name) for name in kernels}
    facts = {name: {"device": taken[by]} for name, by in launchers.items() if by in taken}
    return Library(link(made, fat_binary([compiled]), profile), made.workspace, facts, made.repeatable)


def compiled_kernels(generated: Generated, sm: int) -> Compiled:
    """Machine code of generated kernels, with what they take."""
    return compile_source(with_device_code(generated.source), sm)


def link(generated: Generated, image: bytes, profile: Profile) -> bytes:
    """The shared library of ``generated``, with ``image`` for the text of its kernels.

    Raises:
        BackendError: Linking failed.
    """

    def pack(module: Any, is_system_library: bool, prefix: str, folder: str) -> str:
        blob = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
        packed = with_image(blob, image, generated.source) if image else blob
        code = tvm_ffi.get_global_func("codegen.codegen_blob")
        host = json.dumps({"kind": "llvm", "mtriple": profile.triple})
        path = pathlib.Path(folder, "devc.o")
        code(packed, is_system_library, host, prefix).write_to_file(str(path))
        return str(path)

    with tempfile.TemporaryDirectory(prefix="mmopt-") as folder:
        path = pathlib.Path(folder, "lib.so")
        try:
            generated.executable.export_library(str(path), fcompile=linker_for(profile), fpack_imports=pack)
        except (RuntimeError, ValueError, TypeError) as error:
            raise BackendError(f"linking failed: {error}", where=f"target {profile.name}") from error
        return path.read_bytes()


def with_image(blob: bytes, image: bytes, source: str) -> bytes:
    """A library's packed modules with ``image`` where the CUDA module has its source text.

    The layout, all numbers 64-bit little-endian: bytes that follow; then, among others, the string ``cuda`` and a
    string that is the module: the string ``cuda`` (its format), the table of functions, the string of the text. A
    string is its length and its bytes.

    Args:
        blob: What TVM packs.
        image: A fat binary.
        source: The text.

    Raises:
        BackendError: The layout is another.
    """
    start = blob.find(_string(b"cuda"))
    head = start + len(_string(b"cuda"))
    if start < 0:
        raise BackendError("there are no CUDA kernels among the library's modules")
    (size,) = struct.unpack_from("<Q", blob, head)
    body = blob[head + 8 : head + 8 + size]
    for form, text in ((b"cuda", source.encode()), (b"cubin", _PLACEHOLDER)):
        if body.startswith(_string(form)) and body.endswith(_string(text)):
            functions = body[len(_string(form)) : -len(_string(text))]
            break
    else:
        raise BackendError("TVM packs CUDA modules in a way this version of mmopt does not know")
    module = _string(b"cubin") + functions + _string(image)
    whole = blob[8:head] + _string(module) + blob[head + 8 + size :]
    return struct.pack("<Q", len(whole)) + whole


def _string(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data
