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
kernel does both (:mod:`jevt_kernels.mainloops.split`). A sum of products (:mod:`.terms`) is one
loop after the other, which add to the same tile.
"""

from __future__ import annotations

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer
from jevt_kernels.mainloops import (
    gemm_configs,
    gemm_epilogue,
    gemm_tiles,
    product,
    specialized,
    split,
)
from jevt_kernels.mainloops.descriptors import Described, describe
from jevt_kernels.mainloops.gemm_epilogue import RESULT
from jevt_kernels.mainloops.product import Product
from jevt_kernels.mainloops.reduction import hoist
from jevt_kernels.mainloops.terms import Term
from jevt_kernels.ops import TRITON_TYPES, compute_dtype, triton_type
from jevt_kernels.spec import Config, KernelSpec, Stages, UnsupportedKernel
from jevt_kernels.view import View, dimension

#: Triton multiplies no smaller tiles of every type.
SMALLEST_BLOCK = 32

#: Steps of a loop that ptxas may unroll. A longer loop's end is hidden from it, because it unrolls
#: all of 16 steps and takes ten seconds and more. Where a program walks several tiles, Triton makes
#: one loop of both, but not of several loops along ``k``.
_UNROLLED = 4

configs = gemm_configs.configs

_M, _N = dimension("m"), dimension("n")


def stages(spec: KernelSpec, config: Config) -> Stages | None:
    """The two kernels of a product that is split and has an epilogue, None of any other.

    Raises:
      UnsupportedKernel: if there is nothing that can be split so.
    """
    found = product.find(spec)
    if config.splits > 1 and found.is_sum:
        raise UnsupportedKernel("a sum of matrix products is not split along k")
    if config.splits == 1 or product.is_plain(spec, found):
        return None
    return split.stages(spec, found, config.splits)


def emit(printer: Printer) -> int:
    """Prints the body; a program instance a tile and split, or less that walk them in turn."""
    found = product.find(printer.spec)
    described = _describe(printer, found)
    printer.descriptors += [d.parameter(name, printer.config) for name, d in described.items()]
    if printer.config.specialized:
        return specialized.emit(printer, found, described)
    printer.constants()
    tiles = gemm_tiles.number(found, printer.config)
    programs = printer.config.programs
    if 0 < programs < tiles:
        if printer.wide:
            raise UnsupportedKernel("a program walks several tiles only with 32-bit offsets")
        first = printer.program_id()
        # Triton makes one loop of this and the one along k, of several it would guard each step.
        walk = f"range({first}, {tiles}, {programs})"
        if not found.is_sum:
            walk = f"tl.range({first}, {tiles}, {programs}, flatten=True)"
        printer.open(f"for pid in {walk}:")
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
    if printer.wide:
        raise UnsupportedKernel("tensor descriptors are used only with 32-bit offsets")
    candidates = {
        f"{side}{term.number}_desc": describe(printer.spec, found, term, free)
        for term in found.terms
        for side, free in (("lhs", "m"), ("rhs", "n"))
    }
    described = {name: found for name, found in candidates.items() if found is not None}
    if not described:
        raise UnsupportedKernel("no operand of the product can have a tensor descriptor")
    return described


def _tile(printer: Printer, found: Product, described: dict[str, Described]) -> None:
    """Prints the computation of tile ``pid``."""
    gemm_tiles.coordinates(printer, found)
    with printer.viewing(RESULT):
        printer.tile_index("m", "pid_m * BLOCK_M")
        printer.tile_index("n", "pid_n * BLOCK_N")
        loaded = _load_ahead(printer, found) if printer.config.ahead else {}
    _accumulate(printer, found, described)
    with printer.viewing(RESULT):
        gemm_epilogue.use_loaded(printer, loaded)
    gemm_epilogue.emit(printer, found)


def _load_ahead(printer: Printer, found: Product) -> dict[int, str]:
    if printer.config.subtiles > 1 or printer.config.splits > 1:
        raise UnsupportedKernel("only an epilogue of whole tiles can be loaded ahead")
    if not (tiles := product.epilogue_tiles(printer.spec, found)):
        raise UnsupportedKernel("the epilogue loads no full tiles")
    return gemm_epilogue.load_ahead(printer, tiles)


def _accumulate(printer: Printer, found: Product, described: dict[str, Described]) -> None:
    """Prints the loops along ``k``, one for each term."""
    printer.line(f"acc = tl.zeros((BLOCK_M, BLOCK_N), {triton_type(found.node.dtype)})")
    printer.set_value(found.position, "acc")
    for term in found.terms:
        if term.k:
            _accumulate_term(printer, found, term, described)


def _accumulate_term(
    printer: Printer, found: Product, term: Term, described: dict[str, Described]
) -> None:
    node, config, axis = term.node, printer.config, term.node.over
    lhs, rhs = (dimension(axis, f"{side}_{axis}", "BLOCK_K") for side in ("lhs", "rhs"))
    sides = (
        (View((_M, lhs), prefix="a"), node.lhs, f"lhs{term.number}_desc"),
        (View((rhs, _N), prefix="b"), node.rhs, f"rhs{term.number}_desc"),
    )
    for view, root, name in sides:
        if name not in described:
            with printer.viewing(view):
                printer.lane_index(axis)
                hoist(printer, [root], axis)
    steps = term.steps(config.block("k"))
    bounds = f"0, {term.k}"
    if steps > _UNROLLED and (found.is_sum or not config.programs):
        bounds += " + tl.program_id(1)"  # 0
    if config.splits > 1:
        length = -(-steps // config.splits) * config.block("k")
        printer.line(f"first_k = part_pid * {length}")
        bounds = f"first_k, min(first_k + {length}, {term.k})"
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
                rows = "m" if root == node.lhs else "k"
                text = described[name].load(name, starts, rows)
                printer.line(f"{operands[-1]} = {text}")
                continue
            printer.stepped_index(axis, start)
            operands.append(_operand(printer, found, root, axis))
    precision = f', input_precision="{node.precision}"' if found.dtype.name == "float32" else ""
    dtype = triton_type(node.dtype)
    printer.line(f"acc = tl.dot({', '.join(operands)}, acc{precision}, out_dtype={dtype})")
    printer.close()
    printer.steps.clear()


def _operand(printer: Printer, found: Product, root: int, axis: str) -> str:
    """Prints a tile of an operand, of the operand's own type, 0 beyond the end of ``axis``."""
    node, view = printer.spec.tree[root], printer.view
    varies = printer.dependencies[root]
    name = f"{view.prefix}_tile"
    if isinstance(node, visitor.Load) and view.names <= varies:
        printer.line(f"{name} = {printer.load_stored(node, varies)}")
        return name
    value = printer.value(root)
    if not view.names <= varies:
        value = f"tl.broadcast_to({value}, {view.shape(view.names)})"
    if mask := printer.mask(frozenset({axis})):
        value = f"tl.where({mask}, {value}, 0)"
    if compute_dtype(found.dtype) != found.dtype:
        value = f"{value}.to({TRITON_TYPES[found.dtype]})"
    printer.line(f"{name} = {value}")
    return name
