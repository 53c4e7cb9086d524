"""Parts of long rows: the first kernel of what ``jevt_kernels.mainloops.long_rows`` makes of a row.

Every output that follows a reduction along ``col`` has one axis more, the last: the parts of a row.
Each is reduced by a program of its own, which walks blocks of columns and leaves what it knows;
sums relative to a maximum (``mainloops.passes``) are relative to that of the part. All reductions
are made in one pass. Full tiles are stored on the way.
"""

from __future__ import annotations

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer
from jevt_kernels.mainloops.passes import passes
from jevt_kernels.mainloops.pointwise import blocks_along
from jevt_kernels.mainloops.reduction import Reduction, hoist, reductions, store_part
from jevt_kernels.mainloops.sweep import Sweep
from jevt_kernels.spec import Config, KernelSpec, UnsupportedKernel

SMALLEST_BLOCK = 1

#: Columns and warps of a tile.
TILES = ((4096, 8), (2048, 8), (8192, 16))


def configs(spec: KernelSpec) -> tuple[Config, ...]:
    """Configurations worth trying, the preferred one first."""
    del spec
    return tuple(Config((("row", 1), ("col", block)), warps) for block, warps in TILES)


def emit(printer: Printer) -> int:
    """Prints the body; a program instance for each part of each row."""
    spec, config = printer.spec, printer.config
    known = reductions(printer, "col")
    plan = passes(spec)
    if len(plan.of) != 1:
        raise UnsupportedKernel(f"expected reductions of one pass over a row, got {len(plan.of)}")
    partial_stores = [(r, s) for r in known for s in _stores_of(printer, r)]
    others = [s for s in printer.stores() if s not in [store for _, store in partial_stores]]
    number = _count(printer, partial_stores)
    printer.constants()
    printer.line(f"pid = {printer.program_id()}")
    printer.line(f"part = pid % {number}")
    printer.tile_index("row", f"pid // {number} * BLOCK_ROW")
    sweep = Sweep(printer, plan, 0)
    sweep.start()
    hoist(printer, [o for s in others for o in visitor.operands(spec.tree[s])], "col")
    column_blocks = blocks_along(spec.space, config, "col")
    printer.open_loop("block", "part", column_blocks, str(number))
    printer.tile_index("col", "block * BLOCK_COL")
    sweep.accumulate()
    printer.store_all(others)
    printer.close()
    for reduction, store in partial_stores:
        store_part(printer, reduction, store, sweep.partial(reduction), "part")
    return blocks_along(spec.space, config, "row") * number


def _count(printer: Printer, stores: list[tuple[Reduction, int]]) -> int:
    """The number of parts of a row."""
    _, store = stores[0]
    node = printer.spec.tree[store]
    assert isinstance(node, visitor.Store)
    return printer.spec.outputs[node.output].shape[-1]


def _stores_of(printer: Printer, reduction: Reduction) -> list[int]:
    tree = printer.spec.tree
    return [s for s in printer.stores() if visitor.operands(tree[s]) == (reduction.position,)]
