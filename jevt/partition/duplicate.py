"""Gives each reader its own copy of what is cheaper to make again than to keep.

EVT's partitions are disjoint sets of nodes; a broadcast that forward and backward pass share would
then be written to memory for one of them. An equation is copied if it reads at most one array,
makes at least as many bytes as it reads, and computes nothing worth mentioning: a broadcast, a
row-major reshape, ``iota``, a cast to a wider type.

No good partition is lost, but for the arithmetic of copies (a cast's), where it takes longer than a
group's traffic. Take a partition of the program without copies; put each copy into its
reader's group. A group that read the result from memory now reads the operand, which has no more
bytes; a group that held the equation to write its result writes the operand, if that was not
written anyway. Nothing becomes cyclic, because a reader ran after the operand's producer before.
Readers that are opaque, and the program's output, keep sharing the original. What the argument
cannot see is a reader whose kernel ``build`` refuses because of its copy, as where views do not
compose: that copy is then a group by itself, at a launch and the bytes of its operand and result.

    before  b:f32[4,8] = broadcast_in_dim a; c = mul x b; d = mul y b; e = dot_general b z
    after   b = broadcast_in_dim a; b' = broadcast_in_dim a; b'' = broadcast_in_dim a;
            c = mul x b'; d = mul y b''; e = dot_general b z
"""

from __future__ import annotations

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jevt import _jaxpr
from jevt.partition.graph import Node, Reading, nbytes

#: Primitives of which copies are made.
_COPIED = frozenset({"broadcast_in_dim", "convert_element_type", "iota", "reshape", "squeeze"})


def duplicate(graph: Reading) -> Jaxpr:
    """The graph's jaxpr with copies.

    Args:
      graph: one node for each equation.
    """
    jaxpr = graph.jaxpr
    readers: dict[Var, list[int | None]] = {v: [] for v in graph.uses}
    for position, eqn in enumerate(jaxpr.eqns):
        for var in dict.fromkeys(v for v in eqn.invars if isinstance(v, Var)):
            readers[var].append(position)
    outputs = {v for v in jaxpr.outvars if isinstance(v, Var)}
    blocks: list[list[JaxprEqn]] = [[eqn] for eqn in jaxpr.eqns]
    # Last to first, so that a chain of such equations is copied as a whole.
    for position in reversed(range(len(jaxpr.eqns))):
        original = blocks[position][0]
        if len(blocks[position]) > 1 or not _cheap(original, graph.nodes[position]):
            continue
        (var,) = original.outvars
        shared = var in outputs
        places = [
            (p, index)
            for p in dict.fromkeys(p for p in readers.get(var, ()) if p is not None)
            for index, eqn in enumerate(blocks[p])
            if var in eqn.invars
        ]
        fusible = [(p, i) for p, i in places if not graph.nodes[p].opaque]
        shared = shared or len(fusible) < len(places)
        copies: list[JaxprEqn] = [original] if shared else []
        for number, (p, index) in enumerate(fusible):
            if number == 0 and not shared:
                copies.append(original)
                continue
            fresh = Var(var.aval)
            copies.append(original.replace(outvars=[fresh]))
            reader = blocks[p][index]
            blocks[p][index] = reader.replace(
                invars=[fresh if v is var else v for v in reader.invars]
            )
        blocks[position] = copies or [original]
    eqns = [eqn for block in blocks for eqn in block]
    return jaxpr if len(eqns) == len(jaxpr.eqns) else jaxpr.replace(eqns=eqns)


def merge_copies(jaxpr: Jaxpr) -> Jaxpr:
    """A group's jaxpr with one equation in place of copies that ended up in it together.

    Two broadcasts of one value would otherwise run along axes that nothing relates. A copy that is
    an output stays under its own name; of several, the first stands for the others.
    """
    twins: dict[Var, Var] = {}  # each copy's variable, to the first copy's
    known: dict[tuple[object, ...], list[JaxprEqn]] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _COPIED:
            operands = [_operand(twins.get(v, v) if isinstance(v, Var) else v) for v in eqn.invars]
            earlier = known.setdefault((eqn.primitive, *operands), [])
            first = next((e for e in earlier if e.params == eqn.params), None)
            if first is None:
                earlier.append(eqn)
            else:
                twins[eqn.outvars[0]] = first.outvars[0]
    if not twins:
        return jaxpr
    outputs = {v for v in jaxpr.outvars if isinstance(v, Var)}
    chosen = {twin: twin for twin in twins.values()}
    chosen |= {
        twin: copy
        for copy, twin in reversed(twins.items())
        if copy in outputs and twin not in outputs
    }
    name = {copy: chosen[twin] for copy, twin in twins.items()} | chosen
    eqns: list[JaxprEqn] = []
    for eqn in jaxpr.eqns:
        invars = [name.get(v, v) if isinstance(v, Var) else v for v in eqn.invars]
        var = eqn.outvars[0] if eqn.outvars else None
        if var in twins and (var not in outputs or var is name[var]):
            continue  # made where the first copy stood
        outvars = [name[var]] if var in chosen else eqn.outvars
        eqns.append(eqn.replace(invars=invars, outvars=outvars))
    return _jaxpr.make(jaxpr.invars, jaxpr.outvars, eqns)


def _operand(atom: Var | Literal) -> object:
    return repr(atom.val) if isinstance(atom, Literal) else atom


def _cheap(eqn: JaxprEqn, node: Node) -> bool:
    if node.opaque or eqn.primitive.name not in _COPIED:
        return False
    operands = [v for v in eqn.invars if not isinstance(v, Literal)]
    if len(operands) > 1 or node.size <= 1:
        return False
    read, made = sum(nbytes(v.aval) for v in operands), nbytes(eqn.outvars[0].aval)
    return node.kind == "source" or node.free or read < made
