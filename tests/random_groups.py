"""Random groups of equations: pointwise operations, views and reductions on small integer arrays.

Integers, because their arithmetic is exact in any order: a kernel is either right or wrong. A
program runs on NumPy or is traced by JAX.
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

MAX_SIZE = 400

#: Makes one more value from those known so far, with NumPy's or JAX's functions.
type Instruction = Callable[[Any, list[Any]], Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of arrays.

    Attributes:
      shapes: of the inputs, all int32.
      text: one line for each instruction.
      instructions: what the lines say.
      results: positions of the returned values, inputs counted first.
    """

    shapes: tuple[tuple[int, ...], ...]
    text: tuple[str, ...]
    instructions: tuple[Instruction, ...] = dataclasses.field(repr=False)
    results: tuple[int, ...]

    def __call__(self, *arrays: Any, numpy: Any = jnp) -> tuple[Any, ...]:
        values = list(arrays)
        for instruction in self.instructions:
            values.append(instruction(numpy, values))
        return tuple(values[position] for position in self.results)

    def inputs(self) -> list[np.ndarray]:
        generator = np.random.default_rng(0)
        return [generator.integers(-50, 50, shape, np.int32) for shape in self.shapes]

    def expected(self) -> list[np.ndarray]:
        with np.errstate(all="ignore"):
            return [np.asarray(v, np.int32) for v in self(*self.inputs(), numpy=np)]


_UNARY = {
    "neg": lambda n, x: -x,
    "abs": lambda n, x: n.abs(x),
    "square": lambda n, x: x * x,
    "not": lambda n, x: ~x,
    "relu": lambda n, x: n.where(x > 0, x, n.int32(0)),
    "wrap": lambda n, x: x.astype(n.int8).astype(n.int32),
    "bool": lambda n, x: (x > 3).astype(n.int32),
}
_BINARY = {
    "add": lambda n, x, y: x + y,
    "sub": lambda n, x, y: x - y,
    "mul": lambda n, x, y: x * y,
    "max": lambda n, x, y: n.maximum(x, y),
    "xor": lambda n, x, y: x ^ y,
    "select": lambda n, x, y: n.where(x < y, x, y + n.int32(7)),
}
_REDUCTIONS = ("sum", "max", "min", "prod")


def _iota(n: Any, shape: tuple[int, ...], axis: int) -> Any:
    if n is jnp:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    index = np.arange(shape[axis], dtype=np.int32).reshape(
        [-1 if i == axis else 1 for i in range(len(shape))]
    )
    return np.broadcast_to(index, shape)


@st.composite
def shapes(draw: Any) -> tuple[int, ...]:
    sizes = draw(st.lists(st.sampled_from([1, 2, 4, 4, 8, 3, 6]), min_size=0, max_size=4))
    while math.prod(sizes) > MAX_SIZE:
        sizes.pop()
    return tuple(sizes)


def factorizations(size: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of this size."""

    @st.composite
    def strategy(draw: Any) -> tuple[int, ...]:
        rest, result = size, []
        for _ in range(draw(st.integers(0, 3))):
            part = draw(st.sampled_from([d for d in range(1, rest + 1) if rest % d == 0]))
            result.append(part)
            rest //= part
        if rest != 1:
            result.append(rest)
        return tuple(result)

    return strategy()


@st.composite
def programs(draw: Any, views_of_values: bool = True) -> Program:
    inputs = tuple(draw(st.lists(shapes(), min_size=1, max_size=3)))
    known: list[tuple[int, ...]] = list(inputs)
    text: list[str] = []
    instructions: list[Instruction] = []

    def append(shape: tuple[int, ...], line: str, instruction: Instruction) -> None:
        text.append(f"v{len(known)}: {shape} = {line}")
        known.append(shape)
        instructions.append(instruction)

    for _ in range(draw(st.integers(2, 12))):
        position = draw(st.integers(0, len(known) - 1))
        shape = known[position]
        rank = len(shape)
        kind = draw(
            st.sampled_from(
                [
                    "unary",
                    "binary",
                    "binary",
                    "binary",
                    "reshape",
                    "transpose",
                    "broadcast",
                    "slice",
                    "rev",
                    "reduce",
                    "reduce",
                    "iota",
                ]
            )
        )
        if kind in ("transpose", "slice", "rev", "reduce", "iota") and not rank:
            kind = "unary"
        p = position
        match kind:
            case "unary":
                name = draw(st.sampled_from(sorted(_UNARY)))
                append(shape, f"{name} v{p}", lambda n, v, p=p, f=_UNARY[name]: f(n, v[p]))
            case "binary":
                fits = [q for q, other in enumerate(known) if _common(shape, other) is not None]
                q = draw(st.sampled_from(fits))
                name = draw(st.sampled_from(sorted(_BINARY)))
                common = _common(shape, known[q])
                assert common is not None
                if math.prod(common) > MAX_SIZE:
                    continue
                append(
                    common,
                    f"{name} v{p} v{q}",
                    lambda n, v, p=p, q=q, f=_BINARY[name]: f(n, v[p], v[q]),
                )
            case "reshape":
                new = draw(factorizations(math.prod(shape)))
                append(new, f"reshape v{p}", lambda n, v, p=p, new=new: n.reshape(v[p], new))
            case "transpose":
                order = tuple(draw(st.permutations(range(rank))))
                append(
                    tuple(shape[i] for i in order),
                    f"transpose v{p} {order}",
                    lambda n, v, p=p, order=order: n.transpose(v[p], order),
                )
            case "broadcast":
                new = (draw(st.sampled_from([2, 3, 4])), *shape)
                if math.prod(new) > MAX_SIZE:
                    continue
                append(new, f"broadcast v{p}", lambda n, v, p=p, new=new: n.broadcast_to(v[p], new))
            case "slice":
                axis = draw(st.integers(0, rank - 1))
                start = draw(st.integers(0, shape[axis] - 1))
                stop = draw(st.integers(start + 1, shape[axis]))
                step = draw(st.integers(1, 3))
                where = (slice(None),) * axis + (slice(start, stop, step),)
                new = tuple(
                    len(range(start, stop, step)) if i == axis else s for i, s in enumerate(shape)
                )
                append(
                    new,
                    f"v{p}[{where}]",
                    lambda n, v, p=p, axis=axis, start=start, stop=stop, step=step, where=where: (
                        lax.slice_in_dim(v[p], start, stop, step, axis) if n is jnp else v[p][where]
                    ),
                )
            case "rev":
                axis = draw(st.integers(0, rank - 1))
                append(shape, f"flip v{p} {axis}", lambda n, v, p=p, axis=axis: n.flip(v[p], axis))
            case "reduce":
                first = draw(st.integers(0, rank - 1))
                axes = draw(st.sampled_from([tuple(range(first, rank)), (first,)]))
                keep = draw(st.booleans())
                name = draw(st.sampled_from(_REDUCTIONS))
                new = tuple(
                    1 if i in axes else s for i, s in enumerate(shape) if keep or i not in axes
                )
                append(
                    new,
                    f"{name} v{p} {axes} {keep}",
                    lambda n, v, p=p, axes=axes, keep=keep, name=name: _reduce(
                        n, name, v[p], axes, keep
                    ),
                )
            case "iota":
                axis = draw(st.integers(0, rank - 1))
                append(
                    shape,
                    f"iota {axis}",
                    lambda n, v, shape=shape, axis=axis: _iota(n, shape, axis),
                )
    computed = range(len(inputs), len(known))
    if not computed:
        append(known[0], "neg v0", lambda n, v: -v[0])
        computed = range(len(inputs), len(known))
    others = draw(st.lists(st.sampled_from(computed), max_size=2))
    results = tuple(dict.fromkeys([computed[-1], *others]))
    return Program(inputs, tuple(text), tuple(instructions), results)


def _reduce(n: Any, name: str, x: Any, axes: tuple[int, ...], keep: bool) -> Any:
    kind = {} if name in ("max", "min") else {"dtype": n.int32}
    return getattr(n, name)(x, axis=axes, keepdims=keep, **kind)


def _common(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(left, right)
    except ValueError:
        return None
