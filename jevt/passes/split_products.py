"""A matrix product that is read in parts becomes a product for each part. For GPUs.

Purpose: a layer gives queries, keys and values as one product with a wide weight, ``y @ W``, and
attention is a call of cuDNN, whose operands are arrays of their own. So XLA copies q, k and v out
of the product, which reads and writes all of it once more. Products with parts of the weight write
them where they are needed; what is copied then are the weight's parts, which are small.

Invariant: the same sums over the same numbers, with the same precision.

A product is split if all that reads it are slices of columns of one operand, with views and
what cuBLAS takes along (a bias, a cast) between, no column is in two parts, and the times that the
cost model predicts are less by the copies of those slices that a call reads or the program returns.
What a kernel reads is no reason: it reads a slice in place. Neighbours that gain nothing stay one
product, so do parts of few columns (one key head for many queries), which cuBLAS is slow to
multiply. Left alone:

* what somebody reads whole, as the gradient of a weight reads the gradient of q, k and v;
* small products, which XLA puts together again.

    before  { lambda ; a:bf16[64,512,256] b:bf16[256,768] c:bf16[1,1,768]. let
                d:bf16[64,512,768] = dot_general[(([2], [0]), ([], []))] a b
                e:bf16[64,512,768] = add d c
                f:bf16[64,512,3,4,64] = reshape e
                g:bf16[64,512,1,4,64] = slice[start_indices=(0, 0, 0, 0, 0) …] f
                … = attention (reshape g) … in (…) }
    after   { lambda ; a:bf16[64,512,256] b:bf16[256,768] c:bf16[1,1,768]. let
                d:bf16[256,256] = slice[start_indices=(0, 0) limit_indices=(256, 256)] b
                e:bf16[64,512,256] = dot_general[(([2], [0]), ([], []))] a d
                f:bf16[1,1,256] = slice[limit_indices=(1, 1, 256)] c
                g:bf16[64,512,1,4,64] = reshape (add e f)
                … = attention (reshape g) … in (…) }
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._context import Context, Device
from jevt._jaxpr import Atom
from jevt.partition.fusions import relabels
from jevt.partition.graph import elements, nbytes
from jevt.partition.products import Size, cublas_us
from jevt.passes._parts import Part, follow
from jevt.passes._ranges import is_view
from jevt.passes._readers import Readers, has_known_cost, is_call, is_in_order
from jevt.passes._replace import Replacements, replace
from jevt.passes._rules import on_same_mesh
from jevt.passes.separate_products import LEAST_BYTES

#: Fewest columns of a part.
MIN_COLUMNS = 256

#: What XLA hands to cuBLAS with a product, if the other operand is small.
_FOLDED = frozenset({p.add_p, p.add_jaxvals_p, p.mul_p, p.max_p, p.convert_element_type_p})


def run(jaxpr: Jaxpr, context: Context) -> Jaxpr:
    """Splits the products of ``jaxpr`` and of its bodies for the device of ``context``."""
    return replace(jaxpr, context, _replacements)


def _replacements(jaxpr: Jaxpr, context: Context, outermost: bool) -> Replacements:
    found = _splits(_Slices(jaxpr, outermost), context.device)
    return {part.slice.outvars[0]: part.emit for split in found for part in split}


class _Slices(Readers):
    """A jaxpr, and what reads slices in it.

    Attributes:
      outermost: whether its outputs are arrays of their own; a loop writes those of its body into
        larger ones.
    """

    def __init__(self, jaxpr: Jaxpr, outermost: bool) -> None:
        super().__init__(jaxpr)
        self.outermost = outermost

    def elements(self, atom: Atom) -> int:
        """The number of elements that an array has in memory, where it may be a broadcast."""
        maker = self.maker(atom)
        if maker is not None and maker.primitive is p.broadcast_in_dim_p:
            atom = maker.invars[0]
        return elements(atom.aval)

    def is_copied(self, var: Var) -> bool:
        """Whether a slice is read by something that does not read it in place."""
        if self.is_output(var) and self.outermost:
            return True
        return any(
            self.is_copied(eqn.outvars[0]) if relabels(eqn) else _reads_arrays(eqn, var)
            for eqn in self.of(var)
        )


def _splits(readers: _Slices, device: Device) -> Iterator[list[Part]]:
    """The products that are worth it, as their parts."""
    for eqn in readers.eqns:
        if eqn.primitive is not p.dot_general_p or not has_known_cost(eqn):
            continue
        if Size.of(eqn).moved <= LEAST_BYTES:
            continue
        parts = [follow(chain) if chain else None for chain in _chains(eqn, readers)]
        found = [part for part in parts if part is not None and _is_folded(part, readers)]
        if found and len(found) == len(parts):
            yield _chosen(found, readers, device)


def _chains(product: JaxprEqn, readers: _Slices) -> Iterator[tuple[JaxprEqn, ...]]:
    """The ways from a product to the slices of it; an empty one to what reads it whole."""
    stack: list[tuple[JaxprEqn, ...]] = [(product,)]
    while stack:
        chain = stack.pop()
        (var,) = chain[-1].outvars
        if readers.is_output(var):
            yield ()
        for eqn in readers.of(var):
            if eqn.primitive is p.slice_p:
                yield (*chain, eqn)
            elif is_view(eqn) or (eqn.primitive in _FOLDED and eqn.invars.count(var) == 1):
                stack.append((*chain, eqn))
            else:
                yield ()


def _is_folded(part: Part, readers: _Slices) -> bool:
    """Whether all other operands on the way are small."""
    values = {v for eqn in part.chain for v in eqn.outvars}
    operands = [a for eqn in part.chain[1:] for a in eqn.invars]
    others = [a for a in operands if not isinstance(a, Var) or a not in values]
    if not on_same_mesh([*part.product.invars, *others]):
        return False
    columns = Size.of(part.product).batch * part.all_columns
    return all(readers.elements(a) <= columns for a in others)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Columns that are multiplied together.

    Attributes:
      columns: their numbers, in the order of memory.
      parts: the slices of them, from products of their own.
      saved: of these, the ones that are copied now, and not if the product is theirs.
    """

    columns: np.ndarray
    parts: list[Part]
    saved: list[Part]

    def slices(self) -> list[Part]:
        """The slices of these columns, from one product; none if they cannot be."""
        if len(self.parts[0].columns()) == len(self.columns):
            return self.parts
        start, limit = int(self.columns[0]), int(self.columns[-1]) + 1
        if not np.array_equal(self.columns, np.arange(start, limit)):
            return []
        wider = [part.within(start, limit) for part in self.parts]
        return [part for part in wider if part is not None] if None not in wider else []

    def joined(self, other: _Piece) -> _Piece:
        """The columns of both; their slices are copied as before."""
        columns = np.concatenate([self.columns, other.columns])
        return _Piece(columns, [*self.parts, *other.parts], [])

    @property
    def product(self) -> JaxprEqn:
        """The product of these columns, to ask what it costs."""
        return self.slices()[0].alone()

    @property
    def is_large(self) -> bool:
        """Whether cuBLAS is fast, and XLA leaves the product alone."""
        return len(self.columns) >= MIN_COLUMNS and Size.of(self.product).moved > LEAST_BYTES


def _chosen(parts: Sequence[Part], readers: _Slices, device: Device) -> list[Part]:
    """The slices, with what each is computed from; none if one product for all is the fastest."""
    pieces = _pieces(parts, readers)
    products = [piece.product for piece in pieces]
    if not pieces or (len(pieces) > 1 and not all(piece.is_large for piece in pieces)):
        return []

    def copies(values: Iterable[Atom]) -> float:
        sizes = [nbytes(v.aval) for v in values]
        return sum(2 * size / device.bytes_per_us + device.xla_launch_us for size in sizes)

    slices = [part.slice.outvars[0] for piece in pieces for part in piece.saved]
    before = cublas_us(parts[0].product, device) + copies(slices)
    weights = [eqn.invars[parts[0].side] for eqn in products]
    after = sum(cublas_us(eqn, device) for eqn in products) + copies(weights)
    return [part for piece in pieces for part in piece.slices()] if after < before else []


def _pieces(parts: Sequence[Part], readers: _Slices) -> list[_Piece]:
    """A piece for each set of columns, and one for neighbours that gain nothing from their own.

    No pieces if two sets overlap, or are of two operands.
    """
    found: dict[bytes, _Piece] = {}
    for part in parts:
        columns = part.columns()
        piece = found.setdefault(columns.tobytes(), _Piece(columns, [], []))
        piece.parts.append(part)
        if _is_saved(part, readers):
            piece.saved.append(part)
    pieces = sorted(found.values(), key=lambda piece: int(piece.columns[0]))
    read = np.concatenate([piece.columns for piece in pieces])
    if len({part.side for part in parts}) > 1 or len(np.unique(read)) < len(read):
        return []
    result = pieces[:1]
    for piece in pieces[1:]:
        both = result[-1].joined(piece)
        apart = any(one.saved and one.is_large for one in (result[-1], piece))
        result[-1:] = [result[-1], piece] if apart or not both.slices() else [both]
    return result


def _is_saved(part: Part, readers: _Slices) -> bool:
    """Whether a slice is copied, and its part needs no copy."""
    copied = not part.is_one_piece() and readers.is_copied(part.slice.outvars[0])
    return copied and part.is_in_order()


def _reads_arrays(eqn: JaxprEqn, var: Var) -> bool:
    """Whether an equation is a call that reads ``var`` as an array of its own."""
    if eqn.primitive is p.dot_general_p:
        return any(is_in_order(eqn, side) for side in (0, 1) if eqn.invars[side] is var)
    return is_call(eqn)
