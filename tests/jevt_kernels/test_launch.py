"""Loading sources, lowering for CUDA, and launching on a GPU."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable
from typing import Any

import gemm_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hand_written import kernel, tanh_add, tensor

from jevt_kernels import compat, launch
from jevt_kernels.spec import Source, UnsupportedKernel


def operands(size: int = 300) -> tuple[jax.Array, jax.Array]:
    return jnp.linspace(-2, 2, size, dtype=jnp.float32), jnp.full(size, 0.5, jnp.float32)


def lower(function: Callable[..., Any], *arguments: Any) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_loaded_source_is_readable_and_shared() -> None:
    _, source = tanh_add()
    function = launch.load(source)
    assert launch.load(Source(source.text, source.entry, source.grid, source.config)) is function
    assert "libdevice.tanh" in inspect.getsource(function.fn)


def test_traceback_shows_the_generated_line() -> None:
    _, source = tanh_add()
    text = source.text.replace("@triton.jit", "raise ValueError('here')")
    with pytest.raises(ValueError, match="here") as error:
        launch.load(Source(text, "kernel", 1, source.config))
    assert "raise ValueError('here')" in "".join(traceback.format_tb(error.tb))


def test_source_without_its_entry() -> None:
    _, source = tanh_add()
    with pytest.raises(ValueError, match="expected the generated module to define 'other'"):
        launch.load(Source(source.text, "other", 1, source.config))


def test_cost_of_a_product() -> None:
    spec = gemm_kernels.product((2, 3, 4, 5), np.float32)
    assert launch.cost_estimate(spec) == {
        "bytes_accessed": 4 * 2 * (3 * 5 + 5 * 4 + 3 * 4),
        "flops": 2 * 2 * 3 * 4 * 5,
    }
    spec = gemm_kernels.every_reduction((2, 3, 4, 5))
    # Three reductions of the product or of its sums, and three operations on one row.
    reductions = 2 * 3 * 4 + 2 * 4 + 2 * 3 * 4
    assert launch.cost_estimate(spec)["flops"] == 2 * 120 + reductions + 4 + 4 + 1


def test_parameters() -> None:
    spec, _ = tanh_add()
    assert launch.parameters(spec) == (tensor((300,)),) * 3


@pytest.mark.cuda_lowering
def test_lowering_for_cuda() -> None:
    spec, source = tanh_add()
    text = lower(
        lambda x, y: launch.call(spec, x, y, source=source, compute_capability=90), *operands()
    )
    (line,) = [line for line in text.splitlines() if "custom_call" in line]
    assert "@triton_kernel_call_ffi" in line
    assert "output_tuple_indices = [1], operand_index = 1" in line
    assert "bytes_accessed\\22: 4800" in line


@pytest.mark.cuda_lowering
def test_dead_code_elimination_of_a_call() -> None:
    """JAX 0.12 calls DCE rules with an argument that jax-triton's does not take."""
    spec, source = tanh_add()

    def body(carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        updated, sign = launch.call(spec, x, carry, source=source, compute_capability=90)
        return updated, sign

    def function(x: jax.Array, y: jax.Array) -> jax.Array:
        last, _ = jax.lax.scan(body, y, x[None])
        return last

    assert "@triton_kernel_call_ffi" in lower(function, *operands())


@pytest.mark.cuda_lowering
def test_host_descriptors() -> None:
    """With Triton before 3.8, jax-triton misses a key in the metadata of TMA descriptors."""
    jax_triton = compat.import_jax_triton()
    body = "i = tl.arange(0, 64)\ntl.store(y0 + i[:, None] * 64 + i[None, :], x0.load([0, 0]))"
    _, source = kernel(body, [tensor((64, 64))], [tensor((64, 64))])

    def function(x: jax.Array) -> jax.Array:
        return jax_triton.triton_call(
            jax_triton.TensorDescriptor.from_array(x, (64, 64)),
            kernel=launch.load(source),
            out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
            grid=(1,),
            compute_capability=90,
            backend_options=compat.backend_options(90),
        )

    assert "@triton_kernel_call_ffi" in lower(function, jnp.zeros((64, 64)))


@pytest.mark.aot
def test_programs_for_other_platforms_may_contain_a_call() -> None:
    spec, source = tanh_add()

    @jax.jit
    def function(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(
            x,
            y,
            cpu=lambda x, y: y + jnp.tanh(x),
            cuda=lambda x, y: launch.call(spec, x, y, source=source)[0],
        )

    if compat.local_compute_capability() is None:
        np.testing.assert_allclose(function(*operands())[0], 0.5 + np.tanh(-2), rtol=1e-6)


def test_empty_results_need_no_launch() -> None:
    spec, source = kernel("pass", [tensor((3, 0))], [tensor((0,)), tensor((2, 0), np.int8)], grid=0)
    results = jax.jit(lambda x: launch.call(spec, x, source=source))(jnp.zeros((3, 0)))
    assert [(r.shape, r.dtype.name) for r in results] == [((0,), "float32"), ((2, 0), "int8")]


def test_bad_input() -> None:
    spec, source = tanh_add()
    x, y = operands()
    with pytest.raises(TypeError, match="expected 2 operands, got 3"):
        launch.call(spec, x, y, y, source=source)
    with pytest.raises(TypeError, match=r"operand 1 of type float32\[300\], got int32\[300\]"):
        launch.call(spec, x, y.astype(jnp.int32), source=source)
    spec, source = kernel("pass", [], [tensor((4,))], grid=2**31)
    with pytest.raises(UnsupportedKernel, match="grid of 1 to 2147483647 programs, got 2147483648"):
        launch.call(spec, source=source)
    spec, source = kernel("pass", [], [tensor((4,), np.complex64)])
    with pytest.raises(UnsupportedKernel, match="got complex64"):
        launch.call(spec, source=source)


@pytest.mark.aot
def test_old_gpu() -> None:
    spec, source = tanh_add()
    with pytest.raises(compat.UnsupportedDevice, match="got 7.0"):
        launch.call(spec, *operands(), source=source, compute_capability=70)


def test_run_without_a_gpu() -> None:
    if compat.local_compute_capability() is not None:
        pytest.skip("there is a GPU")
    spec, source = tanh_add()
    with pytest.raises(compat.UnsupportedDevice, match=r"jevt_kernels\.interpreter\.run"):
        launch.run(spec, *operands(), source=source)


@pytest.mark.interpret
def test_call_under_the_interpreter() -> None:
    spec, source = tanh_add()
    with pytest.raises(compat.UnsupportedDevice, match="Unset the variable"):
        launch.call(spec, *operands(), source=source, compute_capability=90)


@pytest.mark.gpu
def test_run() -> None:
    spec, source = tanh_add()
    x, y = operands()
    updated, sign = launch.run(spec, x, y, source=source)
    np.testing.assert_allclose(updated, y + np.tanh(x), atol=1e-5)
    np.testing.assert_array_equal(sign, np.sign(updated))
    np.testing.assert_array_equal(y, 0.5)  # XLA copies an aliased operand that is not donated


@pytest.mark.gpu
def test_call_among_other_operations() -> None:
    spec, source = tanh_add()

    @jax.jit
    def step(x: jax.Array, y: jax.Array) -> jax.Array:
        updated, sign = launch.call(spec, x + 1, 2 * y, source=source)
        return updated * sign + y

    x, y = operands()
    updated = 2 * y + np.tanh(x + 1)
    np.testing.assert_allclose(step(x, y), updated * np.sign(updated) + y, atol=1e-5)


@pytest.mark.cuda_lowering
def test_results_in_place_come_after_those_with_pointers() -> None:
    spec, source = tanh_add()
    call = functools.partial(launch.call, spec, source=source, compute_capability=90)
    x, y = operands()
    (eqn,) = jax.make_jaxpr(call)(x, y).eqns
    assert dict(eqn.params["input_output_aliases"]) == {1: 1}  # the second result, though output 0
    text = jax.jit(call).trace(x, y).lower(lowering_platforms=("cuda",)).as_text()
    assert "operand_index = 1" in text
    assert "output_tuple_indices = [1]" in text
