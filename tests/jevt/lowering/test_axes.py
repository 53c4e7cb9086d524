"""Views against NumPy, and the identification of axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from jevt.lowering.axes import Factor, View, dense, flat, fresh, leaf, unify
from jevt.lowering.errors import NotFusible


def addresses(view: View) -> np.ndarray:
    """The address of each element of a view."""
    result = np.full(view.shape, view.offset)
    grids = np.indices(view.shape)
    for axis, parts in enumerate(view.axes):
        rest = grids[axis]
        for size, stride in reversed(parts):
            result = result + rest % size * stride
            rest = rest // size
    return result


@st.composite
def chains(draw: Any) -> tuple[tuple[int, ...], list[tuple[str, Any]]]:
    """A shape and view operations whose parameters are drawn as fractions of what they apply to."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3)))
    kinds = st.sampled_from(["transpose", "reshape", "slice", "reverse", "broadcast"])
    names = draw(st.lists(kinds, min_size=1, max_size=5))
    return shape, [(name, draw(st.randoms(use_true_random=False))) for name in names]


def step(name: str, random: Any, view: View, array: np.ndarray) -> tuple[View, np.ndarray]:
    """One view operation on both."""
    shape = array.shape
    match name:
        case "transpose":
            order = random.sample(range(len(shape)), len(shape))
            return view.transpose(order), array.transpose(order)
        case "reshape":
            rest, new = array.size, []
            while rest > 1 and len(new) < 3:
                new.append(random.choice([d for d in range(1, rest + 1) if rest % d == 0]))
                rest //= new[-1]
            new.append(rest)
            return view.reshape(new), array.reshape(new)
        case "slice":
            starts = [random.randrange(size) for size in shape]
            limits = [random.randint(a + 1, size) for a, size in zip(starts, shape, strict=True)]
            steps = [random.randint(1, 3) for _ in shape]
            where = tuple(map(slice, starts, limits, steps))
            return view.slice(starts, limits, steps), array[where]
        case "reverse":
            axes = [axis for axis in range(len(shape)) if random.random() < 0.5]
            return view.reverse(axes), np.flip(array, axes)
        case "broadcast":
            new = (2, *(size if size > 1 else 3 for size in shape))
            dimensions = range(1, len(new))
            return view.broadcast(new, dimensions), np.broadcast_to(array, new)
    raise AssertionError(name)


@given(chains())
@settings(max_examples=300, deadline=None)
def test_views_compose_as_in_numpy(chain: tuple[tuple[int, ...], list[tuple[str, Any]]]) -> None:
    shape, operations = chain
    view = View.of(0, shape)
    array = np.arange(np.prod(shape)).reshape(shape)
    for name, random in operations:
        if array.size > 2000:
            break
        try:
            view, array = step(name, random, view, array)
        except NotFusible:
            event(f"{name} does not compose")
            return
        assert view.shape == array.shape
        np.testing.assert_array_equal(addresses(view), array)
        # Dense says that the address is the position.
        if view.dense:
            np.testing.assert_array_equal(array.reshape(-1), np.arange(array.size))
    event("composes")


def test_common_chains_compose() -> None:
    heads = View.of(0, (32, 512, 1024)).reshape((32, 512, 16, 64)).transpose((0, 2, 1, 3))
    assert heads.axes == (((32, 524288),), ((16, 64),), ((512, 1024),), ((64, 1),))
    back = heads.transpose((0, 2, 1, 3)).reshape((32 * 512, 1024))
    assert back.dense
    qkv = View.of(0, (8, 3072)).slice((0, 1024), (8, 2048), (1, 1)).reshape((8, 16, 64))
    assert (qkv.axes, qkv.offset) == ((((8, 3072),), ((16, 64),), ((64, 1),)), 1024)
    assert not qkv.dense


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: v.transpose((1, 0)).reshape((24,)).slice((0,), (5,), (1,)), "slice of an axis"),
        (lambda v: v.transpose((1, 0)).reshape((24,)).reverse((0,)), "rev of an axis"),
        (lambda v: v.transpose((1, 0)).reshape((8, 3)), "do not factor into common axes"),
        (lambda v: v.reshape((5, 5)), "different sizes|do not factor"),
        (lambda v: v.reshape((0, 4)), "empty"),
    ],
)
def test_what_does_not_compose(make: Any, message: str) -> None:
    with pytest.raises(NotFusible, match=message):
        make(View.of(0, (4, 6)))


def test_unify_splits_the_larger_factor() -> None:
    wide, heads = Factor(1024), (Factor(16), Factor(64))
    unify([wide], heads, "reshape")
    assert [atom.size for atom in wide.atoms()] == [16, 64]
    assert wide.atoms() == [atom for factor in heads for atom in factor.atoms()]
    unify([Factor(4), other := Factor(256)], [wide], "reshape")
    assert [atom.size for atom in wide.atoms()] == [4, 4, 64]
    assert [atom.size for atom in other.atoms()] == [4, 64]


@pytest.mark.parametrize(("left", "right"), [((6,), (4,)), ((2, 3), (3, 2)), ((4,), (8,))])
def test_unify_refuses(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    with pytest.raises(NotFusible, match="test: "):
        unify([Factor(s) for s in left], [Factor(s) for s in right], "test")


@given(st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=5), st.randoms())
@settings(deadline=None)
def test_unify_keeps_positions(sizes: list[int], random: Any) -> None:
    """Both sides of a reshape give each element the same coordinates."""
    cuts = sorted(random.sample(range(len(sizes) + 1), random.randint(0, len(sizes))))
    groups = [sizes[a:b] for a, b in zip([0, *cuts], [*cuts, len(sizes)], strict=True)]
    fine = fresh(sizes)
    coarse = fresh([int(np.prod(group)) for group in groups])
    unify(flat(coarse), flat(fine), "test")
    total = int(np.prod(sizes))
    for axes, shape in ((fine, sizes), (coarse, [int(np.prod(g)) for g in groups])):
        strides = dense(axes, shape).strides()
        assert sorted(strides.values()) == sorted(dense(fine, sizes).strides().values())
        assert sum(s * (atom.size - 1) for atom, s in strides.items()) == total - 1


def test_a_diagonal_is_refused() -> None:
    axes, address = leaf(View.of(0, (4, 4)))
    unify(axes[0], axes[1], "test")
    with pytest.raises(NotFusible, match="diagonal"):
        address.strides()
