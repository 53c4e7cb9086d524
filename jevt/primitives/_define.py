"""How a composite primitive is defined: by its types, and by functions that compute it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jevt.lowering.errors import JevtWarning
from jevt_kernels import gluon_kernels, launch
from jevt_kernels.gluon_kernels import GluonKernel
from jevt_kernels.spec import KernelSpec

type Function = Callable[..., Any]


def composite(
    name: str, types: Function, reference: Function, cuda: Function | None = None, *, several: bool
) -> Primitive:
    """A new primitive without rules for differentiation and batching, which it comes after.

    Args:
      name: of the primitive.
      types: its types, as of :func:`define`.
      reference: its values.
      cuda: its values on CUDA, if that is something else.
      several: whether it has a list of results, or one.
    """
    primitive = Primitive(name)
    primitive.multiple_results = several
    define(primitive, types, reference, cuda)
    return primitive


def define(
    primitive: Primitive, types: Function, reference: Function, cuda: Function | None = None
) -> None:
    """Gives a primitive its types, its values and its lowerings.

    Args:
      primitive: has no rules yet.
      types: from the operands' types to the result's, or to those of several. Parameters are
        keywords, here and in the others.
      reference: from operands to results in plain JAX; all its keywords are parameters.
      cuda: what the primitive is on CUDA in place of the reference.
    """
    parameters = inspect.signature(reference).parameters.values()
    static = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    lowering = functools.partial(mlir.lower_fun, multiple_results=primitive.multiple_results)
    primitive.def_abstract_eval(types)
    primitive.def_impl(jax.jit(reference, static_argnames=static))
    mlir.register_lowering(primitive, lowering(reference))
    if cuda is not None:
        mlir.register_lowering(primitive, lowering(cuda), platform="cuda")


def compile_ahead(kernels: Iterable[KernelSpec | GluonKernel], capability: int, what: str) -> bool:
    """Whether the kernels of a primitive compile; a warning where one does not.

    Args:
      kernels: generated ones, or written by hand.
      capability: compute capability; for generated ones 0 for the device's.
      what: of which the warning is, "a sum of segments runs through XLA: its kernel".
    """
    try:
        for kernel in kernels:
            if isinstance(kernel, GluonKernel):
                gluon_kernels.precompile(kernel, capability)
            else:
                launch.precompile(kernel, capability)
    except Exception as error:  # noqa: BLE001 - whatever the compiler stack raises, the program must still run
        reason = f"did not compile: {launch.described(error)}"
        warnings.warn(f"jevt: {what} {reason}", JevtWarning, stacklevel=3)
        return False
    return True
