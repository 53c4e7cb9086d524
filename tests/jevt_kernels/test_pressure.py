"""What kernels want of registers: counted, and against what the compiler makes of it."""

import jax
import jax.numpy as jnp
import pytest

from jevt.lowering import spec as lowering
from jevt.lowering.errors import NotFusible
from jevt_kernels import aot, pressure
from jevt_kernels.mainloops import MAINLOOPS


def spec_of(function, count, monkeypatch, shape=(4096, 1024), dtype="bfloat16"):
    """The kernel of a function of so many tensors, whatever it wants."""
    monkeypatch.setattr(pressure, "MOST", 1 << 30)
    jaxpr = jax.make_jaxpr(function)(*[jax.ShapeDtypeStruct(shape, dtype)] * count)
    return lowering.build(jaxpr, "kernel")


def total(*tensors):
    return sum(x.astype(jnp.float32) for x in tensors)


def centred(*tensors):
    """Every operand is read before the sum along rows, and after it."""
    mean = total(*tensors).mean(-1, keepdims=True)
    return sum(jnp.abs(x.astype(jnp.float32) - mean) for x in tensors)


def test_a_sum_of_many_needs_few_at_a_time(monkeypatch):
    assert pressure.least(spec_of(total, 60, monkeypatch)) <= 32
    few, many = (pressure.least(spec_of(centred, n, monkeypatch)) for n in (4, 40))
    assert many > 5 * few


def test_a_wider_tile_wants_more(monkeypatch):
    spec = spec_of(centred, 8, monkeypatch)
    wants = {c.num_warps: pressure.registers(spec, c) for c in MAINLOOPS["rowwise"].configs(spec)}
    fewer, more = sorted(wants)
    assert wants[fewer] == 2 * wants[more]


def test_rows_that_do_not_fit_are_loaded_again(monkeypatch):
    assert pressure.least(spec_of(centred, 40, monkeypatch, shape=(4096, 40_000))) == 0


def test_too_many_values_at_a_time_are_no_kernel():
    jaxpr = jax.make_jaxpr(centred)(*[jax.ShapeDtypeStruct((4096, 1024), "bfloat16")] * 60)
    with pytest.raises(NotFusible, match=r"\d+ registers a thread, 512 at most"):
        lowering.build(jaxpr, "kernel")


@pytest.mark.aot
def test_what_is_well_below_the_limit_does_not_spill(monkeypatch):
    spec = spec_of(centred, 6, monkeypatch, shape=(4096, 512))
    assert pressure.least(spec) < 255
    assert aot.compile(spec, 90).spill_bytes == 0
