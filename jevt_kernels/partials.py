"""The second stage of reductions along rows.

A kernel that reduces along rows leaves one partial result for each program that walks a part of the
rows. The order in which they are combined is fixed, so results are the same bits from run to run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jevt_kernels.spec import KernelSpec, Source, TensorType

# Methods that NumPy's and JAX's arrays share.
_METHODS = {"sum": "sum", "prod": "prod", "max": "max", "min": "min", "or": "max", "and": "min"}


def written(spec: KernelSpec, source: Source) -> KernelSpec:
    """The spec with the outputs that the kernel itself writes.

    They are partial results where there are some.
    """
    outputs = list(spec.outputs)
    for partial in source.partials:
        shape = (partial.programs, *spec.outputs[partial.output].shape)
        outputs[partial.output] = TensorType(shape, partial.dtype)
    return dataclasses.replace(spec, outputs=tuple(outputs))


def combine(spec: KernelSpec, source: Source, results: Sequence[Any]) -> tuple[Any, ...]:
    """The kernel's outputs from what it has written.

    NumPy arrays of NumPy arrays, JAX's of JAX's.
    """
    outputs = list(results)
    for partial in source.partials:
        values = outputs[partial.output]
        keep = {"dtype": values.dtype} if partial.op in ("sum", "prod") else {}
        total = getattr(values, _METHODS[partial.op])(axis=0, **keep)
        outputs[partial.output] = total.astype(spec.outputs[partial.output].dtype)
    return tuple(outputs)
