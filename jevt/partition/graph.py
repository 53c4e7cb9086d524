"""The graph that is partitioned: equations as nodes, variables as tensors between them.

EVT (ASPLOS 2024, section 5) partitions "the joint forward and backward graph" into groups. Here
that graph is read off a jaxpr: a node is an equation (or several, once :mod:`.contract` has joined
those that no good partition separates), a tensor is a variable with its size, its producer and its
consumers. What a node can do inside a kernel is asked from ``lowering.rules.classify``; a node that
it refuses, an equation with effects and a barrier are *opaque*: groups of their own that others
order themselves around.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from jax.extend.core import Jaxpr, JaxprEqn, Var

from jevt import _jaxpr
from jevt.lowering.errors import NotFusible
from jevt.partition import epilogues

type NodeKind = Literal["pointwise", "view", "reduction", "contraction", "source", "opaque"]


class Role(Protocol):
    """What ``lowering.rules.classify`` says of an equation."""

    @property
    def kind(self) -> Literal["pointwise", "view", "reduction", "contraction", "source"]: ...

    @property
    def axes(self) -> tuple[int, ...]: ...


type Classify = Callable[[JaxprEqn], Role]

#: Primitives that carry no computation and must stay where they are: nothing may be joined across
#: them.
BARRIERS = frozenset({"optimization_barrier"})

#: For each primitive whose body is a program of its own: the parameters that are partitioned
#: separately. Every other jaxpr among parameters (a comparator, a scatter's combiner) belongs to
#: its equation.
BODIES: Mapping[str, frozenset[str]] = {
    "scan": frozenset({"jaxpr"}),
    "while": frozenset({"cond_jaxpr", "body_jaxpr"}),
    "cond": frozenset({"branches"}),
    "shard_map": frozenset({"jaxpr"}),
    "jit": frozenset({"jaxpr"}),
    "pjit": frozenset({"jaxpr"}),
    "closed_call": frozenset({"call_jaxpr"}),
    "core_call": frozenset({"call_jaxpr"}),
    "remat2": frozenset({"jaxpr"}),
    "checkpoint": frozenset({"jaxpr"}),
    "custom_jvp_call": frozenset({"call_jaxpr"}),
    "custom_vjp_call": frozenset({"call_jaxpr"}),
}


@dataclasses.dataclass(frozen=True)
class Node:
    """Equations that stay together whatever the partition.

    Attributes:
      eqns: positions in the jaxpr, ascending.
      kind: the part it plays; "reduction" or "contraction" if any of its equations is one.
      size: number of points that a kernel has to visit for it; of a matrix product, its elements.
      cols: length of the rows, 0 without a reduction. A reduction along rows (over all axes but the
        contiguous ones) has the rows that it keeps.
      ends: positions of equations whose results are only known after the whole kernel: reductions
        along rows and what relabels them. Nothing else in the same group can read these.
      assumed: some positions in ``ends`` were joined to the others without proof (see
        :mod:`.absorb`).
      loose: a leaf that is only to be with what it reads, or alone (see :mod:`.absorb`).
      unproven: equations of each leaf that was joined to the others though that may lose something.
      free: only relabels its operand's bytes (a row-major reshape), so that XLA runs it for
        nothing.
      reason: for opaque nodes, why.
      fallback: for opaque nodes, whether the reason is a lack of jevt (see ``Group.fallback``).
    """

    eqns: tuple[int, ...]
    kind: NodeKind
    size: int = 0
    cols: int = 0
    ends: tuple[int, ...] = ()
    assumed: bool = False
    loose: bool = False
    unproven: tuple[tuple[int, ...], ...] = ()
    free: bool = False
    reason: str = ""
    fallback: bool = False

    @property
    def opaque(self) -> bool:
        return self.kind == "opaque"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A variable.

    Attributes:
      producer: node, None for an input of the jaxpr.
      consumers: nodes, ascending, without the producer.
      read_bytes: for each consumer, what it reads of it (a slice reads only a part).
      escapes: is an output of the jaxpr.
      late: is a result of an equation in ``Node.ends``.
    """

    var: Var
    size: int
    nbytes: int
    producer: int | None
    consumers: tuple[int, ...]
    read_bytes: tuple[int, ...]
    escapes: bool
    late: bool = False


@dataclasses.dataclass(frozen=True)
class Reading:
    """Nodes in an executable order.

    Attributes:
      jaxpr: what the positions in ``Node.eqns`` refer to.
    """

    jaxpr: Jaxpr
    nodes: tuple[Node, ...]

    @functools.cached_property
    def uses(self) -> dict[Var, set[int | None]]:
        """Positions of the equations that read a variable; None stands for the jaxpr's output."""
        return uses(self.jaxpr)

    @functools.cached_property
    def apart(self) -> frozenset[Var]:
        """Results of equations that XLA leaves out of its calls of cuBLAS."""
        return epilogues.apart(self.jaxpr)


@dataclasses.dataclass(frozen=True)
class Graph(Reading):
    """Nodes in an executable order, with the tensors between them.

    Attributes:
      tensors: only those that cross between nodes or the jaxpr's border.
      reads, writes: for each node, positions in ``tensors``.
      successors, predecessors: for each node, nodes that depend on it and that it depends on,
        through tensors and through the order of effects.
    """

    tensors: tuple[Tensor, ...]
    reads: tuple[tuple[int, ...], ...]
    writes: tuple[tuple[int, ...], ...]
    successors: tuple[tuple[int, ...], ...]
    predecessors: tuple[tuple[int, ...], ...]

    def extract(self, positions: Iterable[int]) -> Jaxpr:
        """``_jaxpr.extract``, without a look at all the other equations."""
        return self.sequence(sorted(positions))

    def sequence(self, chosen: Sequence[int]) -> Jaxpr:
        """The equations as a jaxpr of their own, in the given order."""
        members = set(chosen)
        defined: set[Var] = set()
        inputs: dict[Var, None] = {}
        outputs: list[Var] = []
        for position in chosen:
            eqn = self.jaxpr.eqns[position]
            for atom in eqn.invars:
                if isinstance(atom, Var) and atom not in defined:
                    inputs.setdefault(atom)
            for var in eqn.outvars:
                defined.add(var)
                users = self.uses.get(var)
                if users is not None and (None in users or not users <= members):
                    outputs.append(var)
        return _jaxpr.make(list(inputs), outputs, [self.jaxpr.eqns[p] for p in chosen])


def uses(jaxpr: Jaxpr) -> dict[Var, set[int | None]]:
    """For each variable that is read, the positions of its readers; None stands for the output."""
    result: dict[Var, set[int | None]] = {}
    for position, eqn in enumerate(jaxpr.eqns):
        for atom in eqn.invars:
            if isinstance(atom, Var):
                result.setdefault(atom, set()).add(position)
    for atom in jaxpr.outvars:
        if isinstance(atom, Var):
            result.setdefault(atom, set()).add(None)
    return result


def read(jaxpr: Jaxpr, classify: Classify) -> Reading:
    """One node for each equation, in the jaxpr's order."""
    return Reading(jaxpr, tuple(_node(i, eqn, classify) for i, eqn in enumerate(jaxpr.eqns)))


def from_jaxpr(jaxpr: Jaxpr, classify: Classify) -> Graph:
    """The graph with one node for each equation, in the jaxpr's order."""
    return assemble(jaxpr, read(jaxpr, classify).nodes)


def assemble(jaxpr: Jaxpr, nodes: Sequence[Node]) -> Graph:
    """The graph over ``nodes``, which cover every equation once and are in an executable order."""
    owner = {position: index for index, node in enumerate(nodes) for position in node.eqns}
    producer = {
        var: owner[position] for position, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars
    }
    read_bytes: dict[Var, dict[int, int]] = {}
    for position, eqn in enumerate(jaxpr.eqns):
        for atom in eqn.invars:
            if isinstance(atom, Var):
                per_node = read_bytes.setdefault(atom, {})
                node = owner[position]
                per_node[node] = max(per_node.get(node, 0), _bytes_read(eqn, atom))
    late = {v for node in nodes for p in node.ends for v in jaxpr.eqns[p].outvars}
    escaping = {v for v in jaxpr.outvars if isinstance(v, Var)}
    # In order of definition: a set's order would differ between equal layers, and from run to run.
    defined = [v for eqn in jaxpr.eqns for v in eqn.outvars if v in escaping]
    reads: list[list[int]] = [[] for _ in nodes]
    writes: list[list[int]] = [[] for _ in nodes]
    tensors: list[Tensor] = []
    for var in dict.fromkeys([*read_bytes, *defined]):
        source = producer.get(var)
        consumers = tuple(sorted(n for n in read_bytes.get(var, ()) if n != source))
        if not consumers and (source is None or var not in escaping):
            continue
        for node in consumers:
            reads[node].append(len(tensors))
        if source is not None:
            writes[source].append(len(tensors))
        tensors.append(
            Tensor(
                var,
                elements(var.aval),
                nbytes(var.aval),
                source,
                consumers,
                tuple(read_bytes[var][n] for n in consumers),
                var in escaping,
                var in late,
            )
        )
    edges: list[dict[int, None]] = [{} for _ in nodes]
    for tensor in tensors:
        if tensor.producer is not None:
            edges[tensor.producer].update(dict.fromkeys(tensor.consumers))
    with_effects = [owner[p] for p, eqn in enumerate(jaxpr.eqns) if eqn.effects]
    for before, after in itertools.pairwise(with_effects):
        edges[before][after] = None
    predecessors: list[list[int]] = [[] for _ in nodes]
    for node, after_node in enumerate(edges):
        for after in after_node:
            predecessors[after].append(node)
    return Graph(
        jaxpr,
        tuple(nodes),
        tuple(tensors),
        tuple(map(tuple, reads)),
        tuple(map(tuple, writes)),
        tuple(tuple(sorted(e)) for e in edges),
        tuple(map(tuple, predecessors)),
    )


def nbytes(aval: Any) -> int:
    """Bytes of a dense array; 0 for what is not one (tokens, references)."""
    dtype = getattr(aval, "dtype", None)
    return elements(aval) * int(getattr(dtype, "itemsize", 0))


def shrinks(eqn: JaxprEqn, var: Var) -> bool:
    """Whether the equation sees only a part of ``var``: then it cannot join its producer."""
    if eqn.primitive.name not in ("slice", "dynamic_slice"):
        return False
    return elements(eqn.outvars[0].aval) < elements(var.aval)


def _node(position: int, eqn: JaxprEqn, classify: Classify) -> Node:
    name = eqn.primitive.name
    if eqn.effects:
        return Node((position,), "opaque", reason=f"effect: {name}")
    if name in BARRIERS:
        return Node((position,), "opaque", reason=f"barrier: {name}")
    if name in BODIES:
        return Node(
            (position,), "opaque", reason=f"no mainloop: {name} (its body has a plan of its own)"
        )
    try:
        role = classify(eqn)
    except NotFusible as refusal:
        reason = str(refusal)
        return Node((position,), "opaque", reason=reason, fallback=unexpected(reason))
    if any(elements(a.aval) == 0 for a in (*eqn.invars, *eqn.outvars)):
        return Node((position,), "opaque", reason="cost model: no elements")
    size = max(elements(v.aval) for v in eqn.outvars)
    if role.kind == "reduction":
        operand: Any = eqn.invars[0].aval
        return _reduction(position, operand.shape, role)
    if role.kind == "pointwise":
        size = max(size, *(elements(a.aval) for a in eqn.invars))
    operands = [a for a in eqn.invars if isinstance(a, Var)]
    kind: NodeKind = role.kind if operands else "source"
    return Node((position,), kind, size, free=_relabels(eqn, kind))


def _reduction(position: int, shape: Sequence[int], role: Role) -> Node:
    size, axes = math.prod(shape), role.axes
    reduced = math.prod(shape[a] for a in axes)
    if reduced == 1:  # over axes of size 1: relabels
        return Node((position,), "pointwise", size)
    inner = max(a for a, extent in enumerate(shape) if extent > 1)
    if inner in axes:
        return Node((position,), "reduction", size, reduced)
    return Node((position,), "reduction", size, size // reduced, ends=(position,))


def _relabels(eqn: JaxprEqn, kind: NodeKind) -> bool:
    """Whether a view keeps the row-major order of its operand's elements."""
    if kind != "view" or eqn.primitive.name not in ("reshape", "squeeze", "broadcast_in_dim"):
        return False
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    return len(eqn.invars) == 1 and elements(before) == elements(after)


def unexpected(reason: str) -> bool:
    """Whether an equation without a mainloop is a lack of jevt rather than outside its scope."""
    expected = reason.startswith(("no mainloop", "one call")) or "stays with XLA" in reason
    return not expected


def _bytes_read(eqn: JaxprEqn, var: Var) -> int:
    return nbytes(eqn.outvars[0].aval if shrinks(eqn, var) else var.aval)


def elements(aval: Any) -> int:
    """Number of elements of an array; axes of unknown size count as 1."""
    shape = getattr(aval, "shape", ())
    size = math.prod(shape)
    if isinstance(size, int):
        return size
    return math.prod(extent for extent in shape if isinstance(extent, int))
