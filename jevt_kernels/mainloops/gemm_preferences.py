"""Tiles that were the fastest of all on an H100 for kernels of a kind.

The model in :mod:`.gemm_configs` counts operations and bytes; what it cannot tell is how much of an
epilogue hides behind other programs on the same multiprocessor, which depends on registers and
shared memory. So 16 to 150 configurations each of some thirty products with their epilogues, out of
training steps of ResNet-50, ViT, XML-CNN and a graph network, were measured. Among kernels whose
warps all do the same, several programs of four warps on a multiprocessor were ahead of few large
ones nearly everywhere. Two groups of warps that take turns (:mod:`.specialized`) were faster still
wherever products take long enough: with a gelu 322 µs instead of 362 (32768×3072×768) and 260
instead of 286 (16384×4096×1024), with its gradient and column sums 358 instead of 418 and 283
instead of 334. With the tiles below each kernel is within 18 % of its best, most within 5 %.

Later, of eight products alone or with a residual and of five with their epilogues: groups that
share a large tile and do not wait for each other, with four stages, take 222 µs where they took 243
with three stages and waiting (32768×3072×768), and 190 instead of 198 (16384×4096×1024). A fifth
stage takes small tiles of a product that waits for memory from 1310 µs to 1207 (512×670208×1024),
and kept rows with six stages a loss over labels from 3060 to 2760 (1024×670208×512).

An overlapped epilogue takes large tiles on: alone 204 µs instead of 226 (32768×3072×768), 181
instead of 192 (16384×4096×1024), 50 instead of 56 (16384×1024×1024, with a bias 51 instead of 55),
with a residual 71 instead of 80 (32768×768×768), updating weights 1097 instead of 1206
(512×670208×1024). Long epilogues it does not help: eight warps compute too slowly, and with sums
they wait for each other (a gelu 296 µs where 264 is possible, its gradient 550 instead of 282).
Three tiles to add leave too few registers (95 µs instead of 85, 16384×1024×1024). With a tile to
multiply by and column sums, groups of four warps that take turns are ahead (230 µs instead of 258
for large tiles, 16384×4096×1024; 284 instead of 314 with halves of a tile, 32768×3072×768); without
the sums the overlapped epilogue (193 and 226). A gelu and its derivative, both stored, are best of
whole tiles (295 µs instead of 308, 32768×3072×768; 245 as with halves, 16384×4096×1024).
"""

from __future__ import annotations

import dataclasses
import math

from jevt_kernels import visitor
from jevt_kernels.mainloops import gemm_epilogue, gemm_tiles, product, specialized
from jevt_kernels.mainloops.product import Product
from jevt_kernels.spec import Config, KernelSpec

#: Bytes per second that large copies attain, and operations per second that products do.
_BANDWIDTH = 2.9e12
_RATE = 6.5e14

#: Operations per second of the loops over large tiles alone, and the seconds between two of them.
_LARGE_TILES_RATE = 8.0e14
_TILE = 1.3e-6

#: Parts of ``k`` at most, and steps of 64 in each at least.
_MOST_SPLITS, _LEAST_STEPS = 16, 8

#: A kernel that takes so many times longer for its bytes than for its products waits for memory;
#: from so much on, memory is busy enough that groups that take turns are ahead of large tiles.
_MEMORY_BOUND = 2.0
_BUSY = 0.6

_LONG_OPERATIONS = frozenset(
    """
    acos acosh asin asinh atan atan2 atanh cos cosh erf erf_inv erfc expm1 lgamma log log1p
    log1p_of_unit logistic logistic_of of_odds pow scaled_erfc sin sinh tan tanh threefry2x32
    """.split()  # noqa: SIM905
)

#: Beside a long operation they leave registers for no part of the next tile.
_EXPONENTIALS = frozenset({"exp", "gaussian"})

#: Of an H100.
MULTIPROCESSORS = 132

#: Programs that walk the tiles of a product: two for each multiprocessor.
_WALKING = 2 * MULTIPROCESSORS

#: From here on the loop is long enough to hide the epilogue of a kernel that waits for memory.
_LONG_K = 256

#: Part of the multiprocessors that have a tile in the last round of large ones, at least.
_FILLED = 0.75

#: Fewer tiles leave multiprocessors idle, and are better divided otherwise.
_LEAST_TILES = 2 * MULTIPROCESSORS


def preferred(spec: KernelSpec, found: Product, alive: int, plain: bool) -> tuple[Config, ...]:
    """The configurations, through descriptors, of a product with an epilogue, the fastest first.

    Args:
      spec: the kernel.
      found: its product, of operands that are loaded as they are.
      alive: values of a tile of the result that the epilogue keeps at once.
      plain: whether the product is only stored.

    Returns:
      Empty where nothing like it was measured: operands that are not of 16 bits, few tiles.
    """
    if found.dtype.itemsize != 2 or not found.k:
        return ()
    if plain:
        return _plain(spec, found)
    steps, operations = found.steps(64), _operations(spec, found)
    candidates = []
    if _waiting(spec, found) > _MEMORY_BOUND:
        if product.epilogue_tiles(spec, found):
            if found.k >= _LONG_K:
                candidates.append(_pingpong(64, 4, 1))
            candidates.append(_config(64, 64, 4, min(3, steps), ahead=True))
        else:
            candidates.append(_config(128, 128, 4, 3, programs=_WALKING))
    elif not _LONG_OPERATIONS.isdisjoint(operations):
        candidates += [
            c for stages in (8, 6) if (c := _keeping(found, _pingpong(64, 8, 1, stages)))
        ]
        if alive > 4:
            candidates += [_pingpong(64, 8, subtiles) for subtiles in (1, 4)]
            candidates.append(_config(64, 128, 8, 3, subtiles=2))
        else:
            whole, halves, parts = (_pingpong(128, 8, *p) for p in ((1, 4), (2, 6), (4, 6)))
            if gemm_epilogue.rounded(spec, found) is None:
                # A product of 32 bits and all of a tile's values take too many registers together.
                candidates += [parts, whole]
            else:
                entire = _has_sums(spec) or not _EXPONENTIALS.isdisjoint(operations)
                candidates += [whole, parts] if entire else [halves, whole]
            candidates.append(_config(128, 128, 8, 3, subtiles=2, programs=_WALKING))
    elif alive > 2:
        candidates += [_pingpong(128, 8, 1), _pingpong(128, 4, 2)]
        candidates.append(_config(128, 128, 4, 3, subtiles=2))
    else:
        large, small = _large(spec, found), _pingpong(128, 4, 2, 5)
        if large.specialized == "overlapped":
            candidates += [large, dataclasses.replace(large, subtiles=8), small]
        else:
            if _has_sums(spec) and product.epilogue_tiles(spec, found):
                whole = _pingpong(128, 4, 1)
                candidates += [whole] if _waiting(spec, found) < 1.0 else []
            late = _waiting(spec, found) > _BUSY
            candidates += [small, large] if late else [large, small]
        candidates.append(_config(128, 128, 4, 3, programs=_WALKING))
    return tuple(config for config in candidates if _many_tiles(found, config))


def _many_tiles(found: Product, config: Config) -> bool:
    """Whether no multiprocessor is idle for long."""
    tiles = gemm_tiles.number(found, config)
    if config.specialized in gemm_tiles.SHARING:
        rounds = math.ceil(tiles / MULTIPROCESSORS)
        return _fits(found, config) and tiles >= _FILLED * rounds * MULTIPROCESSORS
    return _fits(found, config) and tiles >= _LEAST_TILES


def _fits(found: Product, config: Config) -> bool:
    return found.n >= config.block("n") and found.m >= config.block("m")


def _large(spec: KernelSpec, found: Product) -> Config:
    """Large tiles, each finished between the steps of the next one if registers allow that."""
    config = _cooperative(128, 256, 4, 2)
    many = len(product.epilogue_tiles(spec, found)) > 1
    alone = gemm_tiles.number(found, config) <= MULTIPROCESSORS
    if _has_sums(spec) or many or alone or gemm_epilogue.rounded(spec, found) is None:
        return config
    return dataclasses.replace(config, specialized="overlapped", subtiles=4)


def _plain(spec: KernelSpec, found: Product) -> tuple[Config, ...]:
    """Large tiles, split along ``k`` where they are few."""
    large = _large(spec, found)
    square = _cooperative(128, 128, 5, 1)
    if not _fits(found, square):
        return ()
    if gemm_tiles.number(found, large) >= MULTIPROCESSORS:
        small = dataclasses.replace(_pingpong(128, 4, 2), group=16)
        return large, dataclasses.replace(large, group=16), small
    large = _cooperative(128, 256, 4, 2)
    most = 1 if found.is_sum else max(1, min(_MOST_SPLITS, found.steps(64) // _LEAST_STEPS))
    candidates = [
        dataclasses.replace(config, splits=splits)
        for config in (large, square)
        if _fits(found, config)
        for splits in range(1, most + 1)
    ]
    return tuple(sorted(candidates, key=lambda config: _split_seconds(found, config))[:3])


def _split_seconds(found: Product, config: Config) -> float:
    """The time that a product takes whose parts of ``k`` programs take in turn, all as fast."""
    rounds = math.ceil(gemm_tiles.number(found, config) / MULTIPROCESSORS)
    steps = math.ceil(found.steps(64) / config.splits)
    tile = config.block("m") * config.block("n")
    multiplied = 2 * tile * 64 * steps * MULTIPROCESSORS / _LARGE_TILES_RATE + _TILE
    parts = 2 * 4 * config.splits * found.batch * found.m * found.n if config.splits > 1 else 0
    return rounds * multiplied + parts / _BANDWIDTH


def _cooperative(rows: int, columns: int, stages: int, subtiles: int) -> Config:
    """One program a multiprocessor, whose groups of four warps share the rows of a tile."""
    config = _config(rows, columns, 4, stages, programs=MULTIPROCESSORS, subtiles=subtiles)
    return dataclasses.replace(config, specialized="cooperative")


def _keeping(found: Product, config: Config) -> Config | None:
    """The configuration with programs that keep the left operand's rows, None if they cannot."""
    rows = -(-found.m // config.block("m"))
    kept = dataclasses.replace(config, programs=MULTIPROCESSORS // rows * rows)
    return kept if specialized.keeps_lhs(found, kept) else None


def _pingpong(columns: int, warps: int, subtiles: int, stages: int = 4) -> Config:
    """Two groups of warps that take turns with tiles of 128 rows, one program a multiprocessor."""
    config = _config(128, columns, warps, stages, programs=MULTIPROCESSORS, subtiles=subtiles)
    return dataclasses.replace(config, specialized="pingpong")


def _config(
    m: int,
    n: int,
    warps: int,
    stages: int,
    *,
    programs: int = 0,
    subtiles: int = 1,
    ahead: bool = False,
) -> Config:
    return Config(
        (("m", m), ("n", n), ("k", 64)),
        warps,
        stages,
        programs=programs,
        subtiles=subtiles,
        descriptors=True,
        ahead=ahead,
    )


def _has_sums(spec: KernelSpec) -> bool:
    return any(isinstance(node, visitor.Reduce) for node in spec.tree)


def _operations(spec: KernelSpec, found: Product) -> set[str]:
    """The operations of the epilogue."""
    behind = spec.tree[found.terms[0].position :]
    return {node.op for node in behind if isinstance(node, visitor.Compute)}


def _waiting(spec: KernelSpec, found: Product) -> float:
    """How many times longer a kernel takes for its bytes than for its products."""
    moved = sum(operand.nbytes for operand in (*spec.inputs, *spec.outputs))
    operations = 2 * found.batch * found.m * found.n * found.k
    return moved / _BANDWIDTH / (operations / _RATE)
