"""Products that read a concatenation become products with each of its parts. For GPUs.

Purpose: the gradients of queries, keys and values are three results of cuDNN's attention. Where the
three came from one product with a wide weight, they are joined for that product's two gradients and
for the sum that is the bias's gradient: a copy that reads and writes all of them. With ``d`` for
the concatenation of ``a``, ``b`` and ``c`` along its columns::

    d @ W  = c @ Wc + (b @ Wb + a @ Wa)             along the contraction, a sum
    y' @ d = concatenate(y' @ a, y' @ b, y' @ c)    along a free axis, which is small
    Σ d    = concatenate(Σ a, Σ b, Σ c)

Invariant: the same products, in the same types. A product along the contraction is a sum of n,
whose sums so far are rounded to its type. In float32 that is nothing. In bfloat16 the error of
three of one size, in the norm, is 1.3 times that of one (2.1e-3 for 1.7e-3) where one kernel adds
the two others, 1.4 times where they are added in turn, and never more than √3 times, unless they
cancel: as if the program had multiplied by three weights. (In float16, sums so far may also be
beyond 65504 where the whole sum is not; they are infinite.) Each addition is part of a product, of
our kernel or of cuBLAS's call: with the product on the left of the sum so far, XLA adds in place.
The products along a free axis share an operand; :mod:`.separate_products` keeps XLA from joining
them, and their other operands, again.

A concatenation is split if nobody else reads it (views of the whole, and casts in front of a sum,
are read through), so that it vanishes, and the times that the cost model predicts are less by its
copy. A part that a pointwise equation or a view computes is no copy: XLA computes it in the
concatenation's kernel. Left alone:

* parts of few columns, which cuBLAS is slower with than the cost model knows;
* small products, which XLA would put together again;
* parts that cuBLAS would read only after a transposition of their own.

    before  { lambda ; a:bf16[65536,256] b:bf16[65536,256] c:bf16[65536,512] d:bf16[512,512]. let
                e:bf16[65536,512] = concatenate[dimension=1] a b
                f:bf16[65536,512] = dot_general[(([1], [1]), ([], []))] e d
                g:bf16[512,512] = dot_general[(([0], [0]), ([], []))] c e
                in (f, g) }
    after   { lambda ; a:bf16[65536,256] b:bf16[65536,256] c:bf16[65536,512] d:bf16[512,512]. let
                h:bf16[512,256] = slice[start_indices=(0, 0) limit_indices=(512, 256)] d
                i:bf16[65536,512] = dot_general[(([1], [1]), ([], []))] a h
                j:bf16[512,256] = slice[start_indices=(0, 256) limit_indices=(512, 512)] d
                k:bf16[65536,512] = dot_general[(([1], [1]), ([], []))] b j
                f:bf16[65536,512] = add k i
                l:bf16[512,256] = dot_general[(([0], [0]), ([], []))] c a
                m:bf16[512,256] = dot_general[(([0], [0]), ([], []))] c b
                g:bf16[512,512] = concatenate[dimension=1] l m
                in (f, g) }
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._context import Context, Device
from jevt._jaxpr import Atom
from jevt.lowering.axes import Axes, Factor, fresh
from jevt.lowering.errors import NotFusible
from jevt.partition.fusions import relabels
from jevt.partition.graph import nbytes
from jevt.partition.products import Size, cublas_us
from jevt.passes._facts import shape_of
from jevt.passes._ranges import Ranges, factors_of, free_axes, is_view, seen, unsplit
from jevt.passes._readers import Readers, has_known_cost, is_call, is_in_order
from jevt.passes._replace import Replacements, replace
from jevt.passes._rewrite import read
from jevt.passes._rules import Graph, on_same_mesh
from jevt.passes.separate_products import LEAST_BYTES

#: Fewest columns of a part.
MIN_COLUMNS = 256


def run(jaxpr: Jaxpr, context: Context) -> Jaxpr:
    """Splits the concatenations of ``jaxpr`` and of its bodies for the device of ``context``."""
    return replace(jaxpr, context, _replacements)


def _replacements(jaxpr: Jaxpr, context: Context, outermost: bool) -> Replacements:
    del outermost
    readers = Readers(jaxpr)
    result: dict[Var, functools.partial[Atom]] = {}
    for eqn in jaxpr.eqns:
        joined = _joined(eqn, readers) if eqn.primitive is p.concatenate_p else None
        if joined is None or joined.saved_us(readers, context.device) <= 0.0:
            continue
        found = {way.reader.outvars[0]: functools.partial(joined.emit, way) for way in joined.ways}
        if result.keys().isdisjoint(found):  # a product of two concatenations is split once
            result |= found
    return result


@dataclasses.dataclass(frozen=True)
class _Way:
    """The way from a concatenation to an equation that reads it.

    Attributes:
      chain: the equations, both included.
      axes: of the value that each but the last computes, in factors that are not split further.
    """

    chain: tuple[JaxprEqn, ...]
    axes: tuple[Axes, ...]

    @property
    def reader(self) -> JaxprEqn:
        return self.chain[-1]

    @property
    def operand(self) -> Axes:
        """The axes of what the reader reads."""
        return self.axes[-1]

    @property
    def side(self) -> int:
        """The operand of the reader that it is."""
        return self.reader.invars.index(self.chain[-2].outvars[0])

    @property
    def is_product(self) -> bool:
        return self.reader.primitive is p.dot_general_p

    def summed(self) -> list[Factor]:
        """The factors of the axes over which the reader sums."""
        if self.is_product:
            return factors_of(self.operand, self.reader.params["dimension_numbers"][0][self.side])
        return factors_of(self.operand, self.reader.params["axes"])

    def columns(self) -> list[Factor]:
        """The factors of the operand's axes that the product's other operand does not have."""
        return factors_of(self.operand, free_axes(self.reader, self.side))

    def other(self) -> Axes:
        """The axes of a product's other operand; those of its own are new."""
        axes = list(fresh(shape_of(self.reader.invars[1 - self.side])))
        for pair in self.reader.params["dimension_numbers"]:
            for own, others in zip(pair[self.side], pair[1 - self.side], strict=True):
                axes[others] = self.operand[own]
        return tuple(axes)

    def result(self) -> Axes:
        """The axes of the reader's result."""
        if not self.is_product:
            reduced = self.reader.params["axes"]
            return tuple(axis for d, axis in enumerate(self.operand) if d not in reduced)
        sides = (self.operand, self.other())[:: -1 if self.side else 1]
        batch = self.reader.params["dimension_numbers"][1][0]
        free = [sides[side][d] for side in (0, 1) for d in free_axes(self.reader, side)]
        return (*(sides[0][d] for d in batch), *free)


@dataclasses.dataclass(frozen=True)
class _Joined:
    """A concatenation, and all that reads it.

    Attributes:
      eqn: the concatenation.
      factor: the outermost one of its axis.
      parts: for each operand, its range of this factor.
      ways: to what reads it.
      values: what has been emitted in place of values on the way, by part.
    """

    eqn: JaxprEqn
    factor: Factor
    parts: Sequence[Ranges]
    ways: Sequence[_Way]
    values: dict[tuple[Var, int], Atom] = dataclasses.field(default_factory=dict)

    def may_be_split(self) -> bool:
        """Whether everything that reads it can read its parts as they are in memory."""
        others = [a for way in self.ways for a in way.reader.invars]
        return on_same_mesh([*self.eqn.invars, *others]) and all(map(self._takes_parts, self.ways))

    def _takes_parts(self, way: _Way) -> bool:
        if not way.is_product:
            return way.reader.params["out_sharding"] is None and self.factor not in way.summed()
        if not has_known_cost(way.reader) or not all(map(is_view, way.chain[1:-1])):
            return False
        factors = way.summed() if self.factor in way.summed() else way.columns()
        return (
            self.factor in factors
            and is_in_order(way.reader, way.side)
            and all(part.order(way.axes[0]) == part.order(way.operand) for part in self.parts)
            and all(math.prod(map(part.count, factors)) >= MIN_COLUMNS for part in self.parts)
            and all(Size.of(eqn).moved > LEAST_BYTES for eqn in self._alone(way))
        )

    def saved_us(self, readers: Readers, device: Device) -> float:
        """By how much the predicted time is less with the parts."""
        stored = [a for a in self.eqn.invars if _is_stored(a, readers)]
        saved = sum(2 * nbytes(a.aval) / device.bytes_per_us for a in stored)
        if len(stored) == len(self.eqn.invars):
            saved += device.xla_launch_us
        return saved - sum(self._added_us(way, device) for way in self.ways)

    def _added_us(self, way: _Way, device: Device) -> float:
        """By how much a reader takes longer with the parts."""

        def copy_us(atom: Atom, launches: int) -> float:
            return 2 * nbytes(atom.aval) / device.bytes_per_us + launches * device.xla_launch_us

        more = len(self.parts) - 1
        (result,) = way.reader.outvars
        if not way.is_product:  # a kernel and what combines its partial results, for each part
            return more * (device.triton_launch_us + device.xla_launch_us) + copy_us(result, 1)
        added = sum(cublas_us(eqn, device) for eqn in self._alone(way))
        added -= cublas_us(way.reader, device)
        if self.factor not in way.summed():
            return added + copy_us(result, 1)
        added += more * nbytes(result.aval) / device.bytes_per_us
        return added + copy_us(way.reader.invars[1 - way.side], len(self.parts))

    def _alone(self, way: _Way) -> Iterator[JaxprEqn]:
        """The products with the parts, of variables of their own, to ask what they cost."""
        (out,) = way.reader.outvars
        other, result = way.other(), way.result()
        for part in self.parts:
            operands = list(way.reader.invars)
            operands[way.side] = part.like(operands[way.side], way.operand)
            operands[1 - way.side] = part.like(operands[1 - way.side], other)
            yield way.reader.replace(invars=operands, outvars=[part.like(out, result)])

    def emit(self, way: _Way, graph: Graph) -> Atom:
        """What stands for the result of a reader."""
        numbers = range(len(self.parts))
        if not way.is_product:
            sums = [self._emit(way.reader, [self._value(way, n, graph)], graph) for n in numbers]
            return self._concatenated(sums, way, graph)
        if self.factor not in way.summed():
            products = [self._product(way, n, graph) for n in numbers]
            return self._concatenated(products, way, graph)
        total = self._product(way, 0, graph)
        for n in numbers[1:]:
            total = graph.emit(p.add_p, self._product(way, n, graph), total)
        return total

    def _product(self, way: _Way, number: int, graph: Graph) -> Atom:
        operands = [read(graph.env, a) for a in way.reader.invars]
        operands[way.side] = self._value(way, number, graph)
        graph.place(way.reader)
        if self.factor in way.summed():
            other = operands[1 - way.side]
            operands[1 - way.side] = self.parts[number].part(other, way.other(), graph)
        return self._emit(way.reader, operands, graph)

    def _value(self, way: _Way, number: int, graph: Graph) -> Atom:
        """A part, as the last view on the way shows it."""
        value = read(graph.env, self.eqn.invars[number])
        for eqn, axes in zip(way.chain[1:-1], way.axes[1:], strict=True):
            key = eqn.outvars[0], number
            if key not in self.values:
                graph.place(eqn)
                if is_view(eqn) and eqn.primitive is not p.transpose_p:
                    self.values[key] = graph.reshape(value, self.parts[number].shape(axes))
                else:
                    self.values[key] = self._emit(eqn, [value], graph)
            value = self.values[key]
        return value

    def _concatenated(self, parts: Sequence[Atom], way: _Way, graph: Graph) -> Atom:
        """Results side by side, as the reader's own would be."""
        axes = way.result()
        axis = next(d for d, factors in enumerate(axes) if self.factor in factors)
        outer = axes[axis].index(self.factor)
        if outer:  # in the middle of an axis
            split = (*axes[:axis], axes[axis][:outer], axes[axis][outer:], *axes[axis + 1 :])
            pairs = zip(self.parts, parts, strict=True)
            parts = [graph.reshape(part, ranges.shape(split)) for ranges, part in pairs]
            axis += 1
        whole = graph.emit(p.concatenate_p, *parts, dimension=axis)
        return graph.reshape(whole, shape_of(way.reader.outvars[0]))

    def _emit(self, eqn: JaxprEqn, operands: Sequence[Atom], graph: Graph) -> Atom:
        graph.place(eqn)
        return graph.emit(eqn.primitive, *operands, **eqn.params)


def _joined(eqn: JaxprEqn, readers: Readers) -> _Joined | None:
    """A concatenation that may be split; None if it may not."""
    axis = eqn.params["dimension"]
    ends = list(itertools.accumulate((shape_of(a)[axis] for a in eqn.invars), initial=0))
    chains = _chains(eqn, readers)
    if len(ends) < 3 or len(set(ends)) < len(ends) or not chains or () in chains:
        return None
    if len({id(chain[-1]) for chain in chains}) < len(chains):  # a product with itself
        return None
    first = fresh(shape_of(eqn.outvars[0]))
    axes = {eqn.outvars[0]: first}
    try:
        for chain in chains:
            for before, view in itertools.pairwise(chain[:-1]):
                axes.setdefault(view.outvars[0], seen(view, axes[before.outvars[0]]))
    except NotFusible:  # reshapes that cut axes differently
        return None
    ways = [_Way(chain, tuple(unsplit(axes[e.outvars[0]]) for e in chain[:-1])) for chain in chains]
    factor, *others = ways[0].axes[0][axis]
    inner = math.prod(f.size for f in others)
    if any(end % inner for end in ends):
        return None
    pairs = itertools.pairwise(end // inner for end in ends)
    parts = [Ranges({factor: (start, limit, 1)}) for start, limit in pairs]
    joined = _Joined(eqn, factor, parts, ways)
    return joined if joined.may_be_split() else None


def _chains(eqn: JaxprEqn, readers: Readers) -> list[tuple[JaxprEqn, ...]]:
    """The ways from a concatenation to products and sums; an empty one to what else reads it."""
    result: list[tuple[JaxprEqn, ...]] = []
    stack: list[tuple[JaxprEqn, ...]] = [(eqn,)]
    while stack:
        chain = stack.pop()
        (var,) = chain[-1].outvars
        if readers.is_output(var):
            result.append(())
        for reader in readers.of(var):
            if reader.primitive in (p.dot_general_p, p.reduce_sum_p):
                result.append((*chain, reader) if reader.invars.count(var) == 1 else ())
            elif is_view(reader) or reader.primitive is p.convert_element_type_p:
                stack.append((*chain, reader))
            else:
                result.append(())
    return result


def _is_stored(atom: Atom, readers: Readers) -> bool:
    """Whether a value is in memory, rather than computed by XLA where it is read."""
    maker = readers.maker(atom)
    while maker is not None and relabels(maker) and len(maker.invars) == 1:
        atom = maker.invars[0]
        maker = readers.maker(atom)
    return maker is None or maker.primitive is p.dot_general_p or is_call(maker)
