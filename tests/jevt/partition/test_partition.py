"""Plans of real programs: valid, optimal where brute force can tell, the same every time."""

import dataclasses
import itertools
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.extend.core import Var
from partitions import check_valid, context, covers, set_partitions, trace
from programs import PROGRAMS

from jevt import _jaxpr
from jevt.lowering.errors import NotFusible
from jevt.lowering.rules import classify
from jevt.lowering.spec import build
from jevt.partition import batch, fallbacks, partition, prices, to_json
from jevt.partition import graph as graphs
from jevt.partition.components import moved, pose
from jevt.partition.duplicate import duplicate, merge_copies
from jevt.partition.printing import all_groups
from jevt.partition.reach import Links, Reach
from jevt.partition.recompute import recompute
from jevt.partition.solve import solve

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 96)).astype(np.float32)
SCALE = RNG.normal(size=96).astype(np.float32)


def layer_norm(x, scale, bias):
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), -1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-6) * scale + bias


def attention(params, x):
    q, k, v = (jnp.einsum("bsd,dhe->bhse", x, params[n]) for n in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bhse,bhte->bhst", q, k) / 4.0)
    return jnp.einsum("bhse,hed->bsd", jnp.einsum("bhst,bhte->bhse", weights, v), params["o"])


def block(params, x):
    x = layer_norm(x + attention(params, x), params["g1"], params["b1"])
    return layer_norm(x + jax.nn.gelu(x @ params["w1"]) @ params["w2"], params["g2"], params["b2"])


def block_params():
    d, heads, e = 32, 2, 16
    shapes = dict.fromkeys("qkv", (d, heads, e)) | {"o": (heads, e, d)}
    shapes |= {"w1": (d, 64), "w2": (64, d)}
    shapes |= dict.fromkeys(("g1", "b1", "g2", "b2"), (d,))
    return {n: RNG.normal(size=s).astype(np.float32) * 0.1 for n, s in shapes.items()}


OPTIMIZER = optax.adamw(1e-2)


def train_step(params, state, x, y):
    loss, gradient = jax.value_and_grad(lambda p: jnp.mean((block(p, x) - y) ** 2))(params)
    updates, state = OPTIMIZER.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss


def train_arguments():
    params = block_params()
    x = RNG.normal(size=(2, 8, 32)).astype(np.float32)
    return params, jax.tree.map(np.asarray, OPTIMIZER.init(params)), x, x[::-1].copy()


def scanned(x):
    def body(carry, row):
        carry = jax.nn.softmax(carry * row + jnp.sin(carry))
        return carry, jnp.exp(carry).sum(-1)

    return lax.scan(body, x, jnp.broadcast_to(x, (3, *x.shape)))


REAL = {
    "softmax": (jax.nn.softmax, (X,)),
    "layer_norm": (layer_norm, (X, SCALE, SCALE)),
    "layer_norm_backward": (
        jax.value_and_grad(lambda *a: jnp.sum(layer_norm(*a) ** 2), (0, 1, 2)),
        (X, SCALE, SCALE),
    ),
    "train_step": (train_step, train_arguments()),
    "scan": (scanned, (X,)),
}


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", REAL)
def test_real_programs(name, backend):
    function, arguments = REAL[name]
    jaxpr, consts = trace(function, *arguments)
    plan = partition(jaxpr, context(backend))
    check_valid(plan, consts + jax.tree.leaves(arguments), rtol=1e-4)
    assert any(g.target == "triton" for g in all_groups(plan))
    assert plan.solution.status in ("optimal", "trivial")
    assert plan.solution.gap < 1e-9


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_construct(name):
    function, arguments = PROGRAMS[name]
    jaxpr, consts = trace(function, *arguments)
    plan = partition(jaxpr, context("triton"))
    check_valid(plan, consts + jax.tree.leaves(arguments), rtol=1e-4)


def test_softmax_and_layer_norm_are_one_group():
    for function, arguments in (REAL["softmax"], REAL["layer_norm"]):
        plan = partition(trace(function, *arguments)[0], context())
        assert [g.kind for g in plan.groups if g.target == "triton"] == ["rowwise"]
        assert len(plan.groups) == 1


# --- against brute force over the equations themselves ------------------------------------------


def random_program(seed):
    """A few equations: pointwise, reductions both ways, broadcasts, reshapes, matrix products."""
    rng = np.random.default_rng(seed)

    def program(x, y):
        rows = [x.sum(-1)] if rng.random() < 0.5 else []
        full, sums = [x, y], []
        for _ in range(rng.integers(3, 6)):
            a, b = (full[i] for i in rng.integers(len(full), size=2))
            match rng.integers(10):
                case 0:
                    rows.append(a.max(-1))
                case 1 if rows:
                    full.append(jnp.broadcast_to(rows[-1][:, None], a.shape))
                case 2 if rows:
                    rows.append(rows[rng.integers(len(rows))] * 2.0)
                case 3:
                    full.append(jnp.tanh(a))
                case 4:
                    full.append(a @ jnp.ones((a.shape[-1], a.shape[-1]), a.dtype))
                case 5:
                    full.append(lax.reshape(lax.reshape(a, (a.size,)) + 1.0, a.shape))
                case 6:
                    sums.append(a.sum(0))
                case 7:
                    sums.append(a.sum(0) * 0.5)
                case _:
                    full.append(a * b)
        keep = [v for v in (*full[2:], *rows) if rng.random() < 0.4]
        return [*keep, full[-1], *rows[-1:], *sums]

    return program


def before_solving(jaxpr, where):
    """The program as the solver gets it: with the copies that are made before."""
    jaxpr = recompute(graphs.read(jaxpr, classify), where.device)
    return duplicate(graphs.read(jaxpr, classify))


def enumerate_partitions(jaxpr, where, limit):
    """Costs of all valid partitions of the equations, and of those with connected groups only.

    Both with copies where nodes have several readers; None if there are more nodes than ``limit``.
    """
    graph = graphs.from_jaxpr(jaxpr, classify)
    fusible = [n for n, node in enumerate(graph.nodes) if not node.opaque]
    if not 0 < len(fusible) <= limit:
        return None
    reach = Reach.of(graph)
    costs = prices.prices(graph, graph, where)
    products = [n for n in fusible if graph.nodes[n].kind == "contraction"]
    none = Links(frozenset(), frozenset())
    problem = pose(graph, reach, fusible, none, costs)
    local = {n: i for i, n in enumerate(fusible)}
    again = tuple(sorted(local[n] for n in costs.copies if n in local))
    problem = dataclasses.replace(problem, copies=again)
    variables = [var for _, var in moved(graph, fusible)]
    touching = {
        frozenset((a, b))
        for t in graph.tensors
        for a, b in itertools.combinations(t.consumers, 2)
        if t.size >= max(node.size for node in graph.nodes)
    }
    touching |= {frozenset((t.producer, c)) for t in graph.tensors for c in t.consumers}
    known = {}

    def prologues(group):
        """Whether the group computes an operand of a product, which is not tried."""
        before = {n for p in products if p in group for n in group if reach.below[n] >> p & 1}
        return any(graph.nodes[n].kind not in ("view", "contraction") for n in before)

    def accepted(group, stored):
        if (group, stored) not in known:
            inner = graph.extract(p for n in group for p in graph.nodes[n].eqns)
            kept = {variables[t] for t in stored}
            outputs = [v for e in inner.eqns for v in e.outvars if v in kept]
            read = {v for e in inner.eqns for v in e.invars if isinstance(v, Var)} | kept
            if any(read.isdisjoint(e.outvars) for e in inner.eqns):
                return False  # dearer than without it
            try:
                build(merge_copies(_jaxpr.make(inner.invars, outputs, inner.eqns)), "g")
            except NotFusible:
                known[group, stored] = False
            else:
                known[group, stored] = not prologues(group)
        return known[group, stored]

    def connected(group):
        found, rest = [group[0]], set(group[1:])
        for node in found:
            near = {o for o in rest if frozenset((node, o)) in touching}
            rest -= near
            found += near
        return not rest

    def executable(groups):
        """The groups in an order in which each finds what it needs, or nothing."""
        made, result, left = set(), [], [*groups, *([n] for n in graph_only)]
        while left:
            ready = [g for g in left if all(graph_needs[n] <= made | set(g) for n in g)]
            if not ready:
                return None
            made.update(n for g in ready for n in g)
            result += ready
            left = [g for g in left if g not in ready]
        return [g for g in result if g[0] in local]

    graph_only = [n for n in range(len(graph.nodes)) if n not in local]
    graph_needs = [set(before) for before in graph.predecessors]
    best = best_connected = None
    for disjoint in set_partitions(range(problem.size)):
        for some in covers(problem, disjoint):
            groups = executable([[fusible[n] for n in g] for g in some])
            if groups is None:
                continue
            own = [[local[n] for n in g] for g in groups]
            stored = problem.stored(own)
            pairs = zip(groups, stored, strict=True)
            if not all(len(g) == 1 or accepted(tuple(g), tuple(s)) for g, s in pairs):
                continue
            cost = problem.cost(own)
            best = cost if best is None else min(best, cost)
            if all(map(connected, groups)):
                best_connected = cost if best_connected is None else min(best_connected, cost)
    return best, best_connected


@pytest.mark.parametrize("seed", range(60))
def test_random_programs_against_brute_force(seed):
    x, y = (RNG.normal(size=(64, 256)).astype(np.float32) for _ in "xy")
    jaxpr, consts = trace(random_program(seed), x, y)
    where = context(("triton", "auto")[seed % 2])  # without and with XLA's kernels as candidates
    plan = partition(jaxpr, where)
    check_valid(plan, [*consts, x, y], rtol=1e-4)
    found = enumerate_partitions(before_solving(jaxpr, where), where, 8)
    if found is None:
        pytest.skip("too large to enumerate")
    best, connected = found
    cost = round(plan.solution.objective_us * 1000)  # in nanoseconds, as the solver counts
    # A group is connected, through whatever its equations share; large tensors are always tried.
    # What contraction has joined is copied as a whole, at a byte an equation less.
    assert best - 8 <= cost <= connected


# --- the same plan every time -------------------------------------------------------------------


def test_same_plan_twice_and_in_another_process():
    script = textwrap.dedent(
        """
        import sys
        sys.path[:0] = sys.argv[1:]
        import importlib.util
        spec = importlib.util.spec_from_file_location("programs_of_this_test", sys.argv[1])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        print(module.plan_text())
        """
    )
    texts = [plan_text(), plan_text()]
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script, __file__, *sys.path],
            env={"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout.rstrip("\n"))
    assert len(set(texts)) == 1


def plan_text():
    function, arguments = REAL["layer_norm_backward"]
    return to_json(partition(trace(function, *arguments)[0], context()))


# --- effects, barriers, bodies ------------------------------------------------------------------


def test_effects_keep_their_order_and_bound_groups():
    def function(x, y):
        a = jnp.sin(x) * 2
        jax.debug.print("first {}", y.sum(), ordered=True)
        b = jnp.cos(y)
        jax.debug.print("second {}", x.sum(), ordered=True)
        jax.debug.print("third {}", (a + b).sum(), ordered=True)
        return a + b

    jaxpr, _ = trace(function, X, X)
    plan = partition(jaxpr, context("triton"))
    effects = [g for g in plan.groups if any(jaxpr.eqns[p].effects for p in g.eqns)]
    assert [g.reason.split(":")[0] for g in effects] == ["effect"] * 3
    assert [g.eqns for g in effects] == sorted(g.eqns for g in effects)
    assert all(len(g.eqns) == 1 and not g.fallback for g in effects)


def test_nothing_crosses_a_barrier():
    def function(x):
        a = jnp.sin(x) * 2
        (b,) = lax.optimization_barrier((a,))
        return jnp.cos(b) + 1

    plan = partition(trace(function, X)[0], context("triton"))
    assert [len(g.eqns) for g in plan.groups] == [2, 1, 2]
    assert plan.groups[1].reason == "barrier: optimization_barrier"
    assert not plan.groups[1].fallback


def test_bodies_have_plans_of_their_own():
    plan = partition(trace(scanned, X)[0], context())
    ((at, body),) = plan.nested
    assert plan.jaxpr.eqns[at[0]].primitive.name == "scan"
    assert at[1] == 0
    assert "rowwise" in {g.kind for g in body.groups if g.target == "triton"}
    check_valid(body, [np.zeros(v.aval.shape, v.aval.dtype) for v in body.jaxpr.invars])


def test_both_bodies_of_while_and_cond():
    def function(x):
        x = lax.cond(x[0, 0] > 0, lambda v: jnp.sin(v) + 1, lambda v: jnp.cos(v) * 2, x)
        return lax.while_loop(lambda v: v.max() < 100.0, lambda v: jnp.exp(v) + 1, x)

    plan = partition(trace(function, X)[0], context("triton"))
    assert len(plan.nested) == 4
    for (position, ordinal), body in plan.nested:
        bodies = [j for _, _, j in _jaxpr.subjaxprs(plan.jaxpr.eqns[position])]
        assert len(body.jaxpr.invars) == len(bodies[ordinal].invars)


# --- choice of target ---------------------------------------------------------------------------


def targets(plan):
    return {g.target for g in all_groups(plan)}


def test_without_a_gpu_all_is_left_to_xla():
    jaxpr, _ = trace(jax.nn.softmax, X)
    plan = partition(jaxpr, context(platform="cpu"))
    assert targets(plan) == {"xla"}
    assert [g.kind for g in plan.groups] == ["rowwise"]
    assert plan.groups[0].reason.startswith("backend: ")
    assert not fallbacks(plan)
    assert targets(partition(jaxpr, context("interpret", platform="cpu"))) == {"triton"}
    assert targets(partition(jaxpr, context("xla"))) == {"xla"}


def test_automatic_partitioning_is_a_fallback():
    plan = partition(trace(jax.nn.softmax, X)[0], context("triton", partitioned=True))
    assert [g.reason for g in fallbacks(plan)] == ["automatic partitioning over several devices"]


def test_cost_model_leaves_pointwise_to_xla_and_triton_takes_it():
    jaxpr, _ = trace(lambda x: jnp.sin(x) * 2 + x, X)
    (group,) = partition(jaxpr, context()).groups
    assert (group.target, group.fallback) == ("xla", False)
    assert group.reason.startswith("cost model: ")
    assert group.xla_us < group.predicted_us + 2
    (group,) = partition(jaxpr, context("triton")).groups
    assert (group.target, group.reason) == ("triton", "")


def test_views_scalars_and_empty_arrays_are_no_kernels():
    def function(x, s):
        return x.T, s * 2 + 1, jnp.zeros((0, 3)) + x[:0, :3]

    plan = partition(trace(function, X, np.float32(1))[0], context("triton"))
    assert targets(plan) == {"xla"}
    assert not fallbacks(plan)
    assert all(g.reason.startswith("cost model: ") for g in plan.groups)


def test_what_no_mainloop_takes():
    plan = partition(trace(lambda x: jnp.sin(jnp.cumsum(x)), X)[0], context("triton"))
    product = next(g for g in plan.groups if g.kind == "opaque")
    assert product.reason.startswith("no mainloop: cumsum")
    assert not product.fallback


def test_arrays_without_elements_are_no_lack_of_kernels():
    def function(x):
        empty = x[:0]
        return empty * 2, empty.sum(0) + 1, jax.nn.softmax(x[:, :0]), empty.T.reshape(0, 2, 3)

    plan = partition(trace(function, X)[0], context("triton"))
    assert not fallbacks(plan)
    assert {g.reason for g in plan.groups if g.kind == "opaque"} == {"cost model: no elements"}


def test_unknown_primitive_is_a_fallback():
    from jax.extend.core import Primitive

    strange = Primitive("strange")
    strange.def_abstract_eval(lambda a: a)
    plan = partition(jax.make_jaxpr(lambda x: strange.bind(x) + 1)(X), context("triton"))
    (group,) = fallbacks(plan)
    assert group.reason == "unknown primitive 'strange'"


def test_refused_equation_is_a_fallback_with_the_reason():
    def no_tanh(jaxpr, name):
        if any(e.primitive.name == "tanh" for e in jaxpr.eqns):
            raise NotFusible("tanh is out of stock")
        return build(jaxpr, name)

    jaxpr, _ = trace(lambda x: jnp.exp(jnp.tanh(jnp.sin(x) * 2)) + 1, X)
    plan = partition(jaxpr, context("triton"), build=no_tanh)
    assert [len(g.eqns) for g in plan.groups] == [2, 1, 2]
    (group,) = fallbacks(plan)
    assert group.reason == "tanh is out of stock"


def test_group_size_that_build_refuses_is_respected():
    def few(jaxpr, name):
        if len(jaxpr.eqns) > 3:
            raise NotFusible("more than three equations")
        return build(jaxpr, name)

    def function(x):
        for _ in range(7):
            x = x * x
        return x

    plan = partition(trace(function, X)[0], context("triton"), build=few)
    assert len(plan.groups) == 3
    assert max(len(g.eqns) for g in plan.groups) == 3
    assert plan.solution.status == "optimal"


@pytest.mark.parametrize("fuel", [0, 1, 2, 100])
def test_fuel_counts_groups_in_order_through_bodies(fuel):
    def function(x):
        return scanned(jax.nn.softmax(x))[0] @ x.T

    jaxpr, _ = trace(lambda x: jax.nn.softmax(function(x)), X)
    full = partition(jaxpr, context("triton"))
    total = sum(g.target == "triton" for g in all_groups(full))
    assert total >= 3
    plan = partition(jaxpr, context("triton", fuel=fuel))
    assert sum(g.target == "triton" for g in all_groups(plan)) == min(fuel, total)
    assert not fallbacks(plan)
    if fuel == 1:
        assert next(g for g in plan.groups if g.kind == "rowwise").target == "triton"


# --- size ---------------------------------------------------------------------------------------


def deep(x, layers):
    for params in layers:
        x = block(params, x)
    return jnp.mean(x)


def test_equal_layers_are_solved_once(monkeypatch):
    solved = []
    monkeypatch.setattr(batch, "solve", lambda *a: solved.append(a[0].size) or solve(*a))
    x = train_arguments()[2]
    counts = {}
    for layers in (4, 8):
        jaxpr, _ = trace(jax.grad(deep, 1), x, [block_params() for _ in range(layers)])
        solved.clear()
        plan = partition(jaxpr, context())
        counts[layers] = len(solved)
        assert plan.solution.status == "optimal"
    assert counts[4] == counts[8]


def test_updates_of_all_parameters_are_not_one_component():
    """A global norm scales them all; they are solved apart, and to the end."""

    def step(gradients):
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in gradients))
        scale = jnp.where(norm < 1.0, 1.0, 1.0 / norm)
        return [jnp.tanh(g * scale) * scale for g in gradients]

    arguments = [np.full((n, 512), 1.0 / n, np.float32) for n in range(100, 109)]
    jaxpr, consts = trace(step, arguments)
    plan = partition(jaxpr, context("triton"), workers=1)
    assert plan.solution.status == "optimal"
    check_valid(plan, [*consts, *arguments], rtol=1e-5)
    scalar = next(e.outvars[0] for e in plan.jaxpr.eqns if e.primitive.name == "select_n")
    makers = [g for g in plan.groups if scalar in g.jaxpr.outvars]
    assert len(makers) == 1 and makers[0].jaxpr.outvars == [scalar]


def test_a_sum_of_all_of_a_product_is_in_its_kernel():
    """And what divides it is not: a kernel of tiles cannot read what it has summed up."""

    def head(x, w, y):
        z = (x @ w).astype(jnp.float32)
        loss = (jax.nn.softplus(z) - y * z).mean() + 1.0
        return loss, (jax.nn.sigmoid(z) - y).astype(jnp.bfloat16)

    shapes = [
        ((1024, 512), jnp.bfloat16),
        ((512, 16384), jnp.bfloat16),
        ((1024, 16384), jnp.float32),
    ]
    jaxpr, _ = trace(head, *(jax.ShapeDtypeStruct(*s) for s in shapes))
    for backend in ("auto", "triton"):
        setting = context(backend)
        hidden = dataclasses.replace(setting.device, exposed_epilogue=0.0)
        plan = partition(jaxpr, dataclasses.replace(setting, device=hidden))
        (product,) = (g for g in plan.groups if g.kind == "gemm")
        assert product.target == "triton"
        assert sorted(v.aval.size for v in product.jaxpr.outvars) == [1, 1024 * 16384]
        assert plan.solution.status == "optimal"
