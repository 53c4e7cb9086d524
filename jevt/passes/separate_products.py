"""The parts of a split concatenation's product are kept apart. For GPUs.

Purpose: XLA multiplies products together that share an operand, as the gradients of the three
weights of an attention: it concatenates their other operands, and takes slices of the one result.
Where :mod:`.split_concatenations` made the products of a concatenation, in order not to have it,
that brings 100 MB of it back.

So the second of them reads the shared operand through a barrier, the third through one more, which
XLA does not look through. (Barriers of the same value would be equal, and XLA would make one of
them.) What shows an operand otherwise stays behind the barrier, where it is part of the call.

Invariant: the same products.

XLA's pass (``DotMerger``) takes products whose shared operand shows the same value, whichever
operand it is, contracts and has as batch the same of its axes, from the smallest on, until what is
joined of operands and results is beyond ``xla_gpu_dot_merger_threshold_mb``, 64 MiB. Kept apart
are those that read and write more than ``LEAST_BYTES`` each, if one of their results goes into a
concatenation; XLA may join the others. (The three gradients of a BERT, each of a weight of its own,
were not faster apart on an H100: 0.3 ms of 71 less in kernels, but a hundred launches more.) A
donated input has no barriers: what overwrites it has to know its readers.

    before  { lambda ; a:bf16[16384,1024] b:bf16[16384,1024] c:bf16[16384,1024]. let
                d:bf16[1024,1024] = dot_general[(([0], [0]), ([], []))] a b
                e:bf16[1024,1024] = dot_general[(([0], [0]), ([], []))] a c
                f:bf16[1024,2048] = concatenate[dimension=1] d e
                in (f,) }
    after   { lambda ; a:bf16[16384,1024] b:bf16[16384,1024] c:bf16[16384,1024]. let
                d:bf16[1024,1024] = dot_general[(([0], [0]), ([], []))] a b
                g:bf16[16384,1024] = optimization_barrier a
                e:bf16[1024,1024] = dot_general[(([0], [0]), ([], []))] g c
                f:bf16[1024,2048] = concatenate[dimension=1] d e
                in (f,) }
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._context import Context
from jevt._jaxpr import Atom
from jevt.lowering.alias import donated_inputs
from jevt.lowering.axes import flat, fresh
from jevt.lowering.errors import NotFusible
from jevt.partition.products import Size
from jevt.passes._facts import shape_of
from jevt.passes._ranges import factors_of, is_view, seen, unsplit
from jevt.passes._readers import Readers, has_known_cost
from jevt.passes._replace import Replacements, replace
from jevt.passes._rewrite import read
from jevt.passes._rules import Graph, on_same_mesh

#: Least bytes that a large product reads and writes.
LEAST_BYTES = 32 << 20


def run(jaxpr: Jaxpr, context: Context) -> Jaxpr:
    """Keeps the large products of ``jaxpr`` and of its bodies apart."""
    return replace(jaxpr, context, _replacements)


def _replacements(jaxpr: Jaxpr, context: Context, outermost: bool) -> Replacements:
    donated = donated_inputs(jaxpr, context) if outermost else frozenset()
    readers = Readers(jaxpr)
    alike: dict[object, dict[Var, _Operand]] = {}
    for eqn in jaxpr.eqns:
        for side in (0, 1) if eqn.primitive is p.dot_general_p else ():
            operand = _operand(eqn, side, readers)
            if isinstance(operand.source, Var) and operand.source not in donated:
                alike.setdefault(operand.use(), {}).setdefault(eqn.outvars[0], operand)
    barriers = _Barriers()
    found: dict[Var, list[tuple[_Operand, int]]] = {}
    for operands in alike.values():
        if len(operands) < 2 or not any(_is_part(o.product, readers) for o in operands.values()):
            continue
        large = [operand for operand in operands.values() if operand.is_large()]
        first = 0 if len(large) == len(operands) else 1  # apart from small ones, too
        for number, operand in enumerate(large, first):
            if number:
                found.setdefault(operand.product.outvars[0], []).append((operand, number))
    return {var: functools.partial(_emit, behind, barriers) for var, behind in found.items()}


@dataclasses.dataclass(frozen=True)
class _Operand:
    """An operand of a matrix product.

    Attributes:
      product: the product.
      side: which of its operands.
      source: the value that it shows.
      views: from the source to the operand.
    """

    product: JaxprEqn
    side: int
    source: Atom
    views: tuple[JaxprEqn, ...]

    def use(self) -> object:
        """What it has in common with operands of products that XLA joins to this one."""
        numbers = [pair[self.side] for pair in self.product.params["dimension_numbers"]]
        axes = [fresh(shape_of(self.source))]
        try:
            for view in self.views:
                axes.append(seen(view, axes[-1]))
        except NotFusible:  # a reshape that XLA does not look through either
            return self.product.invars[self.side], *map(tuple, numbers)
        strides, step = {}, 1
        for factor in reversed(flat(unsplit(axes[0]))):
            strides[factor] = step
            step *= factor.size
        last = unsplit(axes[-1])
        places = ([(strides[f], f.size) for f in factors_of(last, axis)] for axis in numbers)
        return self.source, *map(_merged, places)

    def is_large(self) -> bool:
        """Whether joining its product costs more than it saves; not where that is not known."""
        return (
            on_same_mesh([*self.product.invars, self.source])
            and has_known_cost(self.product)
            and Size.of(self.product).moved > LEAST_BYTES
        )


class _Barriers:
    """Values behind barriers."""

    def __init__(self) -> None:
        self._values: dict[Atom, list[Atom]] = {}

    def behind(self, source: Atom, number: int, graph: Graph) -> Atom:
        """A value of the original behind so many barriers."""
        values = self._values.setdefault(source, [read(graph.env, source)])
        while len(values) <= number:
            values.append(graph.barrier(values[-1]))
        return values[number]


def _emit(behind: Sequence[tuple[_Operand, int]], barriers: _Barriers, graph: Graph) -> Atom:
    """A product with some operands behind barriers."""
    product = behind[0][0].product
    operands = [read(graph.env, atom) for atom in product.invars]
    for operand, number in behind:
        graph.place(product)
        value = barriers.behind(operand.source, number, graph)
        for view in operand.views:
            graph.place(view)
            value = graph.emit(view.primitive, value, **view.params)
        operands[operand.side] = value
    graph.place(product)
    return graph.emit(p.dot_general_p, *operands, **product.params)


def _is_part(product: JaxprEqn, readers: Readers) -> bool:
    """Whether the result of a product goes into a concatenation."""
    (var,) = product.outvars
    while len(found := readers.of(var)) == 1 and is_view(found[0]):
        (var,) = found[0].outvars
    return any(reader.primitive is p.concatenate_p for reader in found)


def _operand(product: JaxprEqn, side: int, readers: Readers) -> _Operand:
    views: list[JaxprEqn] = []
    atom = product.invars[side]
    while (maker := readers.maker(atom)) is not None and is_view(maker):
        views.insert(0, maker)
        atom = maker.invars[0]
    return _Operand(product, side, atom, tuple(views))


def _merged(parts: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Strides and sizes, from the outermost, neighbours in memory as one."""
    result: list[tuple[int, int]] = []
    for stride, size in sorted(parts, reverse=True):
        if result and result[-1][0] == stride * size:
            result[-1] = stride, result[-1][1] * size
        else:
            result.append((stride, size))
    return tuple(result)
