"""Names of groups: position, kind, and where in the user's model they come from."""

from __future__ import annotations

import re
from collections import Counter

from jax.extend.core import Jaxpr

_LONGEST = 24


def group_name(index: int, kind: str, jaxpr: Jaxpr) -> str:
    """``g07_rowwise_LayerNorm_0``: an identifier, stable for the same program."""
    scope = innermost_scope(jaxpr)
    return f"g{index:02d}_{kind}" + (f"_{scope}" if scope else "")


def moved(name: str, index: int) -> str:
    """The name of a group at another position."""
    return re.sub(r"^g\d+", f"g{index:02d}", name)


def innermost_scope(jaxpr: Jaxpr) -> str:
    """The named scope that most equations are in, its last component as an identifier, "" if none.

    Transformations wrap names, ``transpose(jvp(LayerNorm_0))``; the name itself is what counts.
    """
    count: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        components = [c for c in re.split(r"[/()]", str(eqn.source_info.name_stack)) if c]
        components = [
            c
            for c in components
            if c not in ("jvp", "transpose", "vmap", "jit", "remat", "checkpoint")
        ]
        if components:
            count[components[-1]] += 1
    if not count:
        return ""
    name = min(count, key=lambda n: (-count[n], n))
    return re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")[:_LONGEST]
