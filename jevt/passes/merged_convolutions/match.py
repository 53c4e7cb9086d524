"""Convolutions of one input that can be one, and what that one is like."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence

import numpy as np
from jax import lax
from jax.extend.core import DropVar, Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom, aval
from jevt.passes._facts import shape_of
from jevt.passes.convolutions import is_plain


@dataclasses.dataclass(frozen=True)
class Extents:
    """Where a convolution's windows begin, and its spatial extents; one number for each axis.

    Attributes:
      low: zeros before the first element.
      windows: elements of a window.
      results: windows.
    """

    low: tuple[int, ...]
    windows: tuple[int, ...]
    results: tuple[int, ...]

    @classmethod
    def of(cls, eqn: JaxprEqn) -> Extents:
        numbers = eqn.params["dimension_numbers"]
        rhs, out = shape_of(eqn.invars[1]), shape_of(eqn.outvars[0])
        return cls(
            tuple(low for low, _ in eqn.params["padding"]),
            tuple(rhs[axis] for axis in numbers.rhs_spec[2:]),
            tuple(out[axis] for axis in numbers.out_spec[2:]),
        )

    @property
    def widens(self) -> bool:
        """Whether it is its window that becomes wider, and not its result: the smaller of both."""
        return math.prod(self.windows) <= math.prod(self.results)


def alike(jaxpr: Jaxpr) -> list[list[JaxprEqn]]:
    """The convolutions of ``jaxpr``, in order, that can be merged: those of one input together."""
    classes: dict[Hashable, list[JaxprEqn]] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive is p.conv_general_dilated_p and _is_taken(eqn):
            classes.setdefault(_key(eqn), []).append(eqn)
    return [found for found in classes.values() if len(found) > 1]


@dataclasses.dataclass(frozen=True, eq=False)
class Merged:
    """Some of the convolutions that are alike, as one.

    Attributes:
      eqns: in their order in the program.
    """

    eqns: tuple[JaxprEqn, ...]

    def joined(self, other: Merged, order: Sequence[JaxprEqn]) -> Merged:
        """This and another one as one; ``order`` has the equations of both."""
        results = self.results | other.results
        return Merged(tuple(eqn for eqn in order if eqn.outvars[0] in results))

    @property
    def results(self) -> set[Var]:
        return {eqn.outvars[0] for eqn in self.eqns}

    @property
    def lhs(self) -> Atom:
        return self.eqns[0].invars[0]

    @functools.cached_property
    def features(self) -> list[int]:
        """Output features of each."""
        axis = self.eqns[0].params["dimension_numbers"].rhs_spec[0]
        return [shape_of(eqn.invars[1])[axis] for eqn in self.eqns]

    @functools.cached_property
    def extents(self) -> Extents:
        """Of the one."""
        found = [Extents.of(eqn) for eqn in self.eqns]
        low = tuple(max(lows) for lows in zip(*(e.low for e in found), strict=True))
        ends = []
        for eqn, each in zip(self.eqns, found, strict=True):
            lengths = each.windows if each.widens else each.results
            ends.append([a + b for a, b in zip(_offsets(eqn, low), lengths, strict=True)])
        longest = tuple(max(each) for each in zip(*ends, strict=True))
        windows, results = found[0].windows, found[0].results
        return Extents(low, longest, results) if self.widens else Extents(low, windows, longest)

    @property
    def widens(self) -> bool:
        """Whether windows are parts of a wider one; otherwise results are, of a longer one."""
        return Extents.of(self.eqns[0]).widens

    def offsets(self, eqn: JaxprEqn) -> list[int]:
        """Where the window, or the result, of one of the convolutions begins."""
        return _offsets(eqn, self.extents.low)

    @functools.cached_property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Of the one: as much on both sides of an axis if that gives the same windows.

        (For other paddings XLA makes cuDNN a padded copy of the input.)
        """
        params, extents = self.eqns[0].params, self.extents
        sizes = [shape_of(self.lhs)[axis] for axis in params["dimension_numbers"].lhs_spec[2:]]
        result = []
        for i, size in enumerate(sizes):
            low, stride = extents.low[i], params["window_strides"][i]
            reach = (extents.results[i] - 1) * stride + 1
            reach += (extents.windows[i] - 1) * params["rhs_dilation"][i]
            least = reach - low - size
            result.append((low, min(max(low, least), least + stride - 1)))
        return tuple(result)


def _is_taken(eqn: JaxprEqn) -> bool:
    """Whether this is a convolution on tensor cores, without groups and of an input as it is."""
    out = eqn.outvars[0]
    return (
        not isinstance(out, DropVar)
        and is_plain(eqn)
        and aval(out).ndim > 2
        and not aval(out).weak_type
        and all(d == 1 for d in eqn.params["lhs_dilation"])
        and _is_on_tensor_cores(eqn)
    )


def _is_on_tensor_cores(eqn: JaxprEqn) -> bool:
    dtype, precision = aval(eqn.invars[0]).dtype, eqn.params["precision"]
    both = precision if isinstance(precision, tuple) else (precision,)
    default = all(each in (None, lax.Precision.DEFAULT) for each in both)
    return dtype.itemsize == 2 or (dtype == np.float32 and default)


def _key(eqn: JaxprEqn) -> Hashable:
    """What convolutions that can be merged have in common."""
    params, extents = eqn.params, Extents.of(eqn)
    shared = extents.results if extents.widens else extents.windows
    phases = tuple(low % step for low, step in zip(extents.low, _steps(eqn), strict=True))
    names = "dimension_numbers", "window_strides", "rhs_dilation", "precision"
    dtype = params["preferred_element_type"]
    return eqn.invars[0], extents.widens, shared, phases, dtype, *(params[n] for n in names)


def _steps(eqn: JaxprEqn) -> tuple[int, ...]:
    """From one element of a window to the next, or from one window to the next."""
    params = eqn.params
    return tuple(params["rhs_dilation" if Extents.of(eqn).widens else "window_strides"])


def _offsets(eqn: JaxprEqn, low: Sequence[int]) -> list[int]:
    """Where its window, or its result, begins in one that begins with so many zeros."""
    own = Extents.of(eqn).low
    return [(a - b) // step for a, b, step in zip(low, own, _steps(eqn), strict=True)]
