"""Passes that ask for the device: equations of a jaxpr and of its bodies are replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from jax.extend.core import Jaxpr, JaxprEqn, Var

from jevt._context import Context
from jevt._jaxpr import Atom
from jevt.partition.targets import body_context
from jevt.passes._rewrite import map_bodies, rebuild, substitute
from jevt.passes._rules import Graph

#: For the result of each equation that is replaced: what emits its value in place of the equation.
type Replacements = Mapping[Var, Callable[[Graph], Atom]]

#: Of a jaxpr in a context; whether it is the outermost one, whose outputs are arrays of their own.
type Find = Callable[[Jaxpr, Context, bool], Replacements]

#: The same program with its equations in an order that suits a pass.
type Arrange = Callable[[Jaxpr, Context], Jaxpr]


def replace(
    jaxpr: Jaxpr, context: Context, find: Find, arrange: Arrange = lambda jaxpr, _: jaxpr
) -> Jaxpr:
    """Replaces equations of ``jaxpr`` and, in the contexts that they have, of its bodies.

    Args:
      jaxpr: the outermost one.
      context: of it. Under automatic partitioning nothing is replaced: parts of an array may lie on
        other devices than its whole.
      find: what is replaced. It must leave its own result alone, so that passes are idempotent.
      arrange: comes before it.
    """
    return _Run(find, arrange).run(jaxpr, context, outermost=True)


class _Run:
    """One run of a pass, with the bodies that are done."""

    def __init__(self, find: Find, arrange: Arrange) -> None:
        self.find = find
        self.arrange = arrange
        self.done: dict[tuple[Jaxpr, Context], Jaxpr] = {}

    def run(self, jaxpr: Jaxpr, context: Context, *, outermost: bool = False) -> Jaxpr:
        key = jaxpr, context
        if key not in self.done:
            self.done[key] = self._rewritten(jaxpr, context, outermost)
        return self.done[key]

    def _rewritten(self, jaxpr: Jaxpr, context: Context, outermost: bool) -> Jaxpr:
        if not context.partitioned:
            jaxpr = self.arrange(jaxpr, context)
        found = {} if context.partitioned else self.find(jaxpr, context, outermost)
        if not found:
            return rebuild(jaxpr, [self._with_bodies(eqn, context) for eqn in jaxpr.eqns], {})
        graph = Graph(jaxpr, {})
        for eqn in jaxpr.eqns:
            emit = found.get(eqn.outvars[0]) if eqn.outvars else None
            if emit is not None:
                graph.env[eqn.outvars[0]] = emit(graph)
            else:
                graph.add(self._with_bodies(substitute(graph.env, eqn), context))
        return rebuild(jaxpr, graph.eqns, graph.env)

    def _with_bodies(self, eqn: JaxprEqn, context: Context) -> JaxprEqn:
        inner = body_context(context, eqn.primitive.name, eqn.params)
        return map_bodies(eqn, functools.partial(self.run, context=inner))
