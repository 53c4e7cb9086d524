"""Predicted microseconds of convolutions of one input, apart and as one."""

from __future__ import annotations

import functools
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

    @functools.cache
    def both(first: Merged, second: Merged) -> Merged:
        return first.joined(second, eqns)

    @functools.cache
    def us(merged: Merged) -> float:
        return predicted_us(merged, readers, device)

    def saved_us(first: Merged, second: Merged) -> float:
        if not _may_be_one(first, second, both(first, second)):
            return 0.0
        parts = us(first) + us(second)
        saved = parts - us(both(first, second))
        return saved if saved >= max(LEAST_US, LEAST_PART * parts) else 0.0

    found = [Merged((eqn,)) for eqn in eqns]
    while len(found) > 1:
        pairs = itertools.combinations(found, 2)
        first, second = max(pairs, key=lambda pair: saved_us(*pair))
        if saved_us(first, second) == 0.0:
            break
        found[found.index(first)] = both(first, second)
        found.remove(second)
    return [merged for merged in found if len(merged.eqns) > 1]


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
