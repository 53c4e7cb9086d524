"""Constants of loops and branches are made inside."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rewriting import evaluate, same, traced

from jevt.passes import dce, sink_constants


def sunk(fun, *args):
    before = traced(fun, *args)
    after = dce.run(sink_constants.run(before))
    jax.extend.core.check_jaxpr(after)
    assert sink_constants.run(after) is after
    same(evaluate(after, *args, compiled=True), evaluate(before, *args, compiled=True))
    return before, after


def names(jaxpr):
    return [e.primitive.name for e in jaxpr.eqns]


def bodies(jaxpr, primitive):
    (eqn,) = [e for e in jaxpr.eqns if e.primitive.name == primitive]
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, jax.extend.core.Jaxpr):
                yield item


X = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)


def triangle():
    return jnp.tril(jnp.ones((6, 6), bool))


def test_scan():
    def fun(x):
        mask = triangle()

        def body(carry, _):
            return jnp.where(mask, jnp.sin(carry), 0.5), None

        return lax.scan(body, x, None, length=3)[0]

    before, after = sunk(fun, X)
    ((old,), (new,)) = (list(bodies(jaxpr, "scan")) for jaxpr in (before, after))
    assert len(old.invars) == 2 and len(new.invars) == 1
    assert "iota" in names(new)
    assert "iota" not in names(after)


def test_numbers():
    def fun(x):
        scale = jnp.sqrt(jnp.float32(6.0))

        def body(carry, _):
            return jnp.sin(carry) * scale, None

        return lax.scan(body, x, None, length=3)[0]

    _, after = sunk(fun, X)
    (body,) = bodies(after, "scan")
    assert len(body.invars) == 1


def test_gradient_of_scan():
    def fun(x):
        def body(carry, _):
            return jnp.where(triangle(), jnp.sin(carry), 0.5), None

        return lax.scan(body, x, None, length=3)[0].sum()

    before, after = sunk(jax.grad(fun), X)
    count = [
        sum(len(e.invars) for e in j.eqns if e.primitive.name == "scan") for j in (before, after)
    ]
    assert count[1] < count[0]


def test_while_and_cond():
    def loop(x):
        mask, limit = triangle(), jnp.full((6, 6), 3.0)

        def go_on(state):
            return (state[1] < limit).all()

        def body(state):
            return jnp.where(mask, state[0] * 2, state[0]), state[1] + 1

        return lax.while_loop(go_on, body, (x, x * 0))[0]

    _, after = sunk(loop, X)
    for body in bodies(after, "while"):
        # JAX 0.11 keeps constant operands of a while loop, which nobody reads any more.
        atoms = [v for e in body.eqns for v in e.invars]
        assert not any(v is constant for constant in body.invars[:-2] for v in atoms)
        assert "iota" in names(body) or "broadcast_in_dim" in names(body)

    def branch(x):
        mask = triangle()
        return lax.cond(x[0, 0] > 0, lambda x: x * mask, lambda x: x - mask, x)

    _, after = sunk(branch, X)
    assert all(len(body.invars) == 1 for body in bodies(after, "cond"))


def test_loops_in_loops():
    def fun(x):
        mask = triangle()

        def outer(carry, _):
            def inner(carry, _):
                return jnp.where(mask, jnp.sin(carry), 0.5), None

            return lax.scan(inner, carry, None, length=2)[0], None

        return lax.scan(outer, x, None, length=3)[0]

    _, after = sunk(fun, X)
    (outer,) = bodies(after, "scan")
    (inner,) = bodies(outer, "scan")
    assert len(outer.invars) == len(inner.invars) == 1


def test_what_depends_on_an_input_stays_outside():
    def fun(x, y):
        hard = jnp.sin(y)

        def body(carry, _):
            return carry * hard, None

        return lax.scan(body, x, None, length=3)[0]

    before = traced(fun, X, X)
    assert sink_constants.run(before) is before


def test_long_computations_stay_outside():
    def fun(x):
        mask = jnp.arange(6.0)
        for _ in range(sink_constants.MAX_EQUATIONS + 1):
            mask = jnp.sin(mask) + 1

        def body(carry, _):
            return carry * mask, None

        return lax.scan(body, x, None, length=3)[0]

    before = jax.make_jaxpr(fun)(X)
    assert sink_constants.run(before) is before
