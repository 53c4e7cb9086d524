"""FLOPs and bytes counted from jaxprs."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import registry
from benchmarks.cost import Work, count_work
from benchmarks.options import Options


def test_matmul():
    a, b = jnp.zeros((8, 16), jnp.bfloat16), jnp.zeros((16, 4), jnp.bfloat16)
    border = 2 * (8 * 16 + 16 * 4 + 8 * 4)
    assert count_work(jnp.matmul, a, b) == Work(2 * 8 * 16 * 4, 2 * border)


def test_on_chip_intermediates_cost_nothing():
    x = jnp.zeros((8, 16))

    def fun(x):
        return (x @ x.T) @ x

    kept = count_work(fun, x, on_chip=lambda aval: aval.shape == (8, 8))
    assert count_work(fun, x).bytes - kept.bytes == 2 * 8 * 8 * 4


def test_scan_counts_its_length():
    x = jnp.zeros((8, 8))

    def fun(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0]

    assert count_work(fun, x).flops == 5 * 2 * 8**3


@pytest.mark.parametrize("stride", [1, 2])
def test_backward_convolution_costs_twice_the_forward(stride):
    x, w = jnp.zeros((2, 8, 8, 4)), jnp.zeros((2, 2, 4, 6))

    def conv(x, w):
        dimensions = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        return jax.lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=dimensions)

    forward = count_work(conv, x, w).flops
    both = count_work(lambda x, w: jax.vjp(conv, x, w)[1](conv(x, w)), x, w).flops
    out = 8 // stride
    assert forward == 2 * (2 * out * out * 6) * (2 * 2 * 4)
    assert both == pytest.approx(4 * forward)  # two forward, dgrad, wgrad


@pytest.mark.parametrize(("name", "teraflops"), [("bert", 35.3), ("vit", 17.7), ("resnet", 3.13)])
def test_full_size_models(name, teraflops):
    """6 × parameters × tokens, and attention: what the models must cost by hand."""
    work = registry.make(name, Options()).work()
    assert work.flops / 1e12 == pytest.approx(teraflops, rel=0.01)
