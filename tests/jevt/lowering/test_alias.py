"""Which donated inputs an output may overwrite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest
from jax.extend.core import Jaxpr

from jevt.lowering import multi_tensor
from jevt.lowering import spec as lowering
from jevt.lowering.alias import donated_aliases, partners
from jevt_kernels import interpreter
from jevt_kernels.spec import Config, KernelSpec

X = contract.random((6, 16))
BIAS = contract.random((16,))
COLUMN = contract.random((6, 1))


def aliases(
    function: Callable[..., Any], *arrays: Any, free: tuple[int, ...] | None = None
) -> tuple[tuple[int, int], ...]:
    jaxpr = contract.group(function, *arrays)
    spec = lowering.build(jaxpr, "kernel")
    chosen = range(len(arrays)) if free is None else free
    return donated_aliases(spec, jaxpr, {jaxpr.invars[i] for i in chosen})


def test_an_update_happens_in_place() -> None:
    assert aliases(lambda w, g: w - 0.1 * g, X, X) == ((0, 0),)
    assert aliases(lambda w, g: w - 0.1 * g, X, X, free=(1,)) == ((1, 0),)
    assert aliases(lambda w, g: w - 0.1 * g, X, X, free=()) == ()


def test_each_buffer_is_taken_once() -> None:
    def adam(w: Any, m: Any, g: Any) -> Any:
        m = 0.9 * m + g
        return w - m, m

    assert aliases(adam, X, X, X) == ((0, 0), (1, 1))
    assert aliases(lambda x, y: (x + y, x - y), X, X) == ((0, 0), (1, 1))


def test_all_outputs_share_or_none() -> None:
    assert aliases(lambda x: (x + 1, x + 2), X) == ()


def test_only_equal_types_share() -> None:
    assert aliases(lambda x: x.astype(jnp.bfloat16), X) == ()
    assert aliases(lambda x: x.reshape(-1) + 1, X) == ()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[::-1] + 1,
        lambda x: x + x[::-1],
        lambda x: x.T + 1,
    ],
)
def test_other_points_are_not_overwritten(function: Callable[..., Any]) -> None:
    """Another program instance could read what this one has already written."""
    assert aliases(function, contract.random((8, 8))) == ()


def test_a_value_that_several_warps_read_is_not_overwritten() -> None:
    def scaled(x: Any, column: Any) -> Any:
        return x * column + x.sum(1, keepdims=True), column * 0.9

    def full(x: Any, column: Any) -> Any:
        return x * column + x.sum(1, keepdims=True)

    assert aliases(scaled, X, COLUMN) == ()
    assert aliases(full, X, COLUMN) == ((0, 0),)


def test_whole_rows_happen_in_place() -> None:
    assert aliases(jax.nn.softmax, X) == ((0, 0),)
    assert aliases(lambda x, b: x.sum(1, keepdims=True) * x + b, X, BIAS) == ((0, 0),)


@pytest.mark.interpret
@pytest.mark.parametrize("blocks", [None, (("row", 2), ("col", 4))])
def test_in_place_is_right(blocks: Any) -> None:

    def function(x: Any) -> Any:
        return jax.nn.softmax(x), x.max(1)

    jaxpr = contract.group(function, X)
    spec = lowering.build(jaxpr, "kernel")
    # A mixture, which `donated_aliases` does not choose but kernels can do.
    spec = replace(spec, aliases=((0, 0),))
    config = None if blocks is None else Config(blocks)
    got = interpreter.run(spec, X, config=config)
    contract.same(got, jax.jit(function)(X))


def test_an_output_takes_the_buffer_that_it_is_returned_in() -> None:
    """As JAX pairs donated inputs and outputs, by type and order, not as the kernel lists them."""

    def step(old: Any, w: Any, g: Any) -> Any:
        mean = 0.9 * old + g
        return mean, w - mean

    jaxpr = contract.group(step, X, X, X)
    free = set(jaxpr.invars[:2])
    assert partners(jaxpr, free) == dict(zip(jaxpr.outvars, jaxpr.invars[:2], strict=True))

    def returned(turned: bool) -> tuple[tuple[int, int], ...]:
        """The pairs of the step as a kernel, where the program returns its results so."""
        outputs = jaxpr.outvars[::-1] if turned else jaxpr.outvars
        wanted = partners(jaxpr.replace(outvars=outputs), free)
        return donated_aliases(lowering.build(jaxpr, "kernel"), jaxpr, free, wanted)

    assert returned(turned=False) == ((0, 0), (1, 1))
    assert returned(turned=True) == ((1, 0), (0, 1))


def updates(rates: int = 1) -> tuple[Jaxpr, KernelSpec]:
    """Two updates in one kernel, with a rate for both or one each."""
    function = lambda w, g, r: w - r * g  # noqa: E731
    parts = [contract.group(function, x, x, np.float32(1)) for x in (X, BIAS)]
    specs = [lowering.build(part, "update") for part in parts]
    if rates == 1:
        rate = parts[0].invars[2]
        eqns = [
            e.replace(invars=[rate if v is parts[1].invars[2] else v for v in e.invars])
            for e in parts[1].eqns
        ]
        parts[1] = parts[1].replace(invars=[*parts[1].invars[:2], rate], eqns=eqns)
    return multi_tensor.join(parts, specs, "updates")


@pytest.mark.parametrize("rates", [1, 2])
def test_all_members_are_in_place_or_none(rates: int) -> None:
    jaxpr, spec = updates(rates)
    first, second = (jaxpr.invars[m.inputs[0]] for m in spec.members)
    assert {first.aval.shape, second.aval.shape} == {X.shape, BIAS.shape}  # type: ignore[attr-defined]
    pairs = donated_aliases(spec, jaxpr, {first, second})
    assert pairs == tuple((m.inputs[0], m.outputs[0]) for m in spec.members)
    assert donated_aliases(spec, jaxpr, {first}) == ()


def test_what_two_members_read_is_not_overwritten() -> None:
    part = contract.group(lambda w, g: w - g, X, X)
    spec = lowering.build(part, "update")
    w, g = part.invars
    again = contract.group(lambda w, g: w - g, X, X)
    names = {again.invars[0]: w, again.invars[1]: again.invars[1]}
    eqns = [e.replace(invars=[names.get(v, v) for v in e.invars]) for e in again.eqns]
    again = again.replace(invars=[w, again.invars[1]], eqns=eqns)
    jaxpr, both = multi_tensor.join([part, again], [spec, spec], "both")
    assert donated_aliases(both, jaxpr, {w}) == ()
    assert len(donated_aliases(both, jaxpr, {g, again.invars[1]})) == 2
