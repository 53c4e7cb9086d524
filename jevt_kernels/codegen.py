"""Visitor tree to Triton source text.

A mainloop (``jevt_kernels.mainloops``) decides how tiles are walked; the :class:`Printer` here
prints index arithmetic, masks and nodes, the same for every mainloop. Generated code keeps these
names:

* ``x0, x1, …`` inputs, ``y0, y1, …`` outputs, ``v<position>`` the value of a node (``a<position>``
  and ``b<position>`` in the operands of a matrix product);
* ``lhs_desc, rhs_desc`` tensor descriptors of the operands of a matrix product, ``lhs1_desc, …``
  of further ones that are added to it;
* ``<axis>`` the linear index along a tile axis (``i``, ``row``, ``col``), ``<axis>_ok`` its mask;
* ``BLOCK_<AXIS>`` the tile size.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jevt_kernels import visitor
from jevt_kernels.index_map import IndexMap, block_axis
from jevt_kernels.ops import OPS, TRITON_TYPES, Arg, compute_dtype, is_float, triton_type
from jevt_kernels.printer import IndexPrinter, times
from jevt_kernels.spec import Config, KernelSpec, Source, UnsupportedKernel


def default_config(spec: KernelSpec) -> Config:
    """The configuration that the mainloop prefers for a GPU of which nothing is known.

    (:func:`jevt_kernels.limits.default_config` is that for a known GPU.)
    """
    from jevt_kernels.mainloops import MAINLOOPS

    return next(c for c in MAINLOOPS[spec.mainloop].configs(spec) if not c.descriptors)


def generate(spec: KernelSpec, config: Config | None = None) -> Source:
    """Prints the kernel.

    Args:
      spec: what to compute.
      config: tile sizes and warps; :func:`default_config` by default. A block that is larger
        than its axis needs is made smaller.

    Raises:
      UnsupportedKernel: the mainloop cannot generate this spec.
    """
    from jevt_kernels.mainloops import MAINLOOPS, STAGES

    if spec.mainloop not in MAINLOOPS:
        raise UnsupportedKernel(
            f"expected a mainloop of {sorted(MAINLOOPS)}, got {spec.mainloop!r}"
        )
    mainloop = MAINLOOPS[spec.mainloop]
    config = config or default_config(spec)
    in_stages = STAGES.get(spec.mainloop)
    if in_stages is not None and (stages := in_stages(spec, config)) is not None:
        first = generate(stages.steps[0].spec, dataclasses.replace(config, splits=1))
        return dataclasses.replace(first, stages=stages)
    config = _fitted(config, spec, mainloop.SMALLEST_BLOCK)
    printer = Printer(spec, config)
    grid = mainloop.emit(printer)
    return Source(
        printer.text(),
        spec.name,
        grid,
        config,
        tuple(printer.partials),
        tuple(printer.descriptors),
    )


def _fitted(config: Config, spec: KernelSpec, smallest: int) -> Config:
    extents: dict[str, int] = {}
    for tile_axis in spec.space.tile:
        name = block_axis(tile_axis.name)
        extents[name] = max(extents.get(name, 0), spec.space.extent(tile_axis))
    blocks = tuple(
        (name, min(block, max(smallest, power_of_two(extents[name]))))
        for name, block in config.blocks
    )
    return dataclasses.replace(config, blocks=blocks)


def power_of_two(extent: int) -> int:
    """The smallest power of two that is not below ``extent``, at least 1."""
    return 1 << max(0, extent - 1).bit_length()


class Printer(IndexPrinter):
    """Prints one kernel; a mainloop drives it."""

    def is_constant(self, position: int) -> bool:
        return isinstance(self.spec.tree[position], visitor.Constant)

    def value(self, position: int) -> str:
        """The name that holds a node's value; prints it with what it needs if not yet there."""
        key = (self.view.prefix, ("value", position))
        for scope in reversed(self._scopes):
            if key in scope:
                return scope[key]
        expression = self._expression(position)
        if expression.isidentifier():  # a conversion that changes nothing inside a kernel
            self._scopes[-1][key] = expression
            return expression
        name = f"{self.view.prefix}{position}"
        self.line(f"{name} = {expression}")
        self._scopes[-1][key] = name
        return name

    def set_value(self, position: int, name: str) -> None:
        """Declares that ``name`` holds the node's value in the present scope."""
        self._scopes[-1][(self.view.prefix, ("value", position))] = name

    def _expression(self, position: int) -> str:
        node = self.spec.tree[position]
        match node:
            case visitor.Load():
                return self._load(node, self.dependencies[position])
            case visitor.Constant():
                return self._full(literal(node.value, node.dtype), node.dtype)
            case visitor.Iota():
                address = self.address(node.index)
                if not self._addressed(node.index):
                    return self._full(address, node.dtype)
                number = address if address.isidentifier() else f"({address})"
                return f"{number}.to({triton_type(node.dtype)})"
            case visitor.Compute():
                return self._compute(node)
            case visitor.Reduce():
                raise UnsupportedKernel(
                    f"mainloop {self.spec.mainloop!r} holds no reduction along {node.over!r}"
                )
            case visitor.Contract():
                raise UnsupportedKernel(f"mainloop {self.spec.mainloop!r} holds no matrix product")
            case visitor.Lookup():
                return self._lookup(node, self.dependencies[position])
            case visitor.Segment():
                raise UnsupportedKernel(f"mainloop {self.spec.mainloop!r} holds no sum of segments")
            case visitor.Store():
                raise AssertionError("stores are roots, they have no value")

    def _full(self, text: str, dtype: np.dtype) -> str:
        """A number as a tile of one element."""
        return self.view.full(self.view.shape(), text, triton_type(dtype))

    def _load(self, node: visitor.Load, varies: frozenset[str]) -> str:
        dtype = self.spec.inputs[node.input].dtype
        text = self.load_stored(node, varies)
        return text if compute_dtype(dtype) == dtype else f"{text}.to({triton_type(dtype)})"

    def _lookup(self, node: visitor.Lookup, varies: frozenset[str]) -> str:
        dtype = self.spec.inputs[node.input].dtype
        row = self.value(node.row) + (".to(tl.int64)" if self.wide else "")
        arguments = [f"x{node.input} + {times(row, node.stride)} + {self.address(node.index)}"]
        mask = self.mask(varies)
        if node.rows is not None:
            number = self.value(node.row)
            inside = f"({number} >= 0) & ({number} < {node.rows})"
            mask = f"{mask} & {inside}" if mask else inside
        if mask:
            arguments += [f"mask={mask}", "other=0"]
        text = f"tl.load({', '.join(arguments)})"
        return text if compute_dtype(dtype) == dtype else f"{text}.to({triton_type(dtype)})"

    def load_stored(self, node: visitor.Load, varies: frozenset[str]) -> str:
        """Elements of the type in which memory holds them; 0 beyond the ends of axes."""
        arguments = [f"x{node.input} + {self.address(node.index)}"]
        if mask := self.mask(varies):
            arguments += [f"mask={mask}", "other=0"]
        if policy := self.evictions.get(node):
            arguments.append(f"eviction_policy='{policy}'")
        return f"tl.load({', '.join(arguments)})"

    def _compute(self, node: visitor.Compute) -> str:
        op = OPS[node.op]
        varying = [o for o in node.operands if not self.is_constant(o)]
        args: list[Arg] = []
        for operand in node.operands:
            source = self.spec.tree[operand]
            dtype = self.node_dtype(operand)
            if isinstance(source, visitor.Constant):
                numbers = op.literals is True or (op.literals == "float" and is_float(dtype))
                # Triton makes a float of its own accord a float32.
                numbers = numbers and dtype != np.dtype("float64")
                bare = node.op == "integer_pow" or (numbers and bool(varying))
                text = literal(source.value, source.dtype) if bare else self.value(operand)
                args.append(Arg(text, dtype, source.value))
            else:
                args.append(Arg(self.value(operand), dtype))
        if op.results == 1:
            return op.emit(tuple(args), node.dtype)
        key = (self.view.prefix, (node.op, node.operands))
        stem = self.view.prefix + "_".join(map(str, node.operands))
        names = [f"{stem}_r{r}" for r in range(op.results)]
        for scope in reversed(self._scopes):
            if key in scope:
                return names[node.result]
        self.line(f"{', '.join(names)} = {op.emit(tuple(args), node.dtype)}")
        self._scopes[-1][key] = names[0]
        return names[node.result]

    def node_dtype(self, position: int) -> np.dtype:
        """A node's own type."""
        node = self.spec.tree[position]
        match node:
            case visitor.Load() | visitor.Lookup():
                return self.spec.inputs[node.input].dtype
            case visitor.Store():
                return self.spec.outputs[node.output].dtype
            case _:
                return node.dtype

    def store_all(self, positions: list[int]) -> None:
        """Prints stores, after all that they need: an output may share its buffer with an input."""
        for position in positions:
            self.value(visitor.operands(self.spec.tree[position])[0])
        for position in positions:
            self.store(position)

    def store(self, position: int) -> None:
        node = self.spec.tree[position]
        assert isinstance(node, visitor.Store)
        varies = self.stored_along(node)
        dtype = self.spec.outputs[node.output].dtype
        value = self.value(node.operand)
        if compute_dtype(dtype) != dtype:
            value = f"{value}.to({TRITON_TYPES[dtype]})"
        aliased = {output: source for source, output in self.spec.aliases}
        pointer = f"x{aliased[node.output]}" if node.output in aliased else f"y{node.output}"
        arguments = [f"{pointer} + {self.store_address(node)}", value]
        if mask := self.mask(varies):
            arguments.append(f"mask={mask}")
        if policy := self.evictions.get(node):
            arguments.append(f"eviction_policy='{policy}'")
        self.line(f"tl.store({', '.join(arguments)})")

    def stored_along(self, node: visitor.Store) -> frozenset[str]:
        """The tile axes along which a store, or the value that it writes, varies.

        Raises:
          UnsupportedKernel: if the value has more elements than the store.
        """
        follows = frozenset(t.name for t in self.spec.space.tile if node.index.depends_on(t))
        varies = self.dependencies[node.operand]
        for name in varies - follows:
            if self.spec.space.extent(self.spec.space.tile_axis(name)) > 1:
                raise UnsupportedKernel(
                    f"output {node.output} does not follow every axis of its value"
                )
        return varies | follows

    def store_address(self, node: visitor.Store) -> str:
        """The address of a store, of the shape of what it writes."""
        address = self.address(node.index)
        # An axis of one element has no part in the address, but the tile is longer than that.
        follows = self._addressed(node.index)
        terms = [
            dimension.variable
            for dimension in self.view.dimensions
            if dimension.name in self.dependencies[node.operand] - follows
        ]
        if address == "0" and terms:
            return " + ".join(terms)
        if not terms and follows.isdisjoint(self.view.names):
            # A single element, whose value may be a block of one.
            shape = self.view.shape()
            if address.isdecimal():
                return self.view.full(shape, address, "tl.int32")
            return f"{self.view.full(shape, '0', 'tl.int32')} + {address}"
        return " + ".join((address, *terms))

    def _addressed(self, index: IndexMap) -> set[str]:
        """The tile axes that have a part in an address."""
        space = self.spec.space
        return {tile.name for tile in space.tile if index.digits(space, tile)}

    def stores(self) -> list[int]:
        return [i for i, node in enumerate(self.spec.tree) if isinstance(node, visitor.Store)]


def literal(value: bool | int | float, dtype: np.dtype) -> str:
    """A constant as Triton text."""
    if is_float(dtype):
        number = float(value)
        return repr(number) if math.isfinite(number) else f"float('{number}')"
    if dtype == np.dtype(bool):
        return repr(bool(value))
    return repr(int(value))
