"""Gives each reader its own copy of what is cheaper to make again than to keep.

EVT's partitions are disjoint sets of nodes; a broadcast that forward and backward pass share would
then be written to memory for one of them. An equation is copied if it reads at most one array,
makes at least as many bytes as it reads, and computes nothing worth mentioning: a broadcast, a
row-major reshape, ``iota``, a cast to a wider type.

No good partition is lost. Take a partition of the program without copies; put each copy into its
reader's group. A group that read the result from memory now reads the operand, which has no more
bytes; a group that held the equation to write its result writes the operand, if that was not
written anyway. Nothing becomes cyclic, because a reader ran after the operand's producer before.
Readers that are opaque, and the program's output, keep sharing the original.

    before  b:f32[4,8] = broadcast_in_dim a; c = mul x b; d = mul y b; e = dot_general b z
    after   b = broadcast_in_dim a; b' = broadcast_in_dim a; b'' = broadcast_in_dim a;
            c = mul x b'; d = mul y b''; e = dot_general b z
"""

from __future__ import annotations

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jevt.partition.graph import Graph, Node, nbytes


def duplicate(graph: Graph) -> Jaxpr:
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


def _cheap(eqn: JaxprEqn, node: Node) -> bool:
    if node.opaque or len(eqn.outvars) != 1:
        return False
    operands = [v for v in eqn.invars if not isinstance(v, Literal)]
    if len(operands) > 1 or node.size <= 1:
        return False
    read, made = sum(nbytes(v.aval) for v in operands), nbytes(eqn.outvars[0].aval)
    if node.kind == "source":
        return eqn.primitive.name in ("broadcast_in_dim", "iota")
    if node.kind == "view":
        return node.free or read < made
    return eqn.primitive.name == "convert_element_type" and read < made
