"""Products with an epilogue that are split along ``k``: two kernels.

The first is a batch of shorter products, whose outermost axis is the part of ``k``. The second adds
them up, in order, and computes the epilogue, element by element.
"""

from __future__ import annotations

import dataclasses

from jevt_kernels import visitor
from jevt_kernels.index_map import IndexMap, Space, TileAxis, row_major
from jevt_kernels.mainloops import product
from jevt_kernels.mainloops.product import Product
from jevt_kernels.spec import KernelSpec, Stages, Step, TensorType, UnsupportedKernel
from jevt_kernels.visitor import Compute, Iota, Load, Lookup, Node, Reduce, Store


def divisible(spec: KernelSpec, splits: int) -> bool:
    """Whether :func:`stages` can be made, so far as ``splits`` decides it."""
    axis = _outermost(spec)
    reduced = any(isinstance(node, Reduce) for node in spec.tree)
    return axis is not None and not reduced and spec.space.sizes[axis] % splits == 0


def stages(spec: KernelSpec, found: Product, splits: int) -> Stages:
    """The two kernels.

    Args:
      spec: the kernel.
      found: its product.
      splits: parts of ``k``.

    Raises:
      UnsupportedKernel: if the outermost axis of ``k`` has no such parts, or if something beside
        the product is a reduction.
    """
    axis = _outermost(spec)
    if axis is None or not divisible(spec, splits):
        raise UnsupportedKernel(
            f"a product with this epilogue cannot be split into {splits} parts along its k axis"
        )
    layout = _layout(spec)
    first, first_inputs = _first(spec, found, splits, axis, layout)
    second, second_inputs = _second(spec, found, splits, layout)
    parts = len(spec.inputs)
    steps = (Step(first, first_inputs), Step(second, (*second_inputs, parts)))
    return Stages(steps, tuple(range(parts + 1, parts + 1 + len(spec.outputs))))


def _outermost(spec: KernelSpec) -> int | None:
    """The outermost axis of ``k``."""
    axes = spec.space.tile_axis("k").axes
    return next((axis for axis in axes if spec.space.sizes[axis] > 1), None)


def _layout(spec: KernelSpec) -> tuple[int, ...]:
    """The axes of the result, outermost first, as the first output has them."""
    (strides, *_) = (node.index.strides for node in spec.tree if isinstance(node, Store))
    axes = [a for name in ("batch", "m", "n") for a in spec.space.tile_axis(name).axes]
    return tuple(sorted(axes, key=lambda axis: -strides[axis]))


def _steps(sizes: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, for each axis of the space, of a dense tensor with ``axes``."""
    steps = dict(zip(axes, row_major(tuple(sizes[axis] for axis in axes)), strict=True))
    # A tensor does not depend on an axis of one element.
    return tuple(steps.get(axis, 0) if size != 1 else 0 for axis, size in enumerate(sizes))


def _first(
    spec: KernelSpec, found: Product, splits: int, axis: int, layout: tuple[int, ...]
) -> tuple[KernelSpec, tuple[int, ...]]:
    """The products of the parts, and which inputs they need."""
    space = spec.space
    length = space.sizes[axis] // splits
    sizes = (*(length if a == axis else n for a, n in enumerate(space.sizes)), splits)
    part = len(space.sizes)
    tile = tuple(
        dataclasses.replace(t, axes=(part, *t.axes)) if t.name == "batch" else t for t in space.tile
    )
    nodes: list[Node] = []
    numbers: dict[int, int] = {}
    for position in sorted(product.parts_of(spec.tree, found.position)):
        node = spec.tree[position]
        if isinstance(node, Load | Lookup | Iota):
            strides = node.index.strides
            index = IndexMap((*strides, strides[axis] * length), node.index.offset)
            node = dataclasses.replace(node, index=index)
        numbers[position] = len(nodes)
        nodes.append(visitor.reading(node, numbers))
    index = IndexMap(_steps(sizes, (part, *layout)))
    nodes.append(Store(0, numbers[found.position], index))
    shape = tuple(sizes[a] for a in (part, *layout))
    inputs, tree = _needed(nodes)
    first = KernelSpec(
        name=f"{spec.name}_parts",
        mainloop="gemm",
        space=Space(sizes, tile),
        tree=tree,
        inputs=tuple(spec.inputs[i] for i in inputs),
        outputs=(TensorType(shape, found.node.dtype),),
        comment=f"{spec.comment}\n{splits} parts of a product; {spec.name}_epilogue adds them up.",
    )
    return first, inputs


def _second(
    spec: KernelSpec, found: Product, splits: int, layout: tuple[int, ...]
) -> tuple[KernelSpec, tuple[int, ...]]:
    """The sum of the parts and the epilogue, and which inputs they need, before the parts."""
    contracted = spec.space.tile_axis("k").axes
    sizes = tuple(1 if a in contracted else n for a, n in enumerate(spec.space.sizes))
    dtype = found.node.dtype
    whole = TensorType(tuple(sizes[a] for a in layout), dtype)
    strides = _steps(sizes, layout)
    parts = len(spec.inputs)
    nodes: list[Node] = [Load(parts, IndexMap(strides))]
    for part in range(1, splits):
        nodes.append(Load(parts, IndexMap(strides, part * whole.size)))
        nodes.append(Compute("add", (len(nodes) - 2, len(nodes) - 1), dtype))
    numbers = {found.position: len(nodes) - 1}
    for position in sorted(_above(spec, found)):
        numbers[position] = len(nodes)
        nodes.append(visitor.reading(spec.tree[position], numbers))
    inputs, tree = _needed(nodes)
    second = KernelSpec(
        name=f"{spec.name}_epilogue",
        mainloop="pointwise",
        space=Space(sizes, (TileAxis("i", (*layout, *contracted)),)),
        tree=tree,
        inputs=(
            *(spec.inputs[i] for i in inputs[:-1]),
            TensorType((splits, *whole.shape), dtype),
        ),
        outputs=spec.outputs,
        aliases=tuple((inputs.index(source), output) for source, output in spec.aliases),
        comment=spec.comment,
    )
    return second, inputs[:-1]


def _above(spec: KernelSpec, found: Product) -> frozenset[int]:
    """Positions of the nodes that stores are made of, down to the product."""
    stores = (i for i, node in enumerate(spec.tree) if isinstance(node, Store))
    made = visitor.ancestors(spec.tree, *stores, known=(visitor.Contract,))
    return frozenset(made) - {found.position}


def _needed(nodes: list[Node]) -> tuple[tuple[int, ...], visitor.Tree]:
    """The inputs that nodes read, ascending, and the nodes when they have no others."""
    inputs = tuple(sorted({node.input for node in nodes if isinstance(node, Load | Lookup)}))
    return inputs, tuple(
        dataclasses.replace(node, input=inputs.index(node.input))
        if isinstance(node, Load | Lookup)
        else node
        for node in nodes
    )
