"""The regions of a program, and the way around what is in the way of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jax.extend.core import Jaxpr, JaxprEqn

from jevt._context import Device
from jevt.passes.attention.region import Program
from jevt.passes.chunks import policy
from jevt.passes.chunks.fork import fork
from jevt.passes.chunks.region import (
    Head,
    Obstacle,
    Region,
    Repeating,
    Waiting,
    can_repeat,
    find,
    heads_of,
)
from jevt.passes.chunks.repeat import repeat
from jevt.primitives.softmax import softmax_statistics_p

#: Obstacles that are removed from a program at most.
_MOST_OBSTACLES = 32


@dataclasses.dataclass(frozen=True)
class Found:
    """What a program has of large logits.

    Attributes:
      program: the program.
      regions: around products that give some.
      obstacles: why there is none around others.
    """

    program: Program
    regions: Sequence[Region]
    obstacles: Mapping[JaxprEqn, tuple[Head, Obstacle]]


def look(jaxpr: Jaxpr, device: Device) -> Found:
    """What a program has, on a device, of large logits."""
    program = Program(jaxpr)
    regions: dict[JaxprEqn, Region] = {}
    obstacles: dict[JaxprEqn, tuple[Head, Obstacle]] = {}
    for position, eqn in enumerate(program.eqns):
        if eqn.primitive is not softmax_statistics_p:
            continue
        for head in heads_of(program, position):
            if head.eqn in regions or not policy.is_candidate(head, device):
                continue
            try:
                region = find(head)
            except Obstacle as obstacle:
                obstacles.setdefault(head.eqn, (head, obstacle))
            else:
                regions |= {} if region is None else {head.eqn: region}
    left = {eqn: why for eqn, why in obstacles.items() if eqn not in regions}
    return Found(program, tuple(regions.values()), left)


def eased(found: Found, device: Device, *, twice: bool = False) -> Found:
    """What is found in the program without obstacles for which there is a way; itself if none.

    Args:
      found: in the program.
      device: with how much memory.
      twice: whether what a gradient waits for may get logits of its own.
    """
    for _ in range(_MOST_OBSTACLES):
        ways = (
            _eased(found.program, head, why, device, twice=twice)
            for head, why in found.obstacles.values()
        )
        jaxpr = next((way for way in ways if way is not None), None)
        if jaxpr is None:
            break
        found = look(jaxpr, device)
    return found


def _eased(
    program: Program, head: Head, why: Obstacle, device: Device, *, twice: bool
) -> Jaxpr | None:
    """The program without an obstacle, None if it stays."""
    if isinstance(why, Repeating) and can_repeat(head, why):
        return repeat(program, why)
    if twice and isinstance(why, Waiting) and policy.is_worth_twice(head, device):
        return fork(head, why.value)
    return None
