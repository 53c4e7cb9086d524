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
"""

from __future__ import annotations

import dataclasses

from jevt_kernels import visitor
from jevt_kernels.mainloops import gemm_tiles, product
from jevt_kernels.mainloops.product import Product
from jevt_kernels.spec import Config, KernelSpec

#: Bytes per second that large copies attain, and operations per second that products do.
_BANDWIDTH = 2.9e12
_RATE = 6.5e14

#: A kernel that takes so many times longer for its bytes than for its products waits for memory.
_MEMORY_BOUND = 2.0

_LONG_OPERATIONS = frozenset(
    """
    acos acosh asin asinh atan atan2 atanh cos cosh erf erf_inv erfc expm1 lgamma log log1p
    log1p_of_unit logistic logistic_of pow sin sinh tan tanh threefry2x32
    """.split()  # noqa: SIM905
)

#: Of an H100.
MULTIPROCESSORS = 132

#: Programs that walk the tiles of a product: two for each multiprocessor.
_WALKING = 2 * MULTIPROCESSORS

#: From here on the loop is long enough to hide the epilogue of a kernel that waits for memory.
_LONG_K = 256

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
    if found.dtype.itemsize != 2:
        return ()
    if plain:
        return _plain(found)
    steps = -(-found.k // 64)
    candidates = []
    if _memory_bound(spec, found):
        if product.epilogue_tiles(spec, found):
            if found.k >= _LONG_K:
                candidates.append(_pingpong(64, 4, 1))
            candidates.append(_config(64, 64, 4, min(3, steps), ahead=True))
        else:
            candidates.append(_config(128, 128, 4, 3, programs=_WALKING))
    elif _has_long_operation(spec, found):
        if alive > 4:
            candidates += [_pingpong(64, 8, subtiles) for subtiles in (1, 4)]
            candidates.append(_config(64, 128, 8, 3, subtiles=2))
        else:
            candidates += [_pingpong(128, 8, subtiles) for subtiles in (1, 4)]
            candidates.append(_config(128, 128, 8, 3, subtiles=2, programs=_WALKING))
    elif alive > 2:
        candidates += [_pingpong(128, 8, 1), _pingpong(128, 4, 2)]
        candidates.append(_config(128, 128, 4, 3, subtiles=2))
    else:
        candidates.append(_pingpong(128, 4, 2))
        candidates.append(_config(128, 128, 4, 3, programs=_WALKING))
    return tuple(config for config in candidates if _many_tiles(found, config))


def _many_tiles(found: Product, config: Config) -> bool:
    return _fits(found, config) and gemm_tiles.number(found, config) >= _LEAST_TILES


def _fits(found: Product, config: Config) -> bool:
    return found.n >= config.block("n") and found.m >= config.block("m")


def _plain(found: Product) -> tuple[Config, ...]:
    """Large tiles, split along ``k`` where they are few."""
    config = _config(128, 256, 8, 3, programs=MULTIPROCESSORS, subtiles=2)
    config = dataclasses.replace(config, specialized="cooperative")
    if not _fits(found, config):
        return ()
    if gemm_tiles.number(found, config) >= MULTIPROCESSORS:
        small = dataclasses.replace(_pingpong(128, 4, 2), group=16)
        return config, dataclasses.replace(config, group=16), small
    square = dataclasses.replace(
        config, blocks=(("m", 128), ("n", 128), ("k", 64)), num_stages=4, subtiles=1, programs=0
    )
    tiles = gemm_tiles.number(found, square)
    steps = -(-found.k // 64)
    splits = [s for s in (16, 8, 4, 2) if steps % s == 0 and tiles * s <= MULTIPROCESSORS]
    return tuple(dataclasses.replace(square, splits=s) for s in splits[:2])


def _pingpong(columns: int, warps: int, subtiles: int) -> Config:
    """Two groups of warps that take turns with tiles of 128 rows, one program a multiprocessor."""
    config = _config(128, columns, warps, 4, programs=MULTIPROCESSORS, subtiles=subtiles)
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


def _has_long_operation(spec: KernelSpec, found: Product) -> bool:
    """Whether the epilogue has an operation of a dozen instructions or more."""
    return any(
        isinstance(node, visitor.Compute) and node.op in _LONG_OPERATIONS
        for node in spec.tree[found.position :]
    )


def _memory_bound(spec: KernelSpec, found: Product) -> bool:
    moved = sum(operand.nbytes for operand in (*spec.inputs, *spec.outputs))
    operations = 2 * found.batch * found.m * found.n * found.k
    return moved / _BANDWIDTH > _MEMORY_BOUND * operations / _RATE
