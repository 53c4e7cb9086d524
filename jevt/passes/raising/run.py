"""One run of a pass that raises: what is found is written in the place of what was there."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable

from jax.extend.core import Jaxpr, JaxprEqn

from jevt.passes import canonicalize
from jevt.passes._remarks import Note, Remarks
from jevt.passes._rewrite import map_bodies, once, rebuild, substitute
from jevt.passes._rules import Graph
from jevt.passes.attention.region import Program

type Write = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """What is written in the place of something that was found.

    Attributes:
      writes: each with the position of the equation before which it is called.
      replaced: positions of the equations that go.
    """

    writes: tuple[tuple[int, Write], ...]
    replaced: frozenset[int]


class Run:
    """One run of a pass.

    Args:
      what: is looked for, "norm".
      find: finds what is raised in a program, to be written to a graph, and tells the run of it.
    """

    def __init__(self, what: str, find: Callable[[Run, Program, Graph], Iterable[Rewrite]]) -> None:
        self._what = what
        self._find = find
        self._counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        self._misses = Remarks()
        self._raised = once(self._rewritten)

    def raised(self, jaxpr: Jaxpr, note: Note) -> Jaxpr:
        """The jaxpr, raised, and its bodies.

        Args:
          jaxpr: canonical.
          note: receives how many of each were raised, and a line for each reason for which what
            looks like one stays.
        """
        result = self._raised(jaxpr)
        for name, (forward, backward) in sorted(self._counts.items()):
            note(f"{name}: {forward} forward, {backward} backward")
        self._misses.tell(note)
        return result

    def count(self, name: str, *, backward: bool) -> None:
        """Counts a composite that is written, and whether its gradient is."""
        self._counts[name][0] += 1
        self._counts[name][1] += backward

    def miss(self, eqn: JaxprEqn, reason: object) -> None:
        """Notes why what is there stays."""
        self._misses.add(eqn, self._what, f" stays: {reason}")

    def _rewritten(self, jaxpr: Jaxpr) -> Jaxpr:
        graph = Graph(jaxpr, canonicalize.RULES)
        todo: dict[int, list[Write]] = {}
        replaced: set[int] = set()
        for rewrite in self._find(self, Program(jaxpr), graph):
            for position, write in rewrite.writes:
                todo.setdefault(position, []).append(write)
            replaced |= rewrite.replaced
        if not todo:
            return rebuild(jaxpr, [map_bodies(eqn, self._raised) for eqn in jaxpr.eqns], {})
        for position, eqn in enumerate(jaxpr.eqns):
            for write in todo.get(position, ()):
                write()
            if position not in replaced:
                graph.add(map_bodies(substitute(graph.env, eqn), self._raised))
        return rebuild(jaxpr, graph.eqns, graph.env)
