"""Few long rows: several kernels, so that many programs work on one row.

For each pass over the rows (``mainloops.passes``) there are two. The first (``mainloops.parts``)
leaves what is known of each part of a row; the second, small, combines the parts in a fixed order
and computes what follows for each row, so that results are the same bits from run to run. Where
outputs run along the rows and need these results, a pointwise kernel computes them in the end:

    logsumexp, a sum     parts, combine                    each element read once
    softmax              parts, combine, pointwise         read twice, written once
    layer norm           parts, combine, parts, combine, pointwise
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jevt_kernels import visitor
from jevt_kernels.index_map import IndexMap, Space, TileAxis, row_major
from jevt_kernels.mainloops.passes import Passes, passes
from jevt_kernels.mainloops.reduction import partial_dtype
from jevt_kernels.ops import compute_dtype
from jevt_kernels.spec import KernelSpec, Stages, Step, TensorType
from jevt_kernels.visitor import Compute, Constant, Iota, Load, Node, Reduce, Store

type _Remap = Callable[[IndexMap], IndexMap]


def stages(spec: KernelSpec, parts: int) -> Stages:
    """The kernels that compute a rowwise ``spec`` with each row in ``parts`` parts."""
    return _Splitting(spec, parts).stages()


class _Splitting:
    """The steps so far.

    Attributes:
      values: types of the inputs of the whole and the outputs of the steps.
      rows: for nodes that are one value a row and known: its position in ``values``.
      results: for outputs of the whole that are written: the position in ``values``.
    """

    def __init__(self, spec: KernelSpec, parts: int) -> None:
        self.spec = spec
        self.parts = parts
        self.plan: Passes = passes(spec)
        self.varies = visitor.dependencies(spec.tree, spec.space)
        self.row_axes = spec.space.tile_axis("row").axes
        sizes = tuple(spec.space.sizes[axis] for axis in self.row_axes)
        self.row_shape = sizes
        dense = dict(zip(self.row_axes, row_major(sizes), strict=True))
        # A tensor does not depend on an axis of one element.
        self.row_strides = tuple(
            dense.get(axis, 0) if size != 1 else 0 for axis, size in enumerate(spec.space.sizes)
        )
        self.values: list[TensorType] = list(spec.inputs)
        self.rows: dict[int, int] = {}
        self.results: dict[int, int] = {}
        self.steps: list[Step] = []

    def stages(self) -> Stages:
        stores = [n for n in self.spec.tree if isinstance(n, Store)]
        wide = [s for s in stores if self._is_wide(s)]
        # Full tiles are stored on the way where they can be, and all by one kernel, the last that
        # reads inputs: stores may reuse their buffers.
        count = len(self.plan.of)
        at_last = any(self.plan.known[s.operand] == count for s in wide)
        for number in range(count):
            beside = wide if number == count - 1 and not at_last else []
            partials = self._parts(number, beside)
            narrow = [s for s in stores if s not in wide and self._turn(s) == number]
            self._combine(number, partials, narrow)
        if at_last:
            self._wide(wide)
        results = tuple(self.results[o] for o in range(len(self.spec.outputs)))
        return Stages(tuple(self.steps), results)

    def _is_wide(self, store: Store) -> bool:
        return store.index.depends_on(self.spec.space.tile_axis("col"))

    def _turn(self, store: Store) -> int:
        """The pass after which a store of one value a row can be made."""
        return max(0, self.plan.known[store.operand] - 1)

    def _parts(self, number: int, stores: list[Store]) -> dict[int, int]:
        """The kernel of a pass; where in ``values`` the partial results of its reductions are."""
        tree = _Tree(self, lambda index: index)
        for position in self.plan.of[number]:
            node = self.spec.tree[position]
            assert isinstance(node, Reduce)
            index = IndexMap(tuple(stride * self.parts for stride in self.row_strides))
            kind = TensorType((*self.row_shape, self.parts), partial_dtype(node))
            tree.store(tree.add(position), index, kind)
        for store in stores:
            tree.store(tree.add(store.operand), store.index, self.spec.outputs[store.output])
        suffix = f"_parts{number or ''}"
        first = self._step(tree, suffix, "parts", self.spec.space, stores)
        reductions = self.plan.of[number]
        for place, store in enumerate(stores, first + len(reductions)):
            self.results[store.output] = place
        return dict(zip(reductions, range(first, first + len(reductions)), strict=True))

    def _combine(self, number: int, partials: dict[int, int], stores: list[Store]) -> None:
        """The kernel after a pass: its results, and what each row needs of them later."""
        axes = tuple(range(len(self.row_axes)))
        space = Space(
            (*self.row_shape, self.parts),
            (TileAxis("row", axes), TileAxis("col", (len(axes),))),
        )

        def on_rows(index: IndexMap) -> IndexMap:
            return IndexMap((*(index.strides[a] for a in self.row_axes), 0), index.offset)

        tree = _Tree(self, on_rows)
        strides = tuple(self.row_strides[a] for a in self.row_axes)
        parts = IndexMap((*(stride * self.parts for stride in strides), 1))
        for position in self.plan.of[number]:
            tree.combined(position, partials, parts)
        kept = [p for p in range(len(self.spec.tree)) if self._is_kept(p, number + 1)]
        for position in kept:
            dtype = compute_dtype(tree.dtype(position))
            tree.store(
                tree.add(position), IndexMap((*strides, 0)), TensorType(self.row_shape, dtype)
            )
        for store in stores:
            kind = self.spec.outputs[store.output]
            tree.store(tree.add(store.operand), on_rows(store.index), kind)
        first = self._step(tree, f"_combine{number or ''}", "rowwise", space, [])
        self.rows.update(zip(kept, range(first, first + len(kept)), strict=True))
        for place, store in enumerate(stores, first + len(kept)):
            self.results[store.output] = place

    def _is_kept(self, position: int, known: int) -> bool:
        """Whether a row's value that this pass makes known is read after its kernel."""
        if self.plan.known[position] != known or "col" in self.varies[position]:
            return False
        for reader, node in enumerate(self.spec.tree):
            later = self.plan.known[reader] > known or "col" in self.varies[reader]
            if position in visitor.operands(node) and later and not isinstance(node, Store):
                return True
        node = self.spec.tree[position]
        return not isinstance(node, Constant) and any(
            isinstance(n, Store) and n.operand == position and self._is_wide(n)
            for n in self.spec.tree
        )

    def _wide(self, stores: list[Store]) -> None:
        """The kernel of the outputs that run along the rows."""
        tree = _Tree(self, lambda index: index)
        for store in stores:
            tree.store(tree.add(store.operand), store.index, self.spec.outputs[store.output])
        strides = stores[0].index.strides
        axes = sorted(range(len(strides)), key=lambda axis: -strides[axis])
        space = Space(self.spec.space.sizes, (TileAxis("i", tuple(axes)),))
        first = self._step(tree, "_rows", "pointwise", space, stores)
        for place, store in enumerate(stores, first):
            self.results[store.output] = place

    def _step(
        self, tree: _Tree, suffix: str, mainloop: str, space: Space, stores: list[Store]
    ) -> int:
        """Adds a step; where in ``values`` its outputs begin."""
        outputs = tuple(tree.outputs)
        own = {s.output: len(outputs) - len(stores) + at for at, s in enumerate(stores)}
        aliases = tuple(
            (tree.reads.index(source), own[output])
            for source, output in self.spec.aliases
            if output in own and source in tree.reads
        )
        spec = KernelSpec(
            name=self.spec.name + suffix,
            mainloop=mainloop,
            space=space,
            tree=tuple(tree.nodes),
            inputs=tuple(self.values[i] for i in tree.reads),
            outputs=outputs,
            aliases=aliases,
            comment=self.spec.comment,
        )
        first = len(self.values)
        self.values += outputs
        self.steps.append(Step(spec, tuple(tree.reads)))
        return first


class _Tree:
    """The tree of one step in the making.

    Attributes:
      reads: positions in ``_Splitting.values``, one for each input.
    """

    def __init__(self, whole: _Splitting, remap: _Remap) -> None:
        self.whole = whole
        self.remap = remap
        self.nodes: list[Node] = []
        self.reads: list[int] = []
        self.outputs: list[TensorType] = []
        self.places: dict[int, int] = {}

    def dtype(self, position: int) -> np.dtype:
        """A node's own type in the whole tree."""
        match self.whole.spec.tree[position]:
            case Load() as node:
                return self.whole.spec.inputs[node.input].dtype
            case Compute() | Constant() | Iota() | Reduce() as node:
                return node.dtype
            case node:
                raise TypeError(f"expected a node of a rowwise kernel, got {node}")

    def add(self, position: int) -> int:
        """The place of a node of the whole tree, added with what it needs if it is not there."""
        if position in self.places:
            return self.places[position]
        node = self.whole.spec.tree[position]
        if position in self.whole.rows:
            strides = IndexMap(self.whole.row_strides)
            place = self._load(self.whole.rows[position], self.remap(strides))
            place = self._as(place, self.dtype(position))
        else:
            match node:
                case Load():
                    place = self._load(node.input, self.remap(node.index))
                case Iota():
                    place = self._put(dataclasses.replace(node, index=self.remap(node.index)))
                case Compute():
                    operands = tuple(self.add(operand) for operand in node.operands)
                    place = self._put(dataclasses.replace(node, operands=operands))
                case Reduce():
                    place = self._put(dataclasses.replace(node, operand=self.add(node.operand)))
                case _:
                    place = self._put(node)
        self.places[position] = place
        return place

    def combined(self, position: int, partials: dict[int, int], parts: IndexMap) -> None:
        """Adds a reduction of the whole tree as that of its partial results."""
        node = self.whole.spec.tree[position]
        assert isinstance(node, Reduce)
        dtype = partial_dtype(node)
        value = self._load(partials[position], parts)
        online = self.whole.plan.online.get(position)
        if online is not None:
            exponential = self.whole.spec.tree[online.exponential]
            assert isinstance(exponential, Compute)
            most = self._load(partials[online.maximum], parts)
            less = self._put(Compute("sub", (most, self.add(online.subtrahend)), dtype))
            scale = self._put(Compute(exponential.op, (less,), dtype))
            value = self._put(Compute("mul", (value, scale), dtype))
        op = {"or": "max", "and": "min"}.get(node.op, node.op)
        place = self._put(Reduce(op, value, "col", dtype))
        if node.dtype == np.dtype(bool):
            zero = self._put(Constant(0, dtype))
            place = self._put(Compute("ne", (place, zero), node.dtype))
        self.places[position] = self._as(place, node.dtype)

    def store(self, place: int, index: IndexMap, kind: TensorType) -> None:
        """Adds an output."""
        self.nodes.append(Store(len(self.outputs), place, index))
        self.outputs.append(kind)

    def _load(self, value: int, index: IndexMap) -> int:
        if value not in self.reads:
            self.reads.append(value)
        return self._put(Load(self.reads.index(value), index))

    def _as(self, place: int, dtype: np.dtype) -> int:
        """The value with its own type's name; inside a kernel both are the same."""
        if self._stored(place) == dtype:
            return place
        return self._put(Compute("convert", (place,), dtype))

    def _stored(self, place: int) -> np.dtype:
        node = self.nodes[place]
        if isinstance(node, Load):
            return self.whole.values[self.reads[node.input]].dtype
        assert isinstance(node, Compute | Reduce)
        return node.dtype

    def _put(self, node: Node) -> int:
        if node not in self.nodes or isinstance(node, Constant):  # 0.0 and -0.0 are equal
            self.nodes.append(node)
            return len(self.nodes) - 1
        return self.nodes.index(node)
