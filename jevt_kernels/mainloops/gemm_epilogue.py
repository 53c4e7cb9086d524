"""The epilogue of a matrix product: what is computed from a tile of the result, and its stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer
from jevt_kernels.mainloops import gemm_tiles, product
from jevt_kernels.mainloops.pointwise import blocks_along
from jevt_kernels.mainloops.product import Product
from jevt_kernels.mainloops.reduction import Reduction, hoist, store_partial
from jevt_kernels.mainloops.schedule import schedule
from jevt_kernels.ops import TRITON_TYPES, compute_dtype, is_float, triton_type
from jevt_kernels.spec import KernelSpec, Partial, UnsupportedKernel
from jevt_kernels.view import View, dimension
from jevt_kernels.visitor import Compute

_M, _N = dimension("m"), dimension("n")

#: The tile of the result.
RESULT = View((_M, _N))


def emit(printer: Printer, found: Product, layout: str = "") -> None:
    """Prints what follows the loop along ``k``, which left its sum in ``acc``.

    Args:
      printer: of the kernel, without a view of the result.
      found: its product.
      layout: in Gluon: the name of the layout in which values of a part of the tile are computed.
        It is that of ``acc`` only where ``k`` is split.
    """
    subtiles = printer.config.subtiles
    if printer.config.splits > 1:
        with printer.viewing(RESULT.in_layout(layout)):
            _store_parts(printer, found)
        return
    if subtiles == 1:
        reduced = [s for s in printer.stores() if _is_reduced(printer, s)]
        with printer.viewing(RESULT.in_layout(layout)):
            _take(printer, found, "acc", layout)
            _finish(printer, found, reduced, 0)
        return
    emit_parts(printer, found, _split(printer, "acc", subtiles), layout)


def hold(printer: Printer, found: Product) -> list[str]:
    """Prints the division of the sum in ``acc`` into parts along ``n``; returns their names.

    They are rounded if all that reads them rounds them first, so that they take less registers.
    """
    dtype = rounded(printer.spec, found)
    printer.line(f"held = acc.to({TRITON_TYPES[dtype]})" if dtype is not None else "held = acc")
    return _split(printer, "held", printer.config.subtiles)


def emit_parts(
    printer: Printer,
    found: Product,
    names: Sequence[str],
    layout: str = "",
    between: Callable[[int], None] | None = None,
) -> None:
    """Prints the epilogue of parts of a tile along ``n``, one after the other.

    Args:
      printer: of the kernel, without a view of the result.
      found: its product.
      names: of the parts of the product.
      layout: as for :func:`emit`.
      between: prints other work between a part's loads and its arithmetic.
    """
    tree, subtiles = printer.spec.tree, len(names)
    reduced = [s for s in printer.stores() if _is_reduced(printer, s)]
    with printer.viewing(RESULT.in_layout(layout)):
        hoist(printer, [o for s in printer.stores() for o in visitor.operands(tree[s])], "n")
    size = f"BLOCK_N // {subtiles}"
    for number, name in enumerate(names):
        view = View((_M, dimension("n", f"n{number}", size)), layout=layout)
        with printer.viewing(view), printer.forgetting():
            printer.tile_index("n", f"pid_n * BLOCK_N + {number} * ({size})")
            if between is not None:
                loads = product.epilogue_loads(printer.spec, found, frozenset("n"))
                loaded = load_ahead(printer, loads)
                between(number)
                use_loaded(printer, loaded)
            _take(printer, found, name, layout)
            _finish(printer, found, reduced, number)


def load_ahead(printer: Printer, loads: Sequence[int]) -> dict[int, str]:
    """Prints loads of the epilogue; returns the names that hold what memory holds."""
    names = {position: f"ahead{position}" for position in loads}
    for position, name in names.items():
        node = printer.spec.tree[position]
        assert isinstance(node, visitor.Load)
        printer.line(f"{name} = {printer.load_stored(node, printer.dependencies[position])}")
    return names


def use_loaded(printer: Printer, loaded: dict[int, str]) -> None:
    """Prints the conversions of what was loaded ahead to the types of kernels' arithmetic."""
    for position, name in loaded.items():
        stored = printer.node_dtype(position)
        if (dtype := compute_dtype(stored)) != stored:
            printer.line(f"v{position} = {name}.to({TRITON_TYPES[dtype]})")
            name = f"v{position}"
        printer.set_value(position, name)


def _store_parts(printer: Printer, found: Product) -> None:
    """Prints the stores of the sum over a part of ``k``."""
    for position in printer.stores():
        node = printer.spec.tree[position]
        assert isinstance(node, visitor.Store)
        varies = printer.stored_along(node)
        size = printer.spec.outputs[node.output].size
        arguments = [f"y{node.output} + part_pid * {size} + {printer.store_address(node)}", "acc"]
        if mask := printer.mask(varies):
            arguments.append(f"mask={mask}")
        printer.line(f"tl.store({', '.join(arguments)})")
        splits = printer.config.splits
        printer.partials.append(Partial(node.output, splits, "sum", found.node.dtype))


def _take(printer: Printer, found: Product, name: str, layout: str) -> None:
    """Declares that ``name`` holds the product; converts its layout.

    A product that is only read rounded to 16 bits is rounded before, so that less is moved.
    """
    if not layout:
        printer.set_value(found.position, name)
        return
    dtype = rounded(printer.spec, found)
    value = name if dtype is None else f"{name}.to({TRITON_TYPES[dtype]})"
    printer.line(f"{name} = gl.convert_layout({value}, {layout})")
    printer.set_value(found.position, name)
    if dtype is None:
        return
    for position, node in _readers(printer.spec, found).items():
        if not isinstance(node, visitor.Store):
            printer.line(f"v{position} = {name}.to({triton_type(dtype)})")
            printer.set_value(position, f"v{position}")


def rounded(spec: KernelSpec, found: Product) -> np.dtype | None:
    """The 16-bit type to which all that read the product round it, None if there is none."""
    types: set[np.dtype | None] = set()
    for node in _readers(spec, found).values():
        if isinstance(node, visitor.Store):
            types.add(spec.outputs[node.output].dtype)
        else:
            types.add(node.dtype if isinstance(node, Compute) and node.op == "convert" else None)
    dtype = types.pop() if len(types) == 1 else None
    return dtype if dtype is not None and is_float(dtype) and dtype.itemsize == 2 else None


def _readers(spec: KernelSpec, found: Product) -> dict[int, visitor.Node]:
    return {p: n for p, n in enumerate(spec.tree) if found.position in visitor.operands(n)}


def _split(printer: Printer, name: str, parts: int) -> list[str]:
    """Prints the division of a tile of the result into parts along ``n``; returns their names."""
    if parts & (parts - 1) or printer.config.block("n") // parts < 16:
        raise UnsupportedKernel(f"tiles {printer.config.blocks} have no {parts} parts along n")
    tiles = [name]
    count = 1
    while count < parts:
        count *= 2
        halves = []
        for tile in tiles:
            pair = [f"{tile}_{half}" for half in (0, 1)]
            shape = f"(BLOCK_M, 2, BLOCK_N // {count})"
            printer.line(
                f"{', '.join(pair)} = tl.split(tl.permute(tl.reshape({tile}, {shape}), (0, 2, 1)))"
            )
            halves += pair
        tiles = halves
    return tiles


def _is_reduced(printer: Printer, store: int) -> bool:
    (operand,) = visitor.operands(printer.spec.tree[store])
    return isinstance(printer.spec.tree[operand], visitor.Reduce)


def _finish(printer: Printer, found: Product, reduced: list[int], subtile: int) -> None:
    """Prints the values and stores of a subtile, and the partial results of its reductions."""
    tree = printer.spec.tree
    known = product.parts_of(tree, found.position)
    tiles = {p for p, varies in enumerate(printer.dependencies) if {"m", "n"} <= varies}
    order = schedule(tree, printer.stores(), known, tiles)
    stores = [p for p in order if isinstance(tree[p], visitor.Store) and p not in reduced]
    # A store in place follows the loads of what it replaces.
    last = stores if printer.spec.aliases else []
    for position in [*(p for p in order if p not in last), *last]:
        if position in reduced:
            _store_reduced(printer, position, subtile)
        elif position in stores:
            printer.store(position)
        elif isinstance(tree[position], visitor.Reduce):
            reduction = Reduction(printer, position)
            reduction.finish(reduction.masked())
        elif not printer.is_constant(position):
            printer.value(position)


def _store_reduced(printer: Printer, store: int, subtile: int) -> None:
    """Prints the store of a subtile's part of a reduction; along ``n`` each subtile leaves one."""
    tree, space, config = printer.spec.tree, printer.spec.space, printer.config
    (root,) = visitor.operands(tree[store])
    over = set()
    position = root
    while isinstance(node := tree[position], visitor.Reduce):
        over.add(node.over)
        position = node.operand
    rows, columns = (blocks_along(space, config, name) for name in ("m", "n"))
    rows *= gemm_tiles.members(config)
    column = "pid_n"
    if config.subtiles > 1 and "n" in over:
        columns *= config.subtiles
        column = f"(pid_n * {config.subtiles} + {subtile})"
    part, programs = {
        ("m",): ("pid_m", rows),
        ("n",): (column, columns),
        ("m", "n"): (f"(pid_m * {columns} + {column})", rows * columns),
    }[tuple(sorted(over))]
    store_partial(printer, Reduction(printer, root), store, f"v{root}", part, programs)
