"""Rowwise kernels: any number of reductions along ``col``, with pointwise work before, between and
after.

Two forms. *Whole*: a program instance holds whole rows on chip, so each element is read and written
once. *Looped*, for rows that do not fit: one loop over the row for each level of reductions (a
reduction that needs an earlier reduction's result is one level up) and one for the stores;
pointwise work is repeated rather than stored.
"""

from __future__ import annotations

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer
from jevt_kernels.mainloops.pointwise import blocks_along, power_of_two
from jevt_kernels.ops import compute_dtype, is_float, triton_type
from jevt_kernels.spec import Config, KernelSpec, UnsupportedKernel

#: Widest row, padded to a power of two, that is held on chip.
MAX_WHOLE = 16384

#: Elements of a tile that one warp takes.
_PER_WARP = 512


def configs(spec: KernelSpec) -> tuple[Config, ...]:
    """Configurations worth trying, the preferred one first."""
    rows, columns = (spec.space.extent(spec.space.tile_axis(name)) for name in ("row", "col"))
    width = power_of_two(columns)
    if width > MAX_WHOLE:
        return tuple(
            Config((("row", 1), ("col", block)), warps)
            for block, warps in ((4096, 8), (2048, 8), (8192, 16))
        )
    result: dict[Config, None] = {}
    for elements in (2048, 4096, 1024):
        height = min(max(1, elements // width), power_of_two(rows))
        warps = min(16, max(1, power_of_two(height * width // _PER_WARP)))
        result.setdefault(Config((("row", height), ("col", width)), warps))
    return tuple(result)


def emit(printer: Printer) -> int:
    """Prints the body; one program instance a block of rows."""
    space, config = printer.spec.space, printer.config
    printer.constants()
    printer.line(f"pid = {printer.program_id()}")
    printer.tile_index("row", "pid * BLOCK_ROW")
    if blocks_along(space, config, "col") <= 1:
        _emit_whole(printer)
    else:
        _emit_looped(printer)
    return blocks_along(space, config, "row")


def _reductions(printer: Printer) -> list[int]:
    return [i for i, node in enumerate(printer.spec.tree) if isinstance(node, visitor.Reduce)]


def _emit_whole(printer: Printer) -> None:
    printer.tile_index("col", "")
    for position in _reductions(printer):
        value = _masked(printer, position)
        printer.line(f"v{position} = {_combine(printer, position, value)}")
        printer.set_value(position, f"v{position}")
    printer.store_all(printer.stores())


def _emit_looped(printer: Printer) -> None:
    reductions = _reductions(printer)
    levels = sorted({printer.levels[position] for position in reductions})
    columns = printer.spec.space.extent(printer.spec.space.tile_axis("col"))
    for level in levels:
        here = [position for position in reductions if printer.levels[position] == level]
        for position in here:
            node = _node(printer, position)
            identity = _identity(printer, position)
            printer.line(
                f"acc{position} = tl.full((BLOCK_ROW, BLOCK_COL), {identity}, {triton_type(_reduced_dtype(node))})"
            )
            _hoist(printer, [node.operand])
        printer.open(f"for start in range(0, {columns}, BLOCK_COL):")
        printer.tile_index("col", "start")
        for position in here:
            value = _masked(printer, position)
            printer.line(f"acc{position} = {_accumulate(printer, position, value)}")
        printer.close()
        for position in here:
            printer.line(f"v{position} = {_combine(printer, position, f'acc{position}')}")
            printer.set_value(position, f"v{position}")
    stores = printer.stores()
    operands = [o for position in stores for o in visitor.operands(printer.spec.tree[position])]
    _hoist(printer, operands)
    narrow = [s for s in stores if not _store_follows_columns(printer, s)]
    printer.store_all(narrow)
    wide = [s for s in stores if s not in narrow]
    if wide:
        printer.open(f"for start in range(0, {columns}, BLOCK_COL):")
        printer.tile_index("col", "start")
        printer.store_all(wide)
        printer.close()


def _store_follows_columns(printer: Printer, position: int) -> bool:
    node = printer.spec.tree[position]
    assert isinstance(node, visitor.Store)
    return node.index.depends_on(printer.spec.space.tile_axis("col"))


def _hoist(printer: Printer, roots: list[int]) -> None:
    """Prints, before a loop, what its values need that does not vary along the row."""
    needed: set[int] = set()
    stack = list(roots)
    while stack:
        position = stack.pop()
        if position not in needed:
            needed.add(position)
            if not isinstance(printer.spec.tree[position], visitor.Reduce):
                stack.extend(visitor.operands(printer.spec.tree[position]))
    for position in sorted(needed):
        node = printer.spec.tree[position]
        if "col" not in printer.dependencies[position] and not isinstance(
            node, (visitor.Constant, visitor.Reduce)
        ):
            printer.value(position)


def _node(printer: Printer, position: int) -> visitor.Reduce:
    node = printer.spec.tree[position]
    assert isinstance(node, visitor.Reduce)
    if node.over != "col":
        raise UnsupportedKernel(
            f"rowwise kernels reduce along 'col', got a reduction along {node.over!r}"
        )
    return node


def _reduced_dtype(node: visitor.Reduce) -> visitor.Dtype:
    """The type of the partial result: booleans are reduced as numbers."""
    import numpy as np

    return np.dtype("int32") if node.dtype == np.dtype(bool) else compute_dtype(node.dtype)


def _identity(printer: Printer, position: int) -> str:
    node = _node(printer, position)
    dtype = _reduced_dtype(node)
    if node.op in ("sum", "or"):
        return "0"
    if node.op in ("prod", "and"):
        return "1"
    import numpy as np

    if is_float(dtype):
        return "float('-inf')" if node.op == "max" else "float('inf')"
    if node.dtype == np.dtype(bool):
        return "0" if node.op == "max" else "1"
    info = np.iinfo(dtype)
    return str(info.min if node.op == "max" else info.max)


def _masked(printer: Printer, position: int) -> str:
    """The reduced value over the full tile, with the operation's identity beyond the row's end."""
    node = _node(printer, position)
    value = printer.value(node.operand)
    dtype = _reduced_dtype(node)
    if dtype != compute_dtype(printer.node_dtype(node.operand)):
        value = f"{value}.to({triton_type(dtype)})"
    if printer.dependencies[node.operand] != {"row", "col"}:
        value = f"tl.broadcast_to({value}, (BLOCK_ROW, BLOCK_COL))"
    if printer.mask(frozenset({"col"})):
        value = f"tl.where(col_ok, {value}, {_identity(printer, position)})"
    return value


def _accumulate(printer: Printer, position: int, value: str) -> str:
    acc = f"acc{position}"
    match _node(printer, position).op:
        case "sum":
            return f"{acc} + {value}"
        case "prod":
            return f"{acc} * {value}"
        case "max" | "or":
            return _extremum(printer, position, "maximum", acc, value)
        case "min" | "and":
            return _extremum(printer, position, "minimum", acc, value)
        case op:
            raise UnsupportedKernel(
                f"expected a reduction sum, prod, max, min, and, or; got {op!r}"
            )


def _extremum(printer: Printer, position: int, function: str, left: str, right: str) -> str:
    nan = (
        ", propagate_nan=tl.PropagateNan.ALL"
        if is_float(_reduced_dtype(_node(printer, position)))
        else ""
    )
    return f"tl.{function}({left}, {right}{nan})"


def _combine(printer: Printer, position: int, value: str) -> str:
    """Reduces a tile along its columns."""
    node = _node(printer, position)
    floating = is_float(_reduced_dtype(node))
    match node.op:
        case "sum":
            # Triton widens small integers when it sums them.
            text = f"tl.sum({value}, axis=1, keep_dims=True)"
            text = text if floating else f"{text}.to({triton_type(_reduced_dtype(node))})"
        case "prod":
            text = f"tl.reduce({value}, 1, dm.product, keep_dims=True)"
        case "max" | "or":
            text = (
                f"tl.reduce({value}, 1, dm.nan_max, keep_dims=True)"
                if floating
                else f"tl.max({value}, axis=1, keep_dims=True)"
            )
        case "min" | "and":
            text = (
                f"tl.reduce({value}, 1, dm.nan_min, keep_dims=True)"
                if floating
                else f"tl.min({value}, axis=1, keep_dims=True)"
            )
        case op:
            raise UnsupportedKernel(
                f"expected a reduction sum, prod, max, min, and, or; got {op!r}"
            )
    if node.dtype == bool:
        text = f"{text} != 0"
    elif not floating:
        text = f"{text}.to({triton_type(node.dtype)})"
    return text
