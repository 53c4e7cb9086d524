"""The backward pass reads an activation's derivative, not what that is made of. For GPUs.

Purpose: between two layers the gradient is multiplied by an activation's derivative, for a gelu an
erfc and an exponential an element. The backward pass computes that from what the activation read,
which the forward pass writes for it, in the epilogue of a product whose arithmetic is not hidden.
The forward pass has all of it at hand, and an erfc already computed. So it writes the derivative,
as many bytes, and the backward pass is left with a multiplication.

Invariant: the same gradient. The derivative is rounded once more, to the type that the program
computes it in.

How: from the result ``g`` of a product on, element by element, what is linear in ``g`` is ``g``
times a coefficient; where all of that ends in one value, the value becomes one multiplication, by a
coefficient behind a barrier: a barrier, because the partitioner would rather compute it again than
write it, were the product stored in any case. Taken are coefficients that cost something, and that
are made of the result of one product of the forward pass and of what is short. Left alone are those
of 32 bits, whose products are cuBLAS's, so that the derivative would be one write more; those
of what is in memory anyway, as a tanh's of its result, and those beside which what they are
computed from would be read as before.

    before  { lambda ; a:bf16[4096,512] b:bf16[512,512] g:bf16[4096,512] w:bf16[512,512]. let
                c:bf16[4096,512] = dot_general[(([1], [0]), ([], []))] a b
                d:bf16[4096,512] = logistic c; e:bf16[4096,512] = mul d c
                h:bf16[4096,512] = dot_general[(([1], [1]), ([], []))] g w
                i:bf16[4096,512] = mul h d; j:bf16[4096,512] = sub 1.0 d
                k:bf16[4096,512] = mul e j; l:bf16[4096,512] = mul h k
                m:bf16[4096,512] = add i l in (e, m) }
    after   { lambda ; a:bf16[4096,512] b:bf16[512,512] g:bf16[4096,512] w:bf16[512,512]. let
                c:bf16[4096,512] = dot_general[(([1], [0]), ([], []))] a b
                d:bf16[4096,512] = logistic c; e:bf16[4096,512] = mul d c
                h:bf16[4096,512] = dot_general[(([1], [1]), ([], []))] g w
                j:bf16[4096,512] = sub 1.0 d; k:bf16[4096,512] = mul e j
                n:bf16[4096,512] = add d k; o:bf16[4096,512] = optimization_barrier n
                m:bf16[4096,512] = mul h o in (e, m) }
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Callable, Collection, Mapping

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core import primitives as p

from jevt._context import Context
from jevt._jaxpr import Atom, aval
from jevt.lowering.errors import NotFusible
from jevt.lowering.products import PRODUCTS
from jevt.lowering.rules import classify
from jevt.partition.cost import OPERATIONS
from jevt.partition.graph import nbytes
from jevt.passes._facts import is_float, shape_of
from jevt.passes._readers import Readers
from jevt.passes._replace import Replacements, replace
from jevt.passes._rewrite import read
from jevt.passes._rules import Graph, on_same_mesh

#: Operations an element that a coefficient costs at least.
_LEAST_OPERATIONS = 8

#: Bytes of a gradient at least.
LEAST_BYTES = 1 << 20

#: Operations that are linear in one operand, if the other is no function of it.
_LINEAR = frozenset({p.mul_p, p.div_p, p.neg_p, p.add_p, p.sub_p, p.convert_element_type_p})


def run(jaxpr: Jaxpr, context: Context) -> Jaxpr:
    """Keeps derivatives for the backward pass in ``jaxpr`` and in its bodies."""
    return replace(jaxpr, context, _replacements)


def _replacements(jaxpr: Jaxpr, context: Context, outermost: bool) -> Replacements:
    del context, outermost
    program = _Program(jaxpr)
    result: dict[Var, Callable[[Graph], Atom]] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive not in PRODUCTS or nbytes(aval(eqn.outvars[0])) < LEAST_BYTES:
            continue
        found = _linear(program, eqn.outvars[0])
        if found is not None and program.pays(found):
            result[found.end] = functools.partial(_emit, found)
    return result


@dataclasses.dataclass(frozen=True)
class _Linear:
    """What is linear in a gradient, element by element.

    Attributes:
      gradient: the result of a product.
      end: the one value of them that something else reads.
      eqns: that make them, in order.
    """

    gradient: Var
    end: Var
    eqns: tuple[JaxprEqn, ...]

    @property
    def values(self) -> set[Var]:
        return {self.gradient, *(eqn.outvars[0] for eqn in self.eqns)}

    @property
    def factors(self) -> list[Var]:
        """What the coefficients are made of."""
        own = self.values
        read = [a for eqn in self.eqns for a in eqn.invars if isinstance(a, Var)]
        return list(dict.fromkeys(v for v in read if v not in own))


class _Program(Readers):
    """A jaxpr, and of its values their kind and what lies before them.

    Attributes:
      depth: how many equations without a kernel, one after the other.
      kind: the part of its equation in a kernel, "" if it has none.
      position: of its equation.
    """

    def __init__(self, jaxpr: Jaxpr) -> None:
        super().__init__(jaxpr)
        self.depth: dict[Var, int] = {}
        self.kind: dict[Var, str] = {}
        self.position: dict[Var, int] = {}
        # A bit for each product, and those of the products that a value is a function of.
        self._bit: dict[Var, int] = {}
        self._products: dict[Var, int] = {}
        for position, eqn in enumerate(jaxpr.eqns):
            kind = _kind(eqn)
            before = [self.depth.get(a, 0) for a in eqn.invars if isinstance(a, Var)]
            here = max(before, default=0) + (kind in ("", "contraction"))
            if eqn.primitive in PRODUCTS:
                self._bit[eqn.outvars[0]] = 1 << len(self._bit)
            products = self._bit.get(eqn.outvars[0], 0) if eqn.outvars else 0
            for atom in eqn.invars:
                products |= self._products.get(atom, 0) if isinstance(atom, Var) else 0
            for var in eqn.outvars:
                self.depth[var], self.kind[var], self.position[var] = here, kind, position
                self._products[var] = products

    def is_free(self, atom: Atom, of: Var) -> bool:
        """Whether a value is no function of a product's result."""
        if isinstance(atom, Literal):
            return True
        return not self._products.get(atom, 0) & self._bit[of]

    def read_at(self, var: Var) -> list[int]:
        """Where a value is read, in order; equations without results left aside."""
        return [self.position[eqn.outvars[0]] for eqn in self.of(var) if eqn.outvars]

    def is_stored(self, var: Var) -> bool:
        """Whether a value is in memory whatever is done: an equation without a kernel reads it."""
        readers = self.of(var)
        return self.is_output(var) or any(
            self.kind[eqn.outvars[0]] in ("", "contraction") for eqn in readers if eqn.outvars
        )

    def pays(self, found: _Linear) -> bool:
        """Whether the coefficient costs something, and can be made where a product ends."""
        inside = self._inside(found, through=True)
        products = [var for var in inside if self.kind.get(var) == "contraction"]
        if len(products) != 1:
            return False
        (product,) = products
        late, full = self.depth[product], aval(found.end).size
        if self.depth[found.gradient] <= late or self.is_stored(product):
            return False
        if not aval(found.end).dtype.itemsize == aval(product).dtype.itemsize == 2:
            return False
        large = {var for var in inside if aval(var).size == full}
        if not all(self._is_at_hand(var, late) for var in large):
            return False
        again = self._inside(found, through=False)
        if product not in again:  # it follows from what is stored in any case
            return False
        known = large | found.values
        for var in large:
            for eqn in () if self.is_stored(var) else self.of(var):
                if known.isdisjoint(eqn.outvars) and self.depth[eqn.outvars[0]] > late:
                    return False  # it would be kept beside the derivative
        made = [self.eqns[self.position[var]].primitive.name for var in again & large]
        return sum(OPERATIONS.get(name, 1) for name in made) >= _LEAST_OPERATIONS

    def _inside(self, found: _Linear, *, through: bool) -> set[Var]:
        """What the factors are made of, up to products.

        ``through`` what is stored in any case, or not.
        """
        result: set[Var] = set()
        stack = list(found.factors)
        while stack:
            var = stack.pop()
            if var in result:
                continue
            result.add(var)
            if self._is_repeated(var) and (through or not self.is_stored(var)):
                operands = self.eqns[self.position[var]].invars
                stack += [a for a in operands if isinstance(a, Var)]
        return result

    def _is_repeated(self, var: Var) -> bool:
        return self.kind.get(var) in ("pointwise", "view", "source")

    def _is_at_hand(self, var: Var, late: int) -> bool:
        """Whether the kernel of a product, so deep, can compute a value or has it."""
        return self.kind.get(var) == "contraction" or (
            self._is_repeated(var) and self.depth[var] <= late
        )


def _kind(eqn: JaxprEqn) -> str:
    """The part of an equation in a kernel, "" if it has none."""
    try:
        return classify(eqn).kind
    except NotFusible:
        return ""


def _linear(program: _Program, gradient: Var) -> _Linear | None:
    """What is linear in a product's result; None if that has several ends, or is but itself."""
    shape = shape_of(gradient)
    known = {gradient}
    eqns: list[JaxprEqn] = []
    free = functools.partial(program.is_free, of=gradient)
    queue = program.read_at(gradient)
    while queue:  # in the order of the program
        eqn = program.eqns[heapq.heappop(queue)]
        if not known.isdisjoint(eqn.outvars) or not _is_linear(eqn, known, free, shape):
            continue
        known.update(eqn.outvars)
        eqns.append(eqn)
        for position in program.read_at(eqn.outvars[0]):
            heapq.heappush(queue, position)
    made = {id(eqn) for eqn in eqns}
    ends = [
        var
        for var in known
        if program.is_output(var) or any(id(eqn) not in made for eqn in program.of(var))
    ]
    if len(ends) != 1 or ends[0] is gradient:
        return None
    return _Linear(gradient, ends[0], tuple(eqns))


def _is_linear(
    eqn: JaxprEqn, known: Collection[Var], free: Callable[[Atom], bool], shape: tuple[int, ...]
) -> bool:
    if eqn.primitive not in _LINEAR or shape_of(eqn.outvars[0]) != shape:
        return False
    if not is_float(eqn.outvars[0].aval) or eqn.params.get("out_dtype") is not None:
        return False
    if not on_same_mesh(eqn.invars):
        return False
    linear = [isinstance(a, Var) and a in known for a in eqn.invars]
    if eqn.primitive in (p.add_p, p.sub_p):
        return all(linear)
    if eqn.primitive is p.mul_p:
        return any(linear) and any(map(free, eqn.invars))
    return linear[0] and all(map(free, eqn.invars[1:]))


def _emit(found: _Linear, graph: Graph) -> Atom:
    """The gradient times its coefficient."""
    coefficients: dict[Var, Atom | None] = {found.gradient: None}
    for eqn in found.eqns:
        graph.place(eqn)
        coefficients[eqn.outvars[0]] = _coefficient(eqn, coefficients, graph)
    graph.place(found.eqns[-1])
    gradient = graph.convert(read(graph.env, found.gradient), aval(found.end).dtype)
    coefficient = coefficients[found.end]
    assert coefficient is not None  # it costs something
    return graph.mul(gradient, graph.barrier(coefficient))


def _coefficient(eqn: JaxprEqn, known: Mapping[Var, Atom | None], graph: Graph) -> Atom | None:
    """The coefficient of an equation's result; None for 1."""
    type_ = aval(eqn.outvars[0]).dtype

    def number(value: float) -> Atom:
        return graph.literal(value, eqn.outvars[0].aval)

    def of(atom: Atom) -> Atom | None:
        return known[atom] if isinstance(atom, Var) else None

    first, *rest = eqn.invars
    if eqn.primitive is p.convert_element_type_p:
        inner = of(first)
        return None if inner is None else graph.convert(inner, type_)
    if eqn.primitive is p.neg_p:
        inner = of(first)
        return number(-1.0) if inner is None else graph.emit(p.neg_p, inner)
    second = rest[0]
    if eqn.primitive is p.mul_p:
        if not (isinstance(first, Var) and first in known):
            first, second = second, first
        inner, factor = of(first), read(graph.env, second)
        return factor if inner is None else graph.mul(inner, factor)
    if eqn.primitive is p.div_p:
        inner = of(first)
        return graph.emit(p.div_p, number(1.0) if inner is None else inner, read(graph.env, second))
    one, other = (number(1.0) if (c := of(a)) is None else c for a in (first, second))
    return graph.emit(eqn.primitive, one, other)
