"""Sigmoids and softplus of one argument from one exponential.

A binary cross entropy and its gradient ask for σ(x), σ(-x) and log(1 + exp(-|x|)) of every logit.
With m = exp(-|x|), which never overflows, σ(x) is 1 / (1 + m) where x ≥ 0 and m / (1 + m)
elsewhere; σ(-x) is the other of the two; and log1p is wanted between 0 and 1 only. A kernel that
computes all three from m takes a third of the instructions, to the same accuracy.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from jevt.lowering.rewriting import is_op, unsigned
from jevt_kernels import visitor


def share_exponentials(nodes: Sequence[visitor.Node]) -> list[visitor.Node]:
    """The nodes with sigmoids from the exponential of what else reads their argument.

    Args:
      nodes: in an order in which each follows its operands, stores included.

    Returns:
      Nodes in such an order, among them some that nothing reads any more.
    """
    arguments = {
        position: found
        for position, node in enumerate(nodes)
        if isinstance(node, visitor.Compute) and (found := _argument(nodes, node)) is not None
    }
    uses = collections.Counter(arguments.values())
    logarithms = {
        position
        for position, node in enumerate(nodes)
        if is_op(node, "log1p") and (m := visitor.operands(node)[0]) in arguments
        if is_op(nodes[m], "exp")
    }
    softplus = {arguments[visitor.operands(nodes[position])[0]] for position in logarithms}
    result: list[visitor.Node] = []
    renamed: dict[int, int] = {}
    exponentials: dict[int, int] = {}

    def add(node: visitor.Node) -> int:
        result.append(node)
        return len(result) - 1

    def exponential(argument: int, like: visitor.Compute) -> int:
        if argument not in exponentials:
            position = renamed[argument]
            for op in ("abs", "neg", "exp"):
                position = add(visitor.Compute(op, (position,), like.dtype))
            exponentials[argument] = position
        return exponentials[argument]

    for position, original in enumerate(nodes):
        node = visitor.reading(original, renamed)
        argument = arguments.get(position)
        if isinstance(node, visitor.Compute) and argument is not None:
            if uses[argument] > 1 or argument in softplus:
                m = exponential(argument, node)
                if node.op == "exp":
                    renamed[position] = m
                    continue
                node = dataclasses.replace(node, op="logistic_of", operands=(*node.operands, m))
        elif isinstance(node, visitor.Compute) and position in logarithms:
            node = dataclasses.replace(node, op="log1p_of_unit")
        renamed[position] = add(node)
    return result


def _argument(nodes: Sequence[visitor.Node], node: visitor.Compute) -> int | None:
    """The x, without its sign, of σ(±x) or exp(-|±x|)."""
    if node.op == "logistic":
        return unsigned(nodes, node.operands[0])[0]
    if node.op != "exp" or not is_op(nodes[node.operands[0]], "neg"):
        return None
    (magnitude,) = visitor.operands(nodes[node.operands[0]])
    if not is_op(nodes[magnitude], "abs"):
        return None
    return unsigned(nodes, visitor.operands(nodes[magnitude])[0])[0]
