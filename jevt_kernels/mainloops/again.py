"""Comparisons of columns with a row's number that are made again rather than kept.

A whole row that fills a thread's registers leaves none for a label's mask, of which a gradient
makes a choice after the loss has made a sum of it. The compiler would keep the mask, 32 booleans a
thread: what it is made of comes by a move that the compiler does not see through. A cross entropy
with one-hot labels [16384, 30528] in bfloat16 spills 0 bytes rather than 80 (sm_90, Triton 3.6).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer
from jevt_kernels.mainloops.picks import compared_column

#: What a row's number may be.
_REMADE = (visitor.Load, visitor.Compute, visitor.Reduce)


def print_stores(printer: Printer, picked: Collection[int]) -> None:
    """Prints all stores of whole rows, after all reductions.

    Args:
      printer: of the kernel.
      picked: reductions that have not looked at the whole row.
    """
    masks = _masks_of_both(printer, picked)
    if not masks:
        printer.store_all(printer.stores())
        return
    tree, stores = printer.spec.tree, printer.stores()
    roots = [operand for store in stores for operand in visitor.operands(tree[store])]
    known: dict[int, str] = {}
    for position in visitor.ancestors(tree, *roots, known=(visitor.Reduce,)):
        below = visitor.ancestors(tree, position, known=(visitor.Reduce,))
        if masks.keys().isdisjoint(below) and not printer.is_constant(position):
            known[position] = printer.value(position)
    with printer.viewing(dataclasses.replace(printer.view, prefix="w")):
        for position, name in known.items():
            printer.set_value(position, name)
        for column in dict.fromkeys(masks.values()):
            name = f"w{column}"
            printer.line(f"{name} = dm.opaque({known[column]}, 'mov.b32 $0, $1;')")
            printer.set_value(column, name)
        printer.store_all(stores)


def _masks_of_both(printer: Printer, picked: Collection[int]) -> dict[int, int]:
    """Comparisons that both a reduction and a store need, and the numbers that they are with."""
    tree = printer.spec.tree
    sums = [
        operand
        for position, node in enumerate(tree)
        if isinstance(node, visitor.Reduce) and position not in picked
        for operand in visitor.operands(node)
    ]
    stored = [o for n in tree if isinstance(n, visitor.Store) for o in visitor.operands(n)]
    early = visitor.ancestors(tree, *sums, known=(visitor.Reduce,))
    late = visitor.ancestors(tree, *stored, known=(visitor.Reduce,))
    found: dict[int, int] = {}
    for position in sorted({*early} & {*late}):
        column = compared_column(printer.spec, position)
        if column is None or not isinstance(tree[column], _REMADE):
            continue
        if printer.node_dtype(column) == np.dtype("int32"):
            found[position] = column
    return found
