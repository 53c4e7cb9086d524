"""Names of kernels: the same for equal kernels, and telling where in the model they come from."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence

from jax.extend.core import Jaxpr
from jax.extend.source_info_util import NameStack

from jevt_kernels.spec import KernelSpec


def canonical(spec: KernelSpec, jaxpr: Jaxpr, stacks: Sequence[NameStack]) -> KernelSpec:
    """The spec under its final name, ``<mainloop>_<scope>_<digest>``, with the jaxpr as comment.

    The name depends only on what is computed and on the innermost common scope without its layer
    number, so that 24 equal layers share one compilation.
    """
    anonymous = dataclasses.replace(spec, name="", comment="")
    digest = hashlib.sha256(repr(anonymous).encode()).hexdigest()[:8]
    words = [spec.mainloop, _innermost(common_scope(stacks)), digest]
    return dataclasses.replace(spec, name="_".join(w for w in words if w), comment=str(jaxpr))


def common_scope(stacks: Sequence[NameStack]) -> NameStack:
    """The longest common prefix of name stacks."""
    first, *rest = stacks
    length = len(first.stack)
    for stack in rest:
        length = min(length, len(stack.stack))
        while first.stack[:length] != stack.stack[:length]:
            length -= 1
    return NameStack(first.stack[:length])


def _innermost(scope: NameStack) -> str:
    """The last scope as an identifier: ``"jvp(LayerNorm_3)"`` is ``"layer_norm"``."""
    if not scope.stack:
        return ""
    words = re.findall(r"[A-Za-z][A-Za-z0-9]*", str(NameStack(scope.stack[-1:])))
    if not words:
        return ""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", words[-1])
    return re.sub(r"_?\d+$", "", spaced).lower()[:40]
