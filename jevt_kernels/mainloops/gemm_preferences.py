"""Tiles that were the fastest of all on an H100 for kernels of a kind.

The model in :mod:`.gemm_configs` counts operations and bytes; what it cannot tell is how much of an
epilogue hides behind other programs on the same multiprocessor, which depends on registers and
shared memory. So 16 to 150 configurations each of some thirty products with their epilogues, out of
training steps of ResNet-50, ViT, XML-CNN and a graph network, were measured. Several programs of
four warps on a multiprocessor were ahead of few large ones nearly everywhere: with the tiles below
each is within 18 % of its best, most within 5 %, where the model's were up to 77 % behind.
"""

from __future__ import annotations

from jevt_kernels import visitor
from jevt_kernels.mainloops import product
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

#: Programs that walk the tiles of a product: two for each multiprocessor.
_WALKING = 264

#: Fewer tiles leave multiprocessors idle, and are better divided otherwise.
_LEAST_TILES = 264


def preferred(spec: KernelSpec, found: Product, alive: int) -> Config | None:
    """The configuration, through descriptors, of a product with an epilogue.

    Args:
      spec: the kernel.
      found: its product, of operands that are loaded as they are.
      alive: values of a tile of the result that the epilogue keeps at once.

    Returns:
      None where nothing like it was measured: operands that are not of 16 bits, few tiles.
    """
    if found.dtype.itemsize != 2:
        return None
    steps = -(-found.k // 64)
    if _memory_bound(spec, found):
        if product.epilogue_tiles(spec, found):
            config = _config(64, 64, 4, min(3, steps), ahead=True)
        else:
            config = _config(128, 128, 4, 3, programs=_WALKING)
    elif _has_long_operation(spec, found):
        if alive > 4:
            config = _config(64, 128, 8, 3, subtiles=2)
        else:
            config = _config(128, 128, 8, 3, subtiles=2, programs=_WALKING)
    elif alive > 2:
        config = _config(128, 128, 4, 3, subtiles=2)
    else:
        config = _config(128, 128, 4, 3, programs=_WALKING)
    rows, columns = (
        -(-extent // config.block(name)) for name, extent in (("m", found.m), ("n", found.n))
    )
    fits = found.n >= config.block("n") and found.m >= config.block("m")
    return config if fits and found.batch * rows * columns >= _LEAST_TILES else None


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
