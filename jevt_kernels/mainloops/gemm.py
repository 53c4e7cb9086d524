"""Matrix products with a visitor tree before and after.

A program computes one tile of the product, of BLOCK_M rows and BLOCK_N columns, in a loop along
``k`` whose loads are pipelined; or it walks several tiles, one after the other. Operands are
addressed by strides, so any layout is read where it lies, or by tensor descriptors where the layout
allows that. What the operands are made of is computed on the loaded tiles, in float32, and rounded
to the operands' type as a stored tensor would be; what is made of the product is computed on its
tile.

Reductions of the result leave a partial result for each tile. A product with few tiles and a long
``k`` (a weight gradient) can be split: the programs of a tile add up parts of ``k``, and
``jevt_kernels.partials`` adds up theirs, in a fixed order; where there is an epilogue, a second
kernel does both (:mod:`jevt_kernels.mainloops.split`).
"""

from __future__ import annotations

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer
from jevt_kernels.mainloops import gemm_configs, product, split
from jevt_kernels.mainloops.descriptors import Described, describe
from jevt_kernels.mainloops.pointwise import blocks_along
from jevt_kernels.mainloops.product import Product
from jevt_kernels.mainloops.reduction import Reduction, hoist, store_partial
from jevt_kernels.mainloops.schedule import schedule
from jevt_kernels.ops import TRITON_TYPES, compute_dtype, triton_type
from jevt_kernels.spec import Config, KernelSpec, Partial, Stages, UnsupportedKernel
from jevt_kernels.view import View, dimension

#: Triton multiplies no smaller tiles of every type.
SMALLEST_BLOCK = 32

#: Steps of a loop that ptxas may unroll. A longer loop's end is hidden from it, because it unrolls
#: all of 16 steps and takes ten seconds and more. Where a program walks several tiles, Triton makes
#: one loop of both.
_UNROLLED = 4

configs = gemm_configs.configs

_M, _N = dimension("m"), dimension("n")
_LHS = View((_M, dimension("k", "lhs_k")), prefix="a")
_RHS = View((dimension("k", "rhs_k"), _N), prefix="b")
_RESULT = View((_M, _N))


def stages(spec: KernelSpec, config: Config) -> Stages | None:
    """The two kernels of a product that is split and has an epilogue, None of any other."""
    found = product.find(spec)
    if config.splits == 1 or product.is_plain(spec, found):
        return None
    return split.stages(spec, found, config.splits)


def emit(printer: Printer) -> int:
    """Prints the body; a program instance a tile and split, or less that walk them in turn."""
    found = product.find(printer.spec)
    printer.constants()
    described = _describe(printer, found)
    printer.descriptors += [d.parameter(name, printer.config) for name, d in described.items()]
    tiles = _tiles(printer, found)
    programs = printer.config.programs
    if 0 < programs < tiles:
        if printer.wide:
            raise UnsupportedKernel("a program walks several tiles only with 32-bit offsets")
        first = printer.program_id()
        printer.open(f"for pid in tl.range({first}, {tiles}, {programs}, flatten=True):")
        _tile(printer, found, described)
        printer.close()
        return programs
    printer.line(f"pid = {printer.program_id()}")
    _tile(printer, found, described)
    return tiles


def _describe(printer: Printer, found: Product) -> dict[str, Described]:
    """The descriptors of the operands that have one, by name."""
    if not printer.config.descriptors:
        return {}
    spec, node = printer.spec, found.node
    if printer.wide:
        raise UnsupportedKernel("tensor descriptors are used only with 32-bit offsets")
    candidates = {
        "lhs_desc": describe(spec, found, node.lhs, "m"),
        "rhs_desc": describe(spec, found, node.rhs, "n"),
    }
    described = {name: found for name, found in candidates.items() if found is not None}
    if not described:
        raise UnsupportedKernel("no operand of the product can have a tensor descriptor")
    return described


def _tiles(printer: Printer, found: Product) -> int:
    """The number of tiles, those of each split and batch counted."""
    rows, columns = (blocks_along(printer.spec.space, printer.config, axis) for axis in ("m", "n"))
    return found.batch * printer.config.splits * rows * columns


def _tile(printer: Printer, found: Product, described: dict[str, Described]) -> None:
    """Prints the computation of tile ``pid``."""
    _coordinates(printer, found)
    with printer.viewing(_RESULT):
        printer.tile_index("m", "pid_m * BLOCK_M")
        printer.tile_index("n", "pid_n * BLOCK_N")
        loaded = _load_ahead(printer, found) if printer.config.ahead else {}
    _accumulate(printer, found, described)
    with printer.viewing(_RESULT):
        _use_loaded(printer, loaded)
    if printer.config.splits > 1:
        with printer.viewing(_RESULT):
            _store_parts(printer, found)
    else:
        _epilogue(printer, found)


def _load_ahead(printer: Printer, found: Product) -> dict[int, str]:
    """Prints the epilogue's loads of full tiles; returns the names that hold what memory holds."""
    if printer.config.subtiles > 1 or printer.config.splits > 1:
        raise UnsupportedKernel("only an epilogue of whole tiles can be loaded ahead")
    tiles = product.epilogue_tiles(printer.spec, found)
    if not tiles:
        raise UnsupportedKernel("the epilogue loads no full tiles")
    names = {position: f"ahead{position}" for position in tiles}
    for position, name in names.items():
        node = printer.spec.tree[position]
        assert isinstance(node, visitor.Load)
        printer.line(f"{name} = {printer.load_stored(node, printer.dependencies[position])}")
    return names


def _use_loaded(printer: Printer, loaded: dict[int, str]) -> None:
    """Prints the conversions of what was loaded ahead to the types of kernels' arithmetic."""
    for position, name in loaded.items():
        stored = printer.node_dtype(position)
        if (dtype := compute_dtype(stored)) != stored:
            printer.line(f"v{position} = {name}.to({TRITON_TYPES[dtype]})")
            name = f"v{position}"
        printer.set_value(position, name)


def _coordinates(printer: Printer, found: Product) -> None:
    """Prints where tile ``pid`` lies."""
    config, line = printer.config, printer.line
    rows, columns = (blocks_along(printer.spec.space, config, name) for name in ("m", "n"))
    tiles = rows * columns
    if found.batch > 1:
        line(f"batch = pid // {tiles * config.splits}")
    if config.splits > 1:
        line(f"part_pid = pid // {tiles} % {config.splits}")
    if found.batch > 1 or config.splits > 1:
        line(f"tile_pid = pid % {tiles}")
    else:
        line("tile_pid = pid")
    group = min(config.group, rows)
    if columns == 1 or group == 1:
        line(f"pid_m = tile_pid // {columns}")
        line(f"pid_n = tile_pid % {columns}")
    elif rows % group == 0:
        line(f"pid_m = tile_pid // {group * columns} * {group} + tile_pid % {group}")
        line(f"pid_n = tile_pid % {group * columns} // {group}")
    else:
        line(f"first = tile_pid // {group * columns} * {group}")
        line(f"height = min({rows} - first, {group})")
        line(f"pid_m = first + tile_pid % {group * columns} % height")
        line(f"pid_n = tile_pid % {group * columns} // height")


def _accumulate(printer: Printer, found: Product, described: dict[str, Described]) -> None:
    """Prints the loop along ``k``."""
    node, config = found.node, printer.config
    dtype = triton_type(node.dtype)
    printer.line(f"acc = tl.zeros((BLOCK_M, BLOCK_N), {dtype})")
    printer.set_value(found.position, "acc")
    if not found.k:
        return
    sides = ((_LHS, node.lhs, "lhs_desc"), (_RHS, node.rhs, "rhs_desc"))
    for view, root, name in sides:
        if name not in described:
            with printer.viewing(view):
                printer.lane_index("k")
                hoist(printer, [root], "k")
    steps = blocks_along(printer.spec.space, config, "k")
    bounds = f"0, {found.k}"
    if steps > _UNROLLED and not config.programs:
        bounds += " + tl.program_id(1)"  # 0
    if config.splits > 1:
        length = -(-steps // config.splits) * config.block("k")
        printer.line(f"first_k = part_pid * {length}")
        bounds = f"first_k, min(first_k + {length}, {found.k})"
    printer.open(f"for start in range({bounds}, BLOCK_K):")
    start = "start"
    if printer.wide:
        start = "wide_start"
        printer.line("wide_start = tl.cast(start, tl.int64)")
    operands = []
    starts = {"m": "pid_m * BLOCK_M", "n": "pid_n * BLOCK_N", "k": "start"}
    for view, root, name in sides:
        with printer.viewing(view):
            if name in described:
                operands.append(f"{view.prefix}_tile")
                text = described[name].load(name, starts, view.dimensions[0].name)
                printer.line(f"{operands[-1]} = {text}")
                continue
            printer.stepped_index("k", start)
            operands.append(_operand(printer, found, root))
    precision = f', input_precision="{node.precision}"' if found.dtype.name == "float32" else ""
    printer.line(f"acc = tl.dot({', '.join(operands)}, acc{precision}, out_dtype={dtype})")
    printer.close()
    printer.steps.clear()


def _operand(printer: Printer, found: Product, root: int) -> str:
    """Prints a tile of an operand, of the operand's own type, 0 beyond the end of ``k``."""
    node, view = printer.spec.tree[root], printer.view
    varies = printer.dependencies[root]
    name = f"{view.prefix}_tile"
    if isinstance(node, visitor.Load) and view.names <= varies:
        printer.line(f"{name} = {printer.load_stored(node, varies)}")
        return name
    value = printer.value(root)
    if not view.names <= varies:
        value = f"tl.broadcast_to({value}, {view.shape(view.names)})"
    if mask := printer.mask(frozenset({"k"})):
        value = f"tl.where({mask}, {value}, 0)"
    if compute_dtype(found.dtype) != found.dtype:
        value = f"{value}.to({TRITON_TYPES[found.dtype]})"
    printer.line(f"{name} = {value}")
    return name


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


def _epilogue(printer: Printer, found: Product) -> None:
    tree, subtiles = printer.spec.tree, printer.config.subtiles
    reduced = [s for s in printer.stores() if _is_reduced(printer, s)]
    if subtiles == 1:
        with printer.viewing(_RESULT):
            _finish(printer, found, reduced, 0)
        return
    if subtiles & (subtiles - 1) or printer.config.block("n") // subtiles < 16:
        raise UnsupportedKernel(f"tiles {printer.config.blocks} have no {subtiles} parts along n")
    with printer.viewing(_RESULT):
        hoist(printer, [o for s in printer.stores() for o in visitor.operands(tree[s])], "n")
    names = _split(printer, "acc", subtiles)
    size = f"BLOCK_N // {subtiles}"
    for number, name in enumerate(names):
        view = View((_M, dimension("n", f"n{number}", size)))
        with printer.viewing(view), printer.forgetting():
            printer.set_value(found.position, name)
            printer.tile_index("n", f"pid_n * BLOCK_N + {number} * ({size})")
            _finish(printer, found, reduced, number)


def _split(printer: Printer, name: str, parts: int) -> list[str]:
    """Prints the division of a tile of the result into parts along ``n``; returns their names."""
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
