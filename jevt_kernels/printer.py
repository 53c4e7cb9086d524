"""The text of a kernel: lines, names in scope, linear indices, masks and addresses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

from jevt_kernels import visitor
from jevt_kernels.index_map import IndexMap, TileAxis
from jevt_kernels.spec import Config, Descriptor, KernelSpec, Partial
from jevt_kernels.view import View, dimension

_HEADER = """\
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from jevt_kernels import device_math as dm


@triton.jit
"""

#: The same of a kernel whose warps have different tasks.
_GLUON_HEADER = """\
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.language.extra.cuda import libdevice

from jevt_kernels import device_math as dm
"""

_INT32_MAX = 2**31 - 1


class IndexPrinter:
    """The text of one kernel, line by line, and its index arithmetic."""

    def __init__(self, spec: KernelSpec, config: Config) -> None:
        self.spec = spec
        self.config = config
        self.dependencies = visitor.dependencies(spec.tree, spec.space)
        self.levels = visitor.levels(spec.tree)
        self.view = View(tuple(dimension(t.name) for t in spec.space.tile))
        #: Tile axes whose end is not known before the kernel runs.
        self.ragged: set[str] = set()
        #: For variables of tile axes that a loop walks: the index in the tile, the tile's start.
        self.steps: dict[str, tuple[str, str]] = {}
        self._lines: list[str] = []
        self._indent = 1
        self._scopes: list[dict[object, str]] = [{}]
        self.partials: list[Partial] = []
        self.descriptors: list[Descriptor] = []
        #: Functions that the kernel calls, as text.
        self.functions: list[str] = []
        #: Names of the parameters, where they are not those of inputs and outputs.
        self.parameters: list[str] = []
        #: How long the L2 cache should keep what loads and stores touch, where that is known.
        self.evictions: dict[visitor.Node, str] = {}

    # Text

    def line(self, text: str) -> None:
        self._lines.append("    " * self._indent + text)

    def open(self, text: str) -> None:
        """Starts a block; names bound in it are forgotten at its :meth:`close`."""
        self.line(text)
        self._indent += 1
        self._scopes.append({})

    def open_loop(self, variable: str, start: str, stop: int, step: str) -> None:
        """Starts a loop whose loads are issued ``num_stages`` steps ahead."""
        stages = self.config.num_stages
        if stages > 1:
            self.open(f"for {variable} in tl.range({start}, {stop}, {step}, num_stages={stages}):")
        else:
            self.open(f"for {variable} in range({start}, {stop}, {step}):")

    def close(self) -> None:
        self._indent -= 1
        self._scopes.pop()

    @contextlib.contextmanager
    def viewing(self, view: View) -> Iterator[None]:
        """Prints values for another tile; those known are known under its own names only."""
        outer, self.view = self.view, view
        yield
        self.view = outer

    @contextlib.contextmanager
    def computing(self, spec: KernelSpec) -> Iterator[None]:
        """Prints the nodes of another kernel, of the same tile axes, in this one's text."""
        outer = self.spec, self.dependencies, self.levels
        self.spec = spec
        self.dependencies = visitor.dependencies(spec.tree, spec.space)
        self.levels = visitor.levels(spec.tree)
        yield
        self.spec, self.dependencies, self.levels = outer

    @contextlib.contextmanager
    def forgetting(self) -> Iterator[None]:
        """Names bound inside are forgotten afterwards."""
        self._scopes.append({})
        yield
        self._scopes.pop()

    @property
    def pointers(self) -> tuple[list[str], list[str]]:
        """The names of the inputs, and of the outputs that have no input's buffer."""
        aliased = {output for _, output in self.spec.aliases}
        outputs = [f"y{o}" for o in range(len(self.spec.outputs)) if o not in aliased]
        return [f"x{i}" for i in range(len(self.spec.inputs))], outputs

    def text(self) -> str:
        inputs, outputs = self.pointers
        comment = "".join(f"# {line}".rstrip() + "\n" for line in self.spec.comment.splitlines())
        descriptors = [descriptor.name for descriptor in self.descriptors]
        parameters = self.parameters or inputs + descriptors + outputs
        signature = f"def {self.spec.name}({', '.join(parameters)}):"
        body = signature + "\n" + "\n".join(self._lines) + "\n"
        if not self.functions:
            return comment + _HEADER + body
        decorated = (f"\n\n@gluon.jit\n{text}" for text in (*self.functions, body))
        return comment + _GLUON_HEADER + "".join(decorated)

    @contextlib.contextmanager
    def function(self, name: str, parameters: Sequence[str]) -> Iterator[None]:
        """Prints into a function that the kernel calls, the kernel's names forgotten."""
        outer = self._lines, self._indent, self._scopes
        self._lines, self._indent, self._scopes = [], 1, [{}]
        yield
        self.functions.append(
            f"def {name}({', '.join(parameters)}):\n" + "\n".join(self._lines) + "\n"
        )
        self._lines, self._indent, self._scopes = outer

    def bind(self, key: object, expression: str, name: str) -> str:
        """The name of ``expression``, printed once a scope."""
        key = (self.view.prefix, key)
        for scope in reversed(self._scopes):
            if key in scope:
                return scope[key]
        self.line(f"{name} = {expression}")
        self._scopes[-1][key] = name
        return name

    # Index arithmetic

    @property
    def wide(self) -> bool:
        """Whether offsets need 64 bits."""
        spans = [t.size for t in self.spec.inputs]
        spans += [t.size * self._parts(o) for o, t in enumerate(self.spec.outputs)]
        spans += [
            max(map(abs, node.index.span(self.spec.space)))
            for node in self.spec.tree
            if isinstance(node, visitor.Iota)
        ]
        spans += [self.spec.space.extent(t) for t in self.spec.space.tile]
        slack = math.prod(block for _, block in self.config.blocks)
        return max(spans, default=0) + slack > _INT32_MAX

    def _parts(self, output: int) -> int:
        """An upper bound of the partial results that the kernel leaves of an output."""
        if self.spec.members:
            return 1  # whose types say how many there are
        parts = self.config.splits
        for node in self.spec.tree:
            if isinstance(node, visitor.Store) and node.output == output:
                source = self.spec.tree[node.operand]
                while isinstance(source, visitor.Reduce):
                    extent = self.spec.space.extent(self.spec.space.tile_axis(source.over))
                    parts *= -(-extent // self.config.block(source.over))
                    source = self.spec.tree[source.operand]
        return parts

    def lanes(self, name: str) -> str:
        """Positions in the tile along a tile axis."""
        return self.view.lanes(name)

    def tile_index(self, name: str, start: str) -> None:
        """Prints the linear index and the mask of a tile axis, whose blocks start at ``start``."""
        lanes, variable = self.lanes(name), self.view.variable(name)
        if self.wide and "pid" not in start:  # program_id() is wide already
            lanes += ".to(tl.int64)"
        self.line(f"{variable} = {start} + {lanes}" if start else f"{variable} = {lanes}")
        self._tile_mask(name)

    def stepped_index(self, name: str, start: str) -> None:
        """:meth:`tile_index` in a loop along the axis, ``<variable>_lane`` printed before it.

        In the address of a tensor that is regular along the axis, ``start`` is the last term: what
        comes before it is the same in each step, and Triton's compiler takes it out of the loop.
        """
        variable = self.view.variable(name)
        self.line(f"{variable} = {start} + {variable}_lane")
        self._tile_mask(name)
        self.steps[variable] = (f"{variable}_lane", start)

    def lane_index(self, name: str) -> None:
        """Prints ``<variable>_lane`` for :meth:`stepped_index`."""
        wide = ".to(tl.int64)" if self.wide else ""
        self.line(f"{self.view.variable(name)}_lane = {self.lanes(name)}{wide}")

    def _tile_mask(self, name: str) -> None:
        tile_axis = self.spec.space.tile_axis(name)
        if self.masked(tile_axis):
            variable = self.view.variable(name)
            self.line(f"{variable}_ok = {variable} < {self.spec.space.extent(tile_axis)}")

    def constants(self, **others: int) -> None:
        """Prints the tile sizes, some of them others than the configuration's."""
        for name, block in {**dict(self.config.blocks), **others}.items():
            self.line(f"BLOCK_{name.upper()}: tl.constexpr = {block}")

    def program_id(self) -> str:
        return "tl.program_id(0).to(tl.int64)" if self.wide else "tl.program_id(0)"

    def masked(self, tile_axis: TileAxis) -> bool:
        if self.view.find(tile_axis.name) is None:
            return False
        if tile_axis.name in self.ragged:
            return True
        return self.spec.space.extent(tile_axis) % self.config.block(tile_axis.name) != 0

    def mask(self, names: frozenset[str]) -> str:
        """The conjunction of the masks of these tile axes, "" when none is needed."""
        tile_axes = [t for t in self.spec.space.tile if t.name in names and self.masked(t)]
        return " & ".join(f"{self.view.variable(t.name)}_ok" for t in tile_axes)

    def address(self, index: IndexMap) -> str:
        """The value of an index map at the tile's points, without parentheses."""
        terms: list[str] = []
        last: list[str] = []
        for tile_axis in self.spec.space.tile:
            for digit in index.digits(self.spec.space, tile_axis):
                name = self.view.variable(tile_axis.name)
                if name in self.steps and (digit.divisor, digit.modulus) == (1, None):
                    name, start = self.steps[name]
                    last.append(times(start, digit.stride))
                if digit.divisor != 1:
                    name = self.bind(
                        (name, "div", digit.divisor),
                        f"{name} // {digit.divisor}",
                        f"{name}_d{digit.divisor}",
                    )
                if digit.modulus is not None:
                    name = self.bind(
                        (name, "mod", digit.modulus),
                        f"{name} % {digit.modulus}",
                        f"{name}_m{digit.modulus}",
                    )
                terms.append(times(name, digit.stride))
        if index.offset or not terms:
            terms.append(str(index.offset))
        return " + ".join(terms + last)


def times(name: str, stride: int) -> str:
    """A linear index times a stride."""
    return name if stride == 1 else f"{name} * {stride}"
