"""The mends for other versions of JAX, Triton and jax-triton, and the errors about versions."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import types

import jax
import pytest

from jevt_kernels import compat


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=variables | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("text", "version"),
    [("3.8.0", (3, 8)), ("3.10.1+gitabc", (3, 10)), ("0.12.0.1", (0, 12)), ("4", (4, 0))],
)
def test_parse_version(text: str, version: tuple[int, int]) -> None:
    assert compat.parse_version(text) == version


def test_importing_the_package_imports_no_triton() -> None:
    result = python("import jevt_kernels, sys; assert 'triton' not in sys.modules")
    assert result.returncode == 0, result.stderr


@pytest.fixture
def no_cache() -> None:
    compat.triton_version.cache_clear()
    compat.import_jax_triton.cache_clear()
    yield
    compat.triton_version.cache_clear()
    compat.import_jax_triton.cache_clear()


@pytest.mark.usefixtures("no_cache")
def test_triton_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    with pytest.raises(ImportError, match="expected Triton 3.6 or newer, got 3.5.1. Upgrade it"):
        compat.import_jax_triton()


@pytest.mark.usefixtures("no_cache")
def test_triton_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match="Triton, which is not installed"):
        compat.triton_version()


@pytest.mark.usefixtures("no_cache")
def test_jax_triton_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    # None makes Python's import raise ModuleNotFoundError.
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with pytest.raises(ImportError, match="jax-triton, which is not installed. Install it with"):
        compat.import_jax_triton()


@pytest.mark.parametrize("first", ["jax_triton", "jevt_kernels"])
def test_nvidia_backend_is_found_in_either_order(first: str) -> None:
    """With Triton before 3.8, jax-triton alone has a stub in its place."""
    program = (
        f"import {first}\n"
        "from jevt_kernels import compat; compat.import_jax_triton()\n"
        "from jax_triton import triton_lib\n"
        "triton_lib.make_cuda_target(90, 1)"
    )
    result = python(program)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(compat.triton_version() >= (3, 8), reason="the constant exists since 3.8")
def test_nvidia_backend_needs_the_mend() -> None:
    result = python("from jax_triton import triton_lib; triton_lib.make_cuda_target(90, 1)")
    assert "TypeError" in result.stderr


def test_mended_backend() -> None:
    library = types.SimpleNamespace(cb=types.SimpleNamespace(GPUTarget=object))
    compat._find_nvidia_backend(library)
    assert library.cb.GPUTarget("cuda", 90, 32).arch == 90
    assert library._TMA_TF32 == 11
    if compat.triton_version() >= (3, 8):
        from triton.backends.nvidia import driver

        assert library._TMA_TF32 == driver.TMA_TF32


def test_descriptor_metadata_is_completed() -> None:
    compat.import_jax_triton()
    from jax_triton import triton_lib

    class Result(triton_lib.CompilationResult):
        pass

    compat._complete_descriptors(types.SimpleNamespace(CompilationResult=Result))
    meta = dict.fromkeys(triton_lib.TensorDescMeta.__required_keys__ - {"is_im2col"}, 0)
    result = Result("", "", 0, "", "", tensordesc_meta=[meta])
    assert result.tensordesc_meta[0]["is_im2col"] is False
    with pytest.raises(ValueError, match="Missing keys"):
        Result("", "", 0, "", "", tensordesc_meta=[{}])
    assert Result("", "", 0, "", "", tensordesc_meta=None).tensordesc_meta is None


def test_dce_rule_takes_what_jax_passes() -> None:
    """Dead-code elimination keeps the call. JAX 0.12 passes one argument more than 0.11."""
    compat.import_jax_triton()
    from jax._src.interpreters import partial_eval
    from jax_triton import triton_lib

    jaxpr = jax.make_jaxpr(lambda x: x + 1)(1.0).jaxpr
    rule = partial_eval.dce_rules[triton_lib.triton_kernel_call_p]
    arguments = ([True], [True]) if compat.jax_version() >= (0, 12) else ([True],)
    used, eqn = rule(*arguments, jaxpr.eqns[0])
    assert used == [True, True]
    assert eqn is jaxpr.eqns[0]


def test_environment_survives_the_import() -> None:
    program = (
        "from jevt_kernels import compat; compat.import_jax_triton()\n"
        "import os; assert os.environ['TRITON_CACHE_DIR'] == '/somewhere'"
    )
    result = python(program, TRITON_CACHE_DIR="/somewhere")
    assert result.returncode == 0, result.stderr


def test_environment_survives_only_with_the_mend() -> None:
    program = "import jax_triton, os; assert 'TRITON_CACHE_DIR' not in os.environ"
    result = python(program, TRITON_CACHE_DIR="/somewhere")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("version", "capability", "options"),
    [
        ((3, 8), 90, {}),
        ((3, 9), 90, {"enable_fp_fusion": True, "ptx_version": 88}),
        ((3, 9), None, {"enable_fp_fusion": True, "ptx_version": 88}),
        ((3, 9), 130, {"enable_fp_fusion": True}),
    ],
)
def test_backend_options(
    version: tuple[int, int],
    capability: int | None,
    options: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "triton_version", lambda: version)
    assert compat.backend_options(capability) == options


def test_compute_capability() -> None:
    compat.check_compute_capability(80)
    with pytest.raises(compat.UnsupportedDevice, match="8.0 or higher .* got 7.5"):
        compat.check_compute_capability(75)


def test_added_warps_are_launched() -> None:
    made: list[tuple[object, ...]] = []
    bindings = types.SimpleNamespace(
        TritonKernel=lambda *arguments: made.append(arguments), other=1
    )
    library = types.SimpleNamespace(triton_kernel_call_lib=bindings)
    compat._count_warps(library)
    make = library.triton_kernel_call_lib.TritonKernel
    make("alike", 4, 1, 0, ".reqntid 128\n", "ttir", 90)
    make("specialised", 8, 1, 0, ".maxntid 640\n.reqntid 640\n", "ttir", 90)
    make("elsewhere", 4, 1, 0, "/tmp/kernel.hsaco", "ttir", 0)
    assert [(name, warps) for name, warps, *_ in made] == [
        ("alike", 4),
        ("specialised", 20),
        ("elsewhere", 4),
    ]
    assert library.triton_kernel_call_lib.other == 1
