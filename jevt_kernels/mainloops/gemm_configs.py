"""Which tiles are worth trying for a matrix product, in the order of a simple model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer, power_of_two
from jevt_kernels.mainloops import gemm_tiles, product, specialized, split
from jevt_kernels.mainloops.descriptors import describe
from jevt_kernels.mainloops.gemm_preferences import MULTIPROCESSORS, preferred
from jevt_kernels.mainloops.product import Product
from jevt_kernels.spec import Config, KernelSpec

#: Multiply-adds per second of one of its multiprocessors with 16-bit operands, as tiles attain it.
_RATE = 2.6e12

#: Bytes of partial results that all multiprocessors together move in a second, and the seconds that
#: a second launch takes.
_BANDWIDTH = 2.5e12
_LAUNCH = 3e-6

#: Seconds that a program takes beside its loop: at least, and for each element of its tile.
_PROGRAM = 1e-6
_PLAIN_ELEMENT = 0.3e-10
_ELEMENT = 2e-10

#: Elements of the result in a thread's registers from which on one program fills a multiprocessor,
#: so that nothing hides its epilogue, and registers for more than a plain epilogue are wanting.
_MANY = 128

#: Registers of a thread that values of a tile of the result may take at once, as the equations are
#: ordered. Compiled groups of a ResNet spill none with 192 and hundreds of bytes with 320.
_REGISTERS = 256

#: A multiprocessor reads a tile's operands from the L2 cache: of a tile of m × n, the share of time
#: that is not spent on that is 1 / (1 + _READS · (1/m + 1/n)).
_READS = 40.0

_SPLITS = (2, 4, 8, 16, 32)

#: Least length of a part of the contracted axis.
_SHORTEST_PART = 512

#: Rows, columns, warps and stages of a tile, for operands of 16 bits and blocks of 64 along k.
_TENSOR_CORE_TILES = (
    (128, 256, 8, 4),
    (128, 256, 8, 3),
    (256, 128, 8, 3),
    (128, 128, 8, 3),
    (128, 128, 4, 4),
    (128, 128, 4, 3),
    (64, 256, 4, 4),
    (64, 128, 4, 4),
    (128, 64, 4, 4),
    (64, 64, 4, 4),
    (64, 32, 4, 5),
    (32, 64, 4, 5),
)

#: The same where no tensor core helps, for blocks of 32 along k: float32 to the last bit, float64.
_PLAIN_TILES = ((128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 2, 3))

#: Shared memory of a thread block, and of it what the barriers of the copies take.
_SHARED_BYTES = 227 * 1024
_BARRIER_BYTES = 64

#: Bytes of shared memory that an element takes at most on its way between the layouts of the
#: product and of the epilogue where warps have different tasks; one of 32 bits goes in two steps.
_PASSING_BYTES = 2

#: Bytes of shared memory of a group of warps for sums, beyond those that pass between layouts.
_SUMS_BYTES = 1024


def configs(spec: KernelSpec) -> tuple[Config, ...]:
    """Configurations worth trying, the preferred one first.

    Raises:
      UnsupportedKernel: if the mainloop cannot generate the kernel.
    """
    found = product.find(spec)
    plain = product.is_plain(spec, found)
    loaded = all(isinstance(spec.tree[operand], visitor.Load) for operand in found.operands)
    seconds: dict[Config, float] = {}
    largest = _largest_tile(spec, found)
    for config in _tiles(spec, found):
        held = gemm_tiles.held(config)
        if config.block("m") * config.block("n") > largest:
            continue
        candidates = [config] if held < _MANY or (plain and loaded) else []
        candidates += [
            dataclasses.replace(config, splits=splits)
            for splits in _splits(found, config)
            if (loaded or held < _MANY) and found.k >= splits * _SHORTEST_PART
            if plain or split.divisible(spec, splits)
        ]
        if not plain and loaded and config.block("n") >= 128:
            candidates.append(dataclasses.replace(config, subtiles=2))
        for candidate in candidates:
            seconds.setdefault(candidate, _seconds(found, candidate, plain))
    alive = 0 if plain else _alive(spec, found)
    seconds = _without_spills(alive, seconds)
    best = min(seconds.values())
    ordered = [
        config
        for config, cost in sorted(seconds.items(), key=lambda item: item[1])
        if cost <= 2 * best
    ]
    measured = preferred(spec, found, alive, plain) if loaded else ()
    fitting = (config for config in measured if _fits(spec, found, config))
    return tuple(dict.fromkeys((*fitting, *_with_descriptors(spec, found, alive, ordered))))


def _splits(found: Product, config: Config) -> list[int]:
    """Numbers of parts of ``k``: few, and as many as give each multiprocessor one tile or two.

    A sum of products has none.
    """
    if found.is_sum:
        return []
    tiles = max(1, gemm_tiles.number(found, config))
    filling = {MULTIPROCESSORS // tiles, 2 * MULTIPROCESSORS // tiles} - {0, 1}
    return sorted({*_SPLITS, *filling})


def _fits(spec: KernelSpec, found: Product, config: Config) -> bool:
    """Whether a configuration through descriptors can be printed and leaves registers."""
    area = config.block("m") * config.block("n")
    described = _has_descriptor(spec, found) and not Printer(spec, config).wide
    return described and area <= _largest_tile(spec, found)


def _with_descriptors(
    spec: KernelSpec, found: Product, alive: int, ordered: list[Config]
) -> Iterable[Config]:
    """Each configuration, and as it loads its operands through descriptors, if it can.

    These come first on tensor cores. On an H100, with 128 × 256 tiles that programs walk, bfloat16:
    74 µs instead of 103 for 16384×1024×1024, 249 instead of 273 for 16384×4096×1024. Where programs
    walk, sums of the result take registers as further values do: so it compiles.
    """
    sums = sum(isinstance(node, visitor.Reduce) for node in spec.tree)
    described = _has_descriptor(spec, found)
    for config in ordered:
        variants = [config]
        if described and not Printer(spec, config).wide:
            variants.append(dataclasses.replace(config, descriptors=True))
            programs = MULTIPROCESSORS * _resident(spec, found, config)
            room = (alive + sums) * gemm_tiles.held(config) <= _REGISTERS * config.subtiles
            if room and programs < gemm_tiles.number(found, config):
                variants.append(dataclasses.replace(variants[-1], programs=programs))
        yield from reversed(variants) if _on_tensor_cores(found) else variants


def _has_descriptor(spec: KernelSpec, found: Product) -> bool:
    sides = ((term, free) for term in found.terms for free in ("m", "n"))
    return any(describe(spec, found, term, free) is not None for term, free in sides)


def _on_tensor_cores(found: Product) -> bool:
    return found.dtype.itemsize < 4 or found.node.precision != "ieee"


def shared_bytes(spec: KernelSpec, found: Product, config: Config) -> int:
    """Shared memory that the operands of a loop take, and a tile's values beside them.

    Values of the epilogue pass through shared memory on their way between the layouts of the
    product and of global memory. The operands' place is free by then, unless the program walks
    several tiles: then the next tile's operands are in it.
    """
    m, n, k = (config.block(name) for name in ("m", "n", "k"))
    if config.specialized:
        operands = specialized.ring_bytes(found, config) + 4 * _BARRIER_BYTES
        if config.splits > 1:
            return operands  # nothing passes between layouts
        groups = specialized.GROUPS[config.specialized]
        passing = groups * m * n * _PASSING_BYTES // config.subtiles
        sums = any(isinstance(node, visitor.Reduce) for node in spec.tree)
        return operands + passing + sums * groups * gemm_tiles.members(config) * _SUMS_BYTES
    operands = (m + n) * k * found.dtype.itemsize * config.num_stages + _BARRIER_BYTES
    return operands + (_passing_bytes(spec, found, config) if config.programs else 0)


def _passing_bytes(spec: KernelSpec, found: Product, config: Config) -> int:
    """Bytes of the widest tile that the epilogue loads or stores."""
    dependencies = visitor.dependencies(spec.tree, spec.space)
    prologue = product.parts_of(spec.tree, found.position)
    widths = [1]
    for position, node in enumerate(spec.tree):
        if position in prologue or not dependencies[position] >= {"m", "n"}:
            continue
        if isinstance(node, visitor.Load):
            widths.append(spec.inputs[node.input].dtype.itemsize)
        elif isinstance(node, visitor.Store):
            widths.append(spec.outputs[node.output].dtype.itemsize)
    return config.block("m") * config.block("n") * max(widths) // config.subtiles


def _tiles(spec: KernelSpec, found: Product) -> list[Config]:
    extents = {"m": found.m, "n": found.n, "k": max(term.k for term in found.terms)}
    tensor_cores = _on_tensor_cores(found)
    along_k = 128 // found.dtype.itemsize if tensor_cores else 32
    result: dict[Config, None] = {}
    for m, n, warps, stages in _TENSOR_CORE_TILES if tensor_cores else _PLAIN_TILES:
        blocks = tuple(
            (name, min(block, max(32, power_of_two(extents[name]))))
            for name, block in (("m", m), ("n", n), ("k", along_k))
        )
        config = Config(blocks, warps, stages)
        if config.block("m") * config.block("n") < 2048 * warps:
            config = dataclasses.replace(config, num_warps=4)
        if shared_bytes(spec, found, config) <= _SHARED_BYTES:
            result.setdefault(config)
    return list(result)


def _largest_tile(spec: KernelSpec, found: Product) -> int:
    """Elements of a tile that leave registers for the rest of the program."""
    if found.dtype == np.dtype("float64"):
        return 64 * 64
    if found.dtype == np.dtype("int8"):
        return 128 * 128
    if _vector_bytes(spec, found) < 4:
        return 64 * 64  # copies of 2 bytes go through registers, on their way to shared memory
    return 256 * 128


def _vector_bytes(spec: KernelSpec, found: Product) -> int:
    """Bytes of the widest access, at most 16, by which every large operand can be loaded."""
    widths = [16]
    dependencies = visitor.dependencies(spec.tree, spec.space)
    for position in product.parts_of(spec.tree, found.position):
        node = spec.tree[position]
        if not isinstance(node, visitor.Load) or len(dependencies[position] - {"batch"}) < 2:
            continue
        pairs = [(n, abs(s)) for n, s in zip(spec.space.sizes, node.index.strides, strict=True)]
        own = spec.inputs[node.input].dtype.itemsize
        contiguous = [n for n, stride in pairs if stride == 1 and n > 1]
        others = [stride for n, stride in pairs if stride > 1 and n > 1]
        elements = math.gcd(*contiguous, *others, node.index.offset, 16) if contiguous else 1
        widths.append(min(16, elements * own))
    return min(widths)


def _alive(spec: KernelSpec, found: Product) -> int:
    """Values of a tile of the result that the epilogue keeps at once, at most."""
    dependencies = visitor.dependencies(spec.tree, spec.space)
    last = {o: at for at, node in enumerate(spec.tree) for o in visitor.operands(node)}
    for inner in product.parts_of(spec.tree, found.position) - {found.position}:
        last.pop(inner, None)
    # From where to where each is needed: the product from the start.
    tiles = [
        (0 if p == found.position else p, last[p]) for p in last if {"m", "n"} <= dependencies[p]
    ]
    return max(sum(first <= at < end for first, end in tiles) for at in range(len(spec.tree)))


def _without_spills(alive: int, seconds: dict[Config, float]) -> dict[Config, float]:
    """The configurations whose epilogue has registers enough; all if none has."""
    fitting = {
        config: cost
        for config, cost in seconds.items()
        if config.splits > 1 or alive * gemm_tiles.held(config) <= _REGISTERS * config.subtiles
    }
    return fitting or seconds


def _resident(spec: KernelSpec, found: Product, config: Config) -> int:
    """Programs that fit on a multiprocessor when each walks several tiles."""
    walking = dataclasses.replace(config, programs=1)
    fitting = _SHARED_BYTES // shared_bytes(spec, found, walking)
    return 1 if gemm_tiles.held(config) >= _MANY else max(1, min(fitting, 2))


def _seconds(found: Product, config: Config, plain: bool) -> float:
    """The time that the model gives a configuration; only comparisons mean something."""
    m, n = config.block("m"), config.block("n")
    length = max(1, -(-found.k // config.splits))
    rate = _RATE / (1 + _READS * (1 / m + 1 / n))
    rounds = -(-gemm_tiles.number(found, config) // MULTIPROCESSORS)
    element = _PLAIN_ELEMENT if plain or config.splits > 1 else _ELEMENT
    if gemm_tiles.held(config) < _MANY:
        element /= 3
    seconds = rounds * (m * n * (length / rate + element) + _PROGRAM)
    if config.splits > 1:
        moved = 2 * config.splits * found.batch * found.m * found.n * found.node.dtype.itemsize
        seconds += moved / _BANDWIDTH + _LAUNCH
    return seconds
