"""Random groups around one matrix product, in whole numbers: exact in any order.

A product of random dimension numbers, a chain of views and pointwise operations before each of its
operands, and a tree behind it whose ends are stored, in any layout, or summed along the rows or the
columns of the product.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

#: Makes one more value from those known so far, with NumPy's or JAX's functions.
type Instruction = Callable[[Any, list[Any]], Any]


@dataclasses.dataclass
class Program:
    """A function of float32 arrays that hold small whole numbers."""

    shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    text: list[str] = dataclasses.field(default_factory=list)
    values: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    instructions: list[Instruction] = dataclasses.field(default_factory=list, repr=False)
    results: list[int] = dataclasses.field(default_factory=list)

    def input(self, draw: Any, shape: tuple[int, ...]) -> int:
        """A new input of this shape, or one that is there already."""
        known = [i for i, other in enumerate(self.shapes) if other == shape]
        if known and draw(st.booleans()):
            position = draw(st.sampled_from(known))
        else:
            position = len(self.shapes)
            self.shapes.append(shape)
        return self.append(shape, f"input {position}", lambda n, v: v[position])

    def append(self, shape: tuple[int, ...], line: str, instruction: Instruction) -> int:
        self.text.append(f"v{len(self.values)}: {shape} = {line}")
        self.values.append(shape)
        self.instructions.append(instruction)
        return len(self.values) - 1

    def __call__(self, *arrays: Any, numpy: Any = jnp) -> tuple[Any, ...]:
        inputs, values = list(arrays), list[Any]()
        for line, instruction in zip(self.text, self.instructions, strict=True):
            values.append(instruction(numpy, inputs if "= input" in line else values))
        return tuple(values[position] for position in self.results)

    def inputs(self) -> list[np.ndarray]:
        generator = np.random.default_rng(0)
        return [generator.integers(-3, 4, shape).astype(np.float32) for shape in self.shapes]

    def expected(self) -> list[np.ndarray]:
        exact = self(*(a.astype(np.float64) for a in self.inputs()), numpy=np)
        return [np.asarray(v, np.float32) for v in exact]


_UNARY: dict[str, Callable[[Any, Any], Any]] = {
    "neg": lambda n, x: -x,
    "relu": lambda n, x: n.maximum(x, 0),
    "clip": lambda n, x: n.minimum(n.maximum(x, -2), 2),
    "step": lambda n, x: (x > 1).astype(x.dtype),
}
_BINARY: dict[str, Callable[[Any, Any, Any], Any]] = {
    "add": lambda n, x, y: x + y,
    "sub": lambda n, x, y: x - y,
    "max": lambda n, x, y: n.maximum(x, y),
    "select": lambda n, x, y: n.where(x < y, x, y + 1),
}


@st.composite
def programs(draw: Any) -> Program:
    """Groups whose product ``build`` takes, unless a view behind the product does not compose."""
    program = Program()
    sizes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), max_size=2)
    batch, left, right, contracted = (draw(sizes) for _ in range(4))
    lhs, lhs_axes = _operand(draw, program, batch, left, contracted)
    rhs, rhs_axes = _operand(draw, program, batch, right, contracted)
    order = draw(st.permutations(range(len(batch))))
    inner = draw(st.permutations(range(len(contracted))))
    numbers = (
        tuple(tuple(axes["k"][i] for i in inner) for axes in (lhs_axes, rhs_axes)),
        tuple(tuple(axes["b"][i] for i in order) for axes in (lhs_axes, rhs_axes)),
    )
    free = [tuple(axes["f"]) for axes in (lhs_axes, rhs_axes)]
    shape = tuple(
        [batch[i] for i in order]
        + [program.values[lhs][a] for a in free[0]]
        + [program.values[rhs][a] for a in free[1]]
    )
    product = program.append(
        shape,
        f"dot_general v{lhs} v{rhs} {numbers}",
        lambda n, v: _dot(n, v[lhs], v[rhs], numbers),
    )
    rows = len(batch) + len(free[0])
    _epilogue(draw, program, product, (len(batch), rows))
    return program


def _operand(
    draw: Any, program: Program, batch: list[int], free: list[int], contracted: list[int]
) -> tuple[int, dict[str, list[int]]]:
    """A value with these axes in any order, and where they are."""
    named = [(kind, i, size) for kind, part in (("b", batch), ("f", free), ("k", contracted))
             for i, size in enumerate(part)]  # fmt: skip
    named = draw(st.permutations(named))
    shape = tuple(size for _, _, size in named)
    axes: dict[str, list[int]] = {"b": [0] * len(batch), "f": [], "k": [0] * len(contracted)}
    for axis, (kind, i, _) in enumerate(named):
        if kind == "f":
            axes["f"].append(axis)
        else:
            axes[kind][i] = axis
    value = _seen(draw, program, shape)
    for _ in range(draw(st.integers(0, 2))):
        value = _pointwise(draw, program, value)
    return value, axes


def _seen(draw: Any, program: Program, shape: tuple[int, ...]) -> int:
    """An input of this shape, or one seen through a view."""
    view = draw(st.sampled_from(["none", "none", "transpose", "reshape", "slice", "broadcast"]))
    if view == "transpose":
        order = tuple(draw(st.permutations(range(len(shape)))))
        inner = tuple(shape[i] for i in np.argsort(order))
        p = program.input(draw, inner)
        return program.append(
            shape, f"transpose v{p} {order}", lambda n, v: n.transpose(v[p], order)
        )
    if view == "reshape":
        p = program.input(draw, (math.prod(shape),))
        return program.append(shape, f"reshape v{p}", lambda n, v: n.reshape(v[p], shape))
    if view == "slice" and shape:
        axis = draw(st.integers(0, len(shape) - 1))
        start = draw(st.integers(0, 2))
        longer = tuple(s + 3 if i == axis else s for i, s in enumerate(shape))
        where = (slice(None),) * axis + (slice(start, start + shape[axis]),)
        p = program.input(draw, longer)
        return program.append(shape, f"v{p}[{where}]", lambda n, v: v[p][where])
    if view == "broadcast" and shape:
        p = program.input(draw, _some_axes(draw, shape))
        return program.append(shape, f"broadcast v{p}", lambda n, v: n.broadcast_to(v[p], shape))
    return program.input(draw, shape)


def _some_axes(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size if draw(st.booleans()) else 1 for size in shape)


def _pointwise(draw: Any, program: Program, p: int) -> int:
    shape = program.values[p]
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(_UNARY)))
        return program.append(shape, f"{name} v{p}", lambda n, v: _UNARY[name](n, v[p]))
    name = draw(st.sampled_from(sorted(_BINARY)))
    q = program.input(draw, _some_axes(draw, shape))
    return program.append(shape, f"{name} v{p} v{q}", lambda n, v: _BINARY[name](n, v[p], v[q]))


def _epilogue(draw: Any, program: Program, product: int, rows: tuple[int, int]) -> None:
    """A tree on the product; ``rows`` are the first and the last of its axes that are rows."""
    tile = [product]
    for _ in range(draw(st.integers(0, 4))):
        tile.append(_pointwise(draw, program, draw(st.sampled_from(tile))))
    for p in {tile[-1], draw(st.sampled_from(tile))}:
        shape = program.values[p]
        end = draw(st.sampled_from(["store", "transpose", "reshape", "narrow", "rows", "columns"]))
        if end == "transpose":
            order = tuple(draw(st.permutations(range(len(shape)))))
            p = program.append(
                tuple(shape[i] for i in order),
                f"transpose v{p} {order}",
                lambda n, v, p=p, order=order: n.transpose(v[p], order),
            )
        elif end == "reshape":
            p = program.append(
                (math.prod(shape),), f"reshape v{p}", lambda n, v, p=p: n.reshape(v[p], (-1,))
            )
        elif end in ("rows", "columns"):
            first, last = rows
            axes = tuple(range(first, last) if end == "rows" else range(last, len(shape)))
            if not axes:
                continue
            if end == "rows" and math.prod(shape[:first]) == 1:
                axes = tuple(range(last))
            p = program.append(
                tuple(s for i, s in enumerate(shape) if i not in axes),
                f"sum v{p} {axes}",
                lambda n, v, p=p, axes=axes: v[p].sum(axes),
            )
        elif end == "narrow":
            p = program.append(
                shape,
                f"clip v{p}",
                lambda n, v, p=p: n.minimum(n.maximum(v[p], -2), 2).astype(n.int8),
            )
        program.results.append(p)
    if not program.results:
        program.results.append(tile[-1])


def _dot(n: Any, x: Any, y: Any, numbers: Any) -> Any:
    if n is jnp:
        return lax.dot_general(x, y, numbers, precision="highest")
    (left, right), (left_batch, right_batch) = numbers
    names = iter(range(50))
    x_names = [next(names) for _ in x.shape]
    y_names = [next(names) for _ in y.shape]
    for a, b in (*zip(left, right, strict=True), *zip(left_batch, right_batch, strict=True)):
        y_names[b] = x_names[a]
    out = [x_names[a] for a in left_batch]
    out += [name for i, name in enumerate(x_names) if i not in (*left, *left_batch)]
    out += [name for i, name in enumerate(y_names) if i not in (*right, *right_batch)]
    return np.einsum(x, x_names, y, y_names, out)
