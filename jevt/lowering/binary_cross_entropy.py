"""Binary cross entropy and its gradient in the form of fewest operations.

Of a logit x and a label y, with m = exp(-|x|), a program has, however it was spelled,

    y softplus(-x) + (1 - y) softplus(x)      and      (1 - y) σ(x) - y σ(-x),

where softplus(±x) is max(±x, 0) + log(1 + m). With w = 1 - y where x ≥ 0 and y elsewhere they are

    |x| w + log(1 + m)                        and      ±(w - m / (1 + m)),

the sign being x's. Nothing is subtracted that is nearly equal where the former does not, so that
small losses and gradients of hard labels keep their digits; infinities stay what they were.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from jevt.lowering.rewriting import Rewriter, is_op, unsigned
from jevt_kernels import visitor
from jevt_kernels.ops import is_float

#: Factors of a product that is looked at.
_MOST_FACTORS = 8


@dataclasses.dataclass(frozen=True)
class _Term:
    """Plus or minus a product of nodes."""

    negative: bool
    factors: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A softplus or sigmoid of x or -x.

    Attributes:
      x: position of the argument, without its sign.
      negated: whether it is a function of -x.
      exponential: position of exp(-|x|).
      logarithm: position of log(1 + exp(-|x|)) of a softplus, None of a sigmoid.
    """

    x: int
    negated: bool
    exponential: int
    logarithm: int | None


@dataclasses.dataclass(frozen=True)
class _Labelled:
    """A label y, the function that it is multiplied by, and the factors that 1 - y has, too."""

    label: int
    function: _Pair
    others: tuple[int, ...]


def simplify(nodes: Sequence[visitor.Node]) -> Sequence[visitor.Node]:
    """The nodes with binary cross entropies and their gradients spelled as above.

    Args:
      nodes: as :func:`jevt.lowering.sigmoids.share_exponentials` leaves them, no two of them equal,
        each following its operands.

    Returns:
      Nodes in such an order, among them some that nothing reads any more; the same if none changed.
    """
    return _Rewriter(nodes).rewritten()


class _Rewriter(Rewriter):
    def replaced(self, position: int, node: visitor.Compute) -> int | None:
        if node.op not in ("add", "sub") or not is_float(node.dtype):
            return None
        terms = list(itertools.islice(self._terms(position, negative=False), 3))
        if len(terms) != 2:
            return None
        for first, second in (terms, terms[::-1]):
            found = self._complementary(first, second)
            if found is not None:
                return self._write(found, first.negative, second.negative, node.dtype)
        return None

    def _complementary(self, first: _Term, second: _Term) -> _Labelled | None:
        """What is to be known of y·f(…x) and (1 - y)·f(…x), each times other factors."""
        for label, rest in itertools.product(first.factors, second.factors):
            if not self._is_complement(rest, label):
                continue
            mine, yours = _without(first.factors, label), _without(second.factors, rest)
            for f, g in itertools.product(mine, yours):
                a, b = self._pair(f), self._pair(g)
                if a is None or b is None or not _opposite(a, b):
                    continue
                others = sorted(_without(mine, f))
                if others == sorted(_without(yours, g)):
                    return _Labelled(label, a, tuple(others))
        return None

    def _write(
        self, found: _Labelled, negative: bool, rest_negative: bool, dtype: np.dtype
    ) -> int | None:
        """±y·f(…x) ± (1 - y)·f(…x): a loss, of softplus, or the gradient, of sigmoids."""
        logarithm = found.function.logarithm
        if (logarithm is not None) != (negative == rest_negative):
            return None
        x = self.renamed[found.function.x]
        # A label belongs to the function of -x, so that the formula's x may be the other way round.
        if not found.function.negated:
            x = self._compute("neg", dtype, x)
        y = self.renamed[found.label]
        one, zero = (self.add(visitor.Constant(value, dtype)) for value in (1.0, 0.0))
        positive = self._compute("ge", np.dtype(bool), x, zero)
        w = self._compute("select_n", dtype, positive, y, self._compute("sub", dtype, one, y))
        if logarithm is not None:
            size = self._compute("mul", dtype, self._compute("abs", dtype, x), w)
            value = self._compute("add", dtype, size, self.renamed[logarithm])
        else:
            odds = self.renamed[found.function.exponential]
            away = self._compute("sub", dtype, w, self._compute("of_odds", dtype, odds))
            towards = self._compute("neg", dtype, away)
            value = self._compute("select_n", dtype, positive, towards, away)
        for factor in found.others:
            value = self._compute("mul", dtype, value, self.renamed[factor])
        return self._compute("neg", dtype, value) if rest_negative else value

    def _terms(self, position: int, *, negative: bool) -> Iterator[_Term]:
        """What is added up and subtracted."""
        node = self.nodes[position]
        if isinstance(node, visitor.Compute) and node.op in ("add", "sub", "neg"):
            operands = visitor.operands(node)
            if len(operands) == 2:
                yield from self._terms(operands[0], negative=negative)
            yield from self._terms(operands[-1], negative=negative != (node.op != "add"))
            return
        flips, factors = self._factors(position)
        yield _Term(negative != flips, factors)

    def _factors(self, position: int) -> tuple[bool, tuple[int, ...]]:
        """Whether a product is negated, and its factors; itself if they are many."""
        flips, factors, stack = False, list[int](), [position]
        while stack:
            here = stack.pop()
            if self._is(here, "neg"):
                flips = not flips
                stack += visitor.operands(self.nodes[here])
            elif self._is(here, "mul"):
                stack += visitor.operands(self.nodes[here])
            else:
                factors.append(here)
            if len(factors) + len(stack) > _MOST_FACTORS:
                return False, (position,)
        return flips, tuple(factors)

    def _is_complement(self, position: int, label: int) -> bool:
        """Whether a node is 1 - label."""
        node = self.nodes[position]
        if not isinstance(node, visitor.Compute) or node.op != "sub":
            return False
        one, subtracted = node.operands
        constant = self.nodes[one]
        return (
            subtracted == label and isinstance(constant, visitor.Constant) and constant.value == 1
        )

    def _pair(self, position: int) -> _Pair | None:
        """The softplus or sigmoid that a node is."""
        node = self.nodes[position]
        if not isinstance(node, visitor.Compute):
            return None
        if node.op == "logistic_of":
            argument, exponential = node.operands
            return _Pair(*unsigned(self.nodes, argument), exponential, None)
        if node.op != "add":
            return None
        for positive, logarithm in (node.operands, node.operands[::-1]):
            rectified = self._positive_part(positive)
            if rectified is None or not self._is(logarithm, "log1p_of_unit"):
                continue
            (exponential,) = visitor.operands(self.nodes[logarithm])
            pair = _Pair(*unsigned(self.nodes, rectified), exponential, logarithm)
            if self._magnitude(exponential) == pair.x:
                return pair
        return None

    def _positive_part(self, position: int) -> int | None:
        """x of max(x, 0)."""
        if not self._is(position, "max"):
            return None
        x, y = visitor.operands(self.nodes[position])
        for value, zero in ((x, y), (y, x)):
            constant = self.nodes[zero]
            if isinstance(constant, visitor.Constant) and constant.value == 0:
                return value
        return None

    def _magnitude(self, position: int) -> int | None:
        """x, without its sign, of exp(-|x|)."""
        for op in ("exp", "neg", "abs"):
            if not self._is(position, op):
                return None
            (position,) = visitor.operands(self.nodes[position])
        return unsigned(self.nodes, position)[0]

    def _is(self, position: int, op: str) -> bool:
        return is_op(self.nodes[position], op)

    def _compute(self, op: str, dtype: np.dtype, *operands: int) -> int:
        return self.add(visitor.Compute(op, operands, dtype))


def _opposite(a: _Pair, b: _Pair) -> bool:
    """Whether they are the same function, one of x and the other of -x."""
    return a == dataclasses.replace(b, negated=not b.negated)


def _without(factors: Sequence[int], factor: int) -> list[int]:
    """All factors but one."""
    left = list(factors)
    left.remove(factor)
    return left
