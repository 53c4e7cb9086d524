"""What makes and what reads the values of a jaxpr, and which of it needs arrays of their own."""

from __future__ import annotations

from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from jevt._jaxpr import Atom
from jevt.lowering.errors import NotFusible
from jevt.lowering.rules import classify
from jevt.partition.graph import uses
from jevt.passes._facts import shape_of
from jevt.passes._rules import on_same_mesh
from jevt.primitives.attention import attention_backward_p, attention_p
from jevt.primitives.row_products import row_products_p
from jevt.primitives.segments import fused_segment_sum_p, segment_sum_p

#: Calls of libraries and of kernels, and loops: what reads and writes arrays, not slices of them.
_CALLS = frozenset(
    {
        *(attention_p, attention_backward_p, segment_sum_p, fused_segment_sum_p, row_products_p),
        *(p.conv_general_dilated_p, p.fft_p, p.scan_p, p.while_p, p.cond_p),
        *(p.psum_p, p.all_gather_p, p.all_to_all_p, p.ppermute_p, p.ragged_all_to_all_p),
    }
)

#: Others, whose primitives JAX does not export.
_CALLS_BY_NAME = frozenset(
    {"ffi_call", "pallas_call", "triton_kernel_call", "psum_invariant", "reduce_scatter"}
)


class Readers:
    """A jaxpr, and what makes and reads its values.

    Attributes:
      eqns: its equations.
    """

    def __init__(self, jaxpr: Jaxpr) -> None:
        self.eqns = jaxpr.eqns
        self._positions = uses(jaxpr)
        self._makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}

    def of(self, var: Var) -> list[JaxprEqn]:
        """The equations that read a value, in order."""
        found = self._positions.get(var, ())
        return [self.eqns[i] for i in sorted(i for i in found if i is not None)]

    def is_output(self, var: Var) -> bool:
        return None in self._positions.get(var, ())

    def maker(self, atom: Atom) -> JaxprEqn | None:
        """The equation that computes a value; None for inputs and literals."""
        return self._makers.get(atom) if isinstance(atom, Var) else None


def is_call(eqn: JaxprEqn) -> bool:
    """Whether an equation is a call or a loop, whose operands and results are arrays."""
    return eqn.primitive in _CALLS or eqn.primitive.name in _CALLS_BY_NAME


def has_known_cost(product: JaxprEqn) -> bool:
    """Whether a product has elements, types whose cost is known, and is not sharded."""
    try:
        classify(product)
    except NotFusible:
        return False
    if not on_same_mesh(product.invars):
        return False
    if any(0 in shape_of(atom) for atom in (*product.invars, *product.outvars)):
        return False
    return product.params.get("out_sharding") is None


def is_in_order(product: JaxprEqn, side: int) -> bool:
    """Whether cuBLAS takes an operand as it is: its batch first, its other axes in two blocks."""
    contracted, batch = product.params["dimension_numbers"]
    pairs = sorted(zip(contracted[side], contracted[1 - side], strict=True))
    own, others = [own for own, _ in pairs], [other for _, other in pairs]
    rest = list(range(len(batch[side]), len(shape_of(product.invars[side]))))
    first, last = rest[: len(own)], rest[len(rest) - len(own) :]
    whole_batch = list(batch[side]) == list(range(len(batch[side])))
    return whole_batch and own in (first, last) and others == sorted(others)
