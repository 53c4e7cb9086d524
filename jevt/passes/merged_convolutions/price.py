"""Predicted microseconds of convolutions of one input, apart and as one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from jevt._context import Device
from jevt._jaxpr import aval
from jevt.partition.graph import nbytes
from jevt.passes._facts import shape_of
from jevt.passes._readers import Readers, is_call
from jevt.passes.merged_convolutions.match import Merged

#: Filters with which cuDNN reaches cuBLAS's rate; with fewer, as much less.
FULL = 128

#: Microseconds, and the part of the time, that merging two is predicted to save at least.
LEAST_US, LEAST_PART = 10.0, 0.1


def joined(eqns: Sequence[JaxprEqn], readers: Readers, device: Device) -> list[Merged]:
    """What convolutions become, two at a time, while that is predicted to be faster."""
    found = [Merged((eqn,)) for eqn in eqns]
    while True:
        gains = {}
        for first, second in itertools.combinations(found, 2):
            both = first.joined(second, eqns)
            if _may_be_one(first, second, both):
                parts = predicted_us(first, readers, device) + predicted_us(second, readers, device)
                saved = parts - predicted_us(both, readers, device)
                if saved >= max(LEAST_US, LEAST_PART * parts):
                    gains[saved] = first, second, both
        if not gains:
            return [merged for merged in found if len(merged.eqns) > 1]
        first, second, both = gains[max(gains)]
        found = [both if each is first else each for each in found if each is not second]


def predicted_us(merged: Merged, readers: Readers, device: Device) -> float:
    """The convolution, and the copies that go with it."""
    eqn, extents = merged.eqns[0], merged.extents
    numbers = eqn.params["dimension_numbers"]
    lhs, out = aval(merged.lhs), aval(eqn.outvars[0])
    batch, channels = out.shape[numbers.out_spec[0]], shape_of(eqn.invars[1])[numbers.rhs_spec[1]]
    features = sum(merged.features)
    filters = features * channels * math.prod(extents.windows)
    results = batch * features * math.prod(extents.results)
    flops = 2 * filters * batch * math.prod(extents.results)
    rate = device.cublas_flops_per_us * min(1.0, features / FULL) * 2 / lhs.dtype.itemsize
    weights = filters * lhs.dtype.itemsize
    moved = nbytes(lhs) + weights + results * out.dtype.itemsize
    us = max(flops / rate, moved / device.bytes_per_us) + device.xla_launch_us
    if any(low != high for low, high in merged.padding):  # XLA pads, or crops, a copy
        us += 2 * nbytes(lhs) / device.bytes_per_us + device.xla_launch_us
    if len(merged.eqns) > 1:
        copied = weights + sum(nbytes(each.invars[1].aval) for each in merged.eqns)
        us += copied / device.bytes_per_us + device.xla_launch_us
        for each in merged.eqns:
            if _is_stored(each, readers):
                moved = 2 * nbytes(each.outvars[0].aval)
                us += moved / device.bytes_per_us + device.xla_launch_us
    return us


def _may_be_one(first: Merged, second: Merged, both: Merged) -> bool:
    """Whether neither has filters enough, and XLA need not pad one side and crop the other."""
    sides = [side for pair in both.padding for side in pair]
    return all(sum(each.features) < FULL for each in (first, second)) and (
        min(sides) >= 0 or max(sides) <= 0
    )


def _is_stored(eqn: JaxprEqn, readers: Readers) -> bool:
    """Whether a result has to be an array of its own, rather than be read as a slice."""
    (out,) = eqn.outvars
    return readers.is_output(out) or any(
        is_call(reader) or reader.primitive is p.dot_general_p for reader in readers.of(out)
    )
