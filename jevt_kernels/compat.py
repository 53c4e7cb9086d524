"""The only file of ``jevt_kernels`` that touches private parts of JAX, jax-triton and Triton.

Supported: JAX 0.11 and 0.12, Triton 3.6 to 3.9, jax-triton 0.4. The combination JAX 0.11.2, Triton
3.8 and jax-triton 0.4.1 works as it is; :func:`import_jax_triton` applies these mends, each only
where it is needed:

============================  ==================  =================================================
mend                          where               without it
============================  ==================  =================================================
:func:`_find_nvidia_backend`  Triton < 3.8        jax-triton takes the NVIDIA backend for missing
:func:`_complete_descriptors` Triton < 3.8        host TMA descriptors are rejected
:func:`_adapt_dce_rule`       JAX >= 0.12         dead-code elimination of a kernel raises TypeError
:func:`_keep_environment`     always              importing jax-triton unsets ``TRITON_CACHE_DIR``
:func:`backend_options`       Triton >= 3.9       PTX that CUDA 12 rejects; a warning a process
:func:`_check_shared_memory`  always              a kernel that wants too much aborts the program
:func:`_compile_gluon`        always              Gluon's kernels get other layouts, and spill
:func:`_count_warps`          always              a warp-specialised kernel lacks the added warps
============================  ==================  =================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax._src import core as _core
from jax.extend.core import DebugInfo, Jaxpr, JaxprEqn, Var

from jevt_kernels.spec import UnsupportedKernel

MINIMUM_TRITON = (3, 6)
MINIMUM_CAPABILITY = 80

# PTX 8.8 is what ptxas 12.9 reads. It knows every GPU up to sm_121.
_PTX_VERSION = 88
_PTX_VERSION_CAPABILITY = 121

# CUDA's code for float32 that TMA rounds to tf32 (CU_TENSOR_MAP_DATA_TYPE_TFLOAT32).
_TMA_TF32 = 11

#: Held while modules of Triton are imported: they import each other in circles, in which two
#: threads that import two of them are caught.
importing = threading.RLock()


class UnsupportedDevice(RuntimeError):
    """There is no GPU that the kernels can run on; the message says why."""


def make_jaxpr(invars: Sequence[Var], outvars: Sequence[Any], eqns: Sequence[JaxprEqn]) -> Jaxpr:
    """A jaxpr without constants, its effects joined from its equations."""
    effects = _core.join_effects(*(eqn.effects for eqn in eqns))
    debug = DebugInfo("jevt", "group", ("",) * len(invars), ("",) * len(outvars))
    return Jaxpr([], list(invars), list(outvars), list(eqns), effects, debug_info=debug)


# Versions and devices


def parse_version(text: str) -> tuple[int, int]:
    """``(major, minor)`` of a version such as ``"3.8.0+git1234"``."""
    numbers = re.findall(r"\d+", text)
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0


def jax_version() -> tuple[int, int]:
    """``(major, minor)`` of JAX."""
    return parse_version(jax.__version__)


@functools.cache
def triton_version() -> tuple[int, int]:
    """Version of the installed Triton, which is not imported.

    Raises:
      ImportError: if Triton is missing or too old.
    """
    try:
        text = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            "jevt's kernels need Triton, which is not installed. Install it with jevt's "
            'dependencies: pip install "jevt[cuda12]" or "jevt[cuda13]".'
        ) from None
    version = parse_version(text)
    if version < MINIMUM_TRITON:
        wanted = ".".join(map(str, MINIMUM_TRITON))
        raise ImportError(
            f"expected Triton {wanted} or newer, got {text}. Upgrade it: "
            f'pip install --upgrade "triton>={wanted}"'
        )
    return version


def local_compute_capability() -> int | None:
    """Compute capability of the first visible CUDA GPU as jax-triton counts it (90 for sm_90).

    None where JAX sees no CUDA GPU.
    """
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    if not devices:
        return None
    major, minor = parse_version(str(devices[0].compute_capability))
    return 10 * major + minor


def check_compute_capability(capability: int) -> None:
    """Raises :class:`UnsupportedDevice` for a GPU that is too old for the generated kernels."""
    if capability < MINIMUM_CAPABILITY:
        raise UnsupportedDevice(
            f"expected a GPU of compute capability {MINIMUM_CAPABILITY / 10} or higher (A100 or "
            f"newer), got {capability / 10}. Use a newer GPU, or run without Triton kernels: "
            'jevt.jit(backend="xla").'
        )


#: Bytes of shared memory that a thread block may have, by compute capability (CUDA C++ Programming
#: Guide, technical specifications).
_SHARED_BYTES = {
    80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10,
    90: 227 << 10, 100: 227 << 10, 120: 99 << 10,
}  # fmt: skip


def shared_memory_limit(capability: int) -> int:
    """Bytes of shared memory that a thread block may have, 90 for sm_90."""
    older = [known for known in _SHARED_BYTES if known <= capability]
    return _SHARED_BYTES[max(older, default=min(_SHARED_BYTES))]


def backend_options(capability: int | None) -> dict[str, Any]:
    """Options for Triton's CUDA backend that give the same code with every version of Triton.

    Triton 3.9 emits a PTX version that ptxas and drivers of CUDA 12 reject, and warns that it will
    not contract ``a * b + c`` to one instruction by default.

    Args:
      capability: of the target GPU, or None if it is not known yet.
    """
    if triton_version() < (3, 9):
        return {}
    options: dict[str, Any] = {"enable_fp_fusion": True}
    if capability is None or capability <= _PTX_VERSION_CAPABILITY:
        options["ptx_version"] = _PTX_VERSION
    return options


# jax-triton


@functools.cache
def import_jax_triton() -> ModuleType:
    """Imports jax-triton, mended for the installed versions of JAX and Triton.

    Raises:
      ImportError: if jax-triton or Triton is missing, or Triton is too old.
    """
    version = triton_version()
    try:
        with importing, _keep_environment("TRITON_CACHE_DIR"):
            jax_triton = importlib.import_module("jax_triton")
            library = importlib.import_module("jax_triton.triton_lib")
    except ModuleNotFoundError as error:
        if error.name != "jax_triton":
            raise
        raise ImportError(
            "jevt runs its kernels through jax-triton, which is not installed. Install it with "
            'pip install "jax-triton>=0.4.1,<0.5", or run without Triton kernels: '
            'jevt.jit(backend="xla").'
        ) from None
    _find_nvidia_backend(library)
    _check_shared_memory(library)
    _compile_gluon(library)
    _count_warps(library)
    if version < (3, 8):
        _complete_descriptors(library)
    if jax_version() >= (0, 12):
        _adapt_dce_rule(library)
    return jax_triton


def shared_layout(block: Sequence[int], dtype: str) -> Any:
    """Gluon's layout in shared memory of a tile that is copied through a tensor descriptor.

    Args:
      block: shape of the tile.
      dtype: Triton's abbreviation of its type, "bf16".
    """
    with importing:
        language: Any = importlib.import_module("triton.experimental.gluon.language")
    types = {
        "bf16": language.bfloat16,
        "fp16": language.float16,
        "fp32": language.float32,
    }
    return language.NVMMASharedLayout.get_default_for(list(block), types[dtype])


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Result:
    """A result, in the place of the array that a descriptor describes."""

    dtype: np.dtype


def call_with_descriptors(
    kernel: Any,
    operands: Sequence[tuple[jax.Array, Mapping[str, Any] | None]],
    results: Sequence[tuple[jax.ShapeDtypeStruct, Mapping[str, Any] | None]],
    constants: Mapping[str, Any],
    *,
    grid: int,
    name: str,
    num_warps: int,
    compute_capability: int,
    cost_estimate: Mapping[str, int],
) -> list[jax.Array]:
    """As ``jax_triton.triton_call``, which makes descriptors of operands only.

    jaxlib makes one of what comes next, of operands and then results, so results can have them too:
    what hinders is that ``triton_call`` counts them.

    Args:
      kernel: a function whose parameters are operands, results and constants.
      operands: arrays, each with its descriptor's shape, strides, block_shape and layout; None for
        a pointer.
      results: their types, likewise.
      constants: the ``constexpr`` parameters.
      grid: number of programs.
      name: what profiles call the launch.
      num_warps: that are asked for.
      compute_capability: of the GPU, 90 for sm_90.
      cost_estimate: bytes_accessed and flops.

    Raises:
      ImportError: as :func:`import_jax_triton` does.
    """
    import_jax_triton()
    library: Any = importlib.import_module("jax_triton.triton_lib")
    parameters = [
        array if view is None else library.TensorDescriptor(array, **view)
        for array, view in operands
    ]
    parameters += [
        library._OutputPlaceholder(i)
        if view is None
        else library.TensorDescriptor(_Result(np.dtype(result.dtype)), **view)
        for i, (result, view) in enumerate(results)
    ]
    arrays, tree = jax.tree_util.tree_flatten(parameters)
    options = {"num_warps": num_warps, "num_stages": 1, "num_ctas": 1}
    frozen = library.FrozenDict
    return list(
        library.triton_kernel_call_p.bind(
            *arrays,
            fn=kernel,
            name=name,
            in_tree=tree,
            out_shapes=tuple(result for result, _ in results),
            grid=(grid,),
            compute_capability=compute_capability,
            backend_options=frozen({**backend_options(compute_capability), **options}),
            input_output_aliases=frozen({}),
            zeroed_outputs=(),
            serialized_metadata=b"",
            cost_estimate=frozen(dict(cost_estimate)),
            has_side_effect=False,
            metaparams=frozen(dict(constants)),
        )
    )


def ast_source(kernel: Any) -> Any:
    """The class of Triton's sources of a kernel's kind: Triton's own, or Gluon's."""
    with importing:
        if kernel.is_gluon():
            return importlib.import_module("triton.experimental.gluon._runtime").GluonASTSource
        return importlib.import_module("triton.compiler").ASTSource


def _find_nvidia_backend(library: Any) -> None:
    """Gives jax-triton the NVIDIA backend where it took it for missing.

    It imports the backend together with a constant, ``TMA_TF32``, that Triton has since 3.8 only;
    without it, it puts a stub in the backend's place and every call fails with an unrelated
    TypeError. Mending its namespace afterwards works in whatever order the two were imported.
    """
    if not isinstance(library.cb, SimpleNamespace):
        return
    driver = importlib.import_module("triton.backends.nvidia.driver")
    library.cb = importlib.import_module("triton.backends.nvidia.compiler")
    library._TMA_DTYPE_DEVICE_TO_HOST = driver.TMA_DTYPE_DEVICE_TO_HOST
    library._TMA_TF32 = _TMA_TF32


def _complete_descriptors(library: Any) -> None:
    """Adds ``is_im2col`` to the metadata of TMA descriptors, where Triton has it since 3.8 only."""
    check = library.CompilationResult.__post_init__

    def complete_and_check(self: Any) -> None:
        for meta in self.tensordesc_meta or ():
            meta.setdefault("is_im2col", False)
        check(self)

    library.CompilationResult.__post_init__ = complete_and_check


def _adapt_dce_rule(library: Any) -> None:
    """Lets jax-triton's DCE rule take the inputs' liveness, which JAX 0.12 passes in the middle."""
    rules = library.pe.dce_rules
    rule = rules[library.triton_kernel_call_p]
    if len(inspect.signature(rule).parameters) != 2:
        return

    def rule_with_liveness(used_outputs: list[bool], live_inputs: list[bool], eqn: Any) -> Any:
        del live_inputs
        return rule(used_outputs, eqn)

    rules[library.triton_kernel_call_p] = rule_with_liveness


def _check_shared_memory(library: Any) -> None:
    """Refuses a kernel that wants more shared memory than the GPU has when it is compiled.

    jax-triton leaves that to the launch, whose failure is that of the whole program.
    """
    compile_ptx = library.compile_ttir_to_ptx_inplace

    def compile_and_check(ttir: Any, backend: Any, options: Any, capability: int) -> Any:
        result = compile_ptx(ttir, backend, options, capability)
        limit = shared_memory_limit(capability)
        if result.shared_mem_bytes > limit:
            raise UnsupportedKernel(
                f"kernel {result.name}: expected at most {limit} bytes of shared memory on a GPU "
                f"of compute capability {capability / 10}, got {result.shared_mem_bytes}. Use "
                "smaller blocks or fewer stages."
            )
        return result

    library.compile_ttir_to_ptx_inplace = compile_and_check


def _compile_gluon(library: Any) -> None:
    """Has Gluon's kernels compiled by Gluon's passes.

    jax-triton runs Triton's on them, which choose layouts anew: correct, but such kernels were
    seen to spill two thousand bytes and to take eight times as long.
    """
    compile_ptx = library.compile_ttir_to_ptx_inplace

    def compile_by_kind(module: Any, backend: Any, options: Any, capability: int) -> Any:
        # Triton's own modules know of warps only after the passes that are left out here.
        if module.get_int_attr("ttg.num-warps") is not None:
            backend = _GluonBackend(backend)
        return compile_ptx(module, backend, options, capability)

    library.compile_ttir_to_ptx_inplace = compile_by_kind


class _GluonBackend:
    """Triton's NVIDIA backend with Gluon's passes in the place of Triton's."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def make_ttir(self, module: Any, *arguments: Any) -> Any:
        del arguments
        return module

    def make_ttgir(self, module: Any, *arguments: Any) -> Any:
        return self._backend.gluon_to_ttgir(module, *arguments)


def _count_warps(library: Any) -> None:
    """Launches a kernel whose warps have different tasks with all of them.

    jax-triton launches as many warps as were asked for; the compiler adds those of other tasks and
    says in the assembly how many threads there are.
    """
    bindings = library.triton_kernel_call_lib
    make_kernel = bindings.TritonKernel

    def make_with_all_warps(name: str, num_warps: int, *arguments: Any) -> Any:
        ptx = next((a for a in arguments if isinstance(a, str) and ".reqntid" in a), "")
        if threads := re.search(r"\.reqntid\s+(\d+)", ptx):
            num_warps = int(threads[1]) // 32
        return make_kernel(name, num_warps, *arguments)

    library.triton_kernel_call_lib = SimpleNamespace(
        **{**vars(bindings), "TritonKernel": make_with_all_warps}
    )


@contextlib.contextmanager
def _keep_environment(name: str) -> Iterator[None]:
    """Restores an environment variable on exit."""
    value = os.environ.get(name)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


# Triton's interpreter


def interpreting() -> bool:
    """Whether Triton was imported with ``TRITON_INTERPRET=1``. Imports Triton.

    The variable must be set before the import, because Triton's own library functions are
    decorated then; so the answer is read off one of them, not off the environment.
    """
    language = importlib.import_module("triton.language")
    jit = importlib.import_module("triton.runtime.jit")
    return not isinstance(language.cdiv, jit.JITFunction)


def _dot_of_bfloat16(interpreter: Any) -> Callable[..., Any]:
    """The interpreter's matrix product, which would multiply the bits of bfloat16 as integers."""
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, lhs: Any, rhs: Any, accumulator: Any, *precision: Any) -> Any:
        if not (lhs.dtype.scalar.is_bf16() and lhs.data.dtype == np.uint16):
            return original(self, lhs, rhs, accumulator, *precision)
        # A bfloat16 is the upper half of a float32.
        x, y = ((h.data.astype(np.uint32) << 16).view(np.float32) for h in (lhs, rhs))
        sums = np.matmul(x, y, dtype=accumulator.data.dtype) + accumulator.data
        return interpreter.TensorHandle(sums, accumulator.dtype.scalar)

    create_dot.original = original  # type: ignore[attr-defined]
    return create_dot


def _splat_of_comparison(interpreter: Any) -> Callable[..., Any]:
    """The interpreter's broadcast of a scalar, which would make numbers of a comparison's result.

    It gives results of comparisons the type of what was compared, and only their data is boolean.
    """
    original = interpreter.InterpreterBuilder.create_splat

    def create_splat(self: Any, shape: Any, scalar: Any) -> Any:
        result = original(self, shape, scalar)
        if scalar.data.dtype == np.bool_:
            return interpreter.TensorHandle(result.data.astype(np.bool_), result.dtype.scalar)
        return result

    create_splat.original = original  # type: ignore[attr-defined]
    return create_splat


def _move_in_assembly(interpreter: Any) -> Callable[..., Any]:
    """Assembly in the interpreter, which has none; our kernels move a number that they pass."""
    original = interpreter.InterpreterBuilder.create_inline_asm

    def create_inline_asm(
        self: Any, text: str, constraints: str, values: Any, types: Any, pure: bool, pack: int
    ) -> Any:
        if not text.startswith("mov.b32 $0, "):
            return original(self, text, constraints, values, types, pure, pack)
        return SimpleNamespace(get_result=values.__getitem__)

    create_inline_asm.original = original  # type: ignore[attr-defined]
    return create_inline_asm


def supply_interpreter_functions(functions: Mapping[str, Callable[..., np.ndarray]]) -> None:
    """Makes libdevice callable in the interpreter, which has no external functions of its own.

    Mends what else the interpreter refuses or computes wrongly.

    Args:
      functions: NumPy functions by libdevice symbol (``"__nv_tanhf"``). Their results are cast to
        the type that Triton declares for the symbol.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    libdevice = importlib.import_module("triton.language.extra.cuda.libdevice")
    stubs = importlib.import_module("triton.language.extra.libdevice")
    core = importlib.import_module("triton.language.core")

    def create_extern_elementwise(
        self: Any, name: str, path: str, symbol: str, args: Any, result: Any, pure: bool
    ) -> Any:
        del self, name, path, pure
        if symbol not in functions:
            raise NotImplementedError(
                f"libdevice function {symbol} has no counterpart in jevt_kernels/interpreter.py"
            )
        data = functions[symbol](*(argument.data for argument in args))
        dtype = interpreter._get_np_dtype(result)
        return interpreter.TensorHandle(np.asarray(data).astype(dtype), result.scalar)

    interpreter.InterpreterBuilder.create_extern_elementwise = create_extern_elementwise
    interpreter.InterpreterBuilder.create_dot = _dot_of_bfloat16(interpreter)
    interpreter.InterpreterBuilder.create_splat = _splat_of_comparison(interpreter)
    interpreter.InterpreterBuilder.create_inline_asm = _move_in_assembly(interpreter)
    for name, member in inspect.getmembers(libdevice):
        if core.is_builtin(member):
            bound = functools.partial(member, _semantic=interpreter.interpreter_semantic)
            setattr(libdevice, name, bound)
            setattr(stubs, name, bound)
