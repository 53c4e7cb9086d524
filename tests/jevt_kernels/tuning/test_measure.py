"""The fastest right configuration is found, whatever becomes of the others."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import gemm_kernels
import jax
import jax.numpy as jnp
import kernel_contract as contract
import numpy as np
import pytest
from tuning_bench import FakeBench

from jevt_kernels import launch, segment_sum
from jevt_kernels.by_hand import GemmTree
from jevt_kernels.reference import reference
from jevt_kernels.spec import TensorType
from jevt_kernels.tuning import DeviceBench, Limits, measure, search_space
from jevt_kernels.tuning import operands as drawn
from jevt_kernels.tuning.bench import OutOfMemory, Work
from jevt_kernels.tuning.contest import contest

SPEC = gemm_kernels.product((1, 96, 80, 64), contract.BFLOAT16)
CHOSEN = search_space(SPEC, 90, 4).chosen
LIMITS = Limits(configs=4)


def alternative(*operands):
    return reference(SPEC, *operands)


def search(bench, **options):
    return measure(SPEC, alternative, bench, capability=90, limits=LIMITS, **options)


def times(*us):
    return dict(zip((*CHOSEN, None), us, strict=True))


def test_the_fastest_is_taken_beside_xla():
    bench = FakeBench(times(9.0, 7.0, 8.0, 30.0, 10.0))
    result = search(bench)
    assert result.record.config == CHOSEN[1]
    assert result.record.kernel_us == pytest.approx(7)
    assert result.record.xla_us == pytest.approx(10)
    assert result.record.about == "gemm 1x96x80x64"
    assert [t.config for t in result.trials] == [CHOSEN[i] for i in (1, 2, 0)] + [None, CHOSEN[3]]
    assert sorted(map(repr, bench.prepared)) == sorted(map(repr, (*CHOSEN, None)))
    # what is far behind counts in one turn, XLA and the others in three; the first warms up
    assert [bench.timed.count(c) for c in (*CHOSEN, None)] == [4, 4, 4, 2, 4]


def test_whoever_comes_first_pays_for_nothing():
    bench = FakeBench(lambda config: 900.0 if len(bench.timed) == 1 else 7.0)
    functions = {config: functools.partial(launch.call, SPEC, config=config) for config in CHOSEN}
    ran = contest(functions, bench, bench.work(SPEC.inputs, SPEC.outputs, 0.0, False), LIMITS)
    assert [trial.us for trial, _ in ran] == [pytest.approx(7)] * len(CHOSEN)
    assert bench.timed.count(CHOSEN[0]) == bench.timed.count(CHOSEN[1])


def test_candidates_that_fail_are_skipped_with_their_reason():
    fails = {
        CHOSEN[1]: ValueError("out of shared memory\nat length"),
        CHOSEN[2]: RuntimeError(300 * "!"),
    }
    result = search(FakeBench(times(9.0, 1.0, 1.0, 30.0, 5.0), fails))
    assert result.record.config == CHOSEN[0]
    errors = {t.config: t.error for t in result.trials}
    assert errors[CHOSEN[1]] == "ValueError: out of shared memory"
    assert len(errors[CHOSEN[2]]) == 80
    assert "out of shared memory" in str(result.trials[-2]) + str(result.trials[-1])


def test_a_failure_while_timing_is_no_end():
    def us(config):
        if config == CHOSEN[0]:
            raise RuntimeError("INTERNAL: launch failed")
        return {CHOSEN[1]: 4.0, None: 5.0}.get(config, 9.0)

    assert search(FakeBench(us)).record.config == CHOSEN[1]


def test_wrong_results_are_discarded():
    result = search(FakeBench(times(1.0, 7.0, 8.0, 9.0, 10.0), wrong=CHOSEN[:1]))
    assert result.record.config == CHOSEN[1]
    (wrong,) = (t for t in result.trials if t.config == CHOSEN[0])
    assert wrong.us is None
    assert wrong.error == "wrong: output 0 differs from XLA's by 2.0e+00, at most 1e-02"


def test_all_wrong_is_remembered():
    record = search(FakeBench(times(1.0, 7.0, 8.0, 9.0, 10.0), wrong=CHOSEN)).record
    assert (record.config, record.kernel_us) == (None, None)
    assert record.xla_us == pytest.approx(10)
    assert record.error.startswith("wrong: output 0")


def test_nothing_is_remembered_where_nothing_was_learned():
    fails = dict.fromkeys(CHOSEN, ImportError("no jax-triton"))
    result = search(FakeBench(times(1.0, 1.0, 1.0, 1.0, 1.0), fails))
    assert result.record is None
    assert "ImportError: no jax-triton" in result.reason
    result = search(FakeBench({}, {None: RuntimeError("RESOURCE_EXHAUSTED")}))
    assert result.record is None
    assert result.reason == "XLA's own run failed: RuntimeError: RESOURCE_EXHAUSTED"


def test_xla_that_cannot_be_timed_leaves_the_configuration():
    def us(config):
        if config is None:
            raise RuntimeError("no")
        return 5.0

    record = search(FakeBench(us)).record
    assert record.config is not None
    assert record.xla_us is None


def test_results_that_cannot_be_compared_are_not_taken_and_not_called_wrong(monkeypatch):
    def full(got, want):
        raise MemoryError("full")

    monkeypatch.setattr(drawn, "difference", full)
    result = search(FakeBench(lambda config: 1.0))
    assert result.record is None
    assert "could not be compared: MemoryError: full" in result.reason


def test_what_takes_too_long_is_not_tried():
    import time

    class Slow(FakeBench):
        def prepare(self, function, work):
            if self.prepared:
                time.sleep(0.2)
            return super().prepare(function, work)

    many = search_space(SPEC, 90, 99).chosen
    copies = [dataclasses.replace(many[0], group=1 << i) for i in range(12)]
    bench = Slow(lambda config: 1.0)
    functions = {config: lambda x: [x] for config in copies}
    ran = contest(functions, bench, Work(((jnp.ones(1),),)), Limits(seconds=0.1))
    assert len(ran) == 12
    errors = [trial.error for trial, _ in ran if trial.us is None]
    assert errors == ["not tried within 0 s"] * len(errors)
    assert 1 <= len(errors) <= 4


def test_kernels_that_look_up_rows_are_not_measured():
    spec = segment_sum.segment_sum(8, 24, TensorType((8, 16), np.dtype("float32")))
    assert not drawn.drawable(spec)
    result = measure(spec, lambda *a: a, FakeBench({}), capability=90)
    assert result.record is None
    assert "cannot be drawn" in result.reason


def test_operands_whose_results_say_something_are_drawn():
    b = GemmTree({"b": 1, "m": 32, "n": 32, "k": 32}, batch="b", m="m", n="n", k="k")
    product = b.contract(b.load("bmk", np.float32), b.load("bkn", np.float32))
    logs = b.compute("log", b.load("bmn", np.float32))
    b.store(b.compute("mul", product, b.compute("sqrt", logs)), "bmn", np.float32)
    spec = b.spec("roots")
    bench = FakeBench(lambda config: 1.0)
    measure(spec, lambda *a: reference(spec, *a), bench, capability=90, limits=Limits(1))
    assert bench.positive == [False, True]
    bench = FakeBench(lambda config: 1.0)
    measure(SPEC, alternative, bench, capability=90, limits=Limits(1))
    assert bench.positive == [False]


def test_buffers_are_not_shared_while_measuring():
    b = GemmTree({"b": 1, "m": 32, "n": 32, "k": 32}, batch="b", m="m", n="n", k="k")
    product = b.contract(b.load("bmk", np.float32), b.load("bkn", np.float32))
    b.store(b.compute("sub", b.load("bmn", np.float32), product), "bmn", np.float32)
    spec = dataclasses.replace(b.spec("sgd"), aliases=((2, 0),))
    seen = []

    class Spy(FakeBench):
        def prepare(self, function, work):
            seen.extend(getattr(function, "args", ()))
            return super().prepare(function, work)

    bench = Spy(lambda config: 1.0)
    assert measure(spec, lambda *a: reference(spec, *a), bench, capability=90).record.config
    assert {s.aliases for s in seen} == {()}


@pytest.mark.parametrize("x64", [False, True])
def test_threads_have_the_callers_precision(x64):
    seen = []

    class Spy(FakeBench):
        def prepare(self, function, work):
            seen.append(jax.config.jax_enable_x64)
            return super().prepare(function, work)

    with jax.enable_x64(x64):
        search(Spy(lambda config: 1.0))
    assert seen == [x64] * (len(CHOSEN) + 1)


class Fake:
    """A device of some size."""

    def __init__(self, free):
        self._free = free

    def memory_stats(self):
        return {"bytes_limit": self._free + 1000, "bytes_in_use": 1000}


def test_operands_are_rotated_beyond_the_cache_and_within_memory(monkeypatch):
    made = []
    monkeypatch.setattr(drawn, "draw", lambda types, seed, positive: made.append(seed) or (seed,))
    monkeypatch.setattr(jax, "default_device", lambda device: contextlib.nullcontext())
    small = [TensorType((1024,), np.dtype("float32"))]
    large = [TensorType((1 << 20,), np.dtype("float32"))]

    def sets(inputs, outputs, us, free=1 << 40, l2=8 << 20):
        made.clear()
        work = DeviceBench(l2, Fake(free)).work(inputs, outputs, us, False)
        assert len(made) == len({s for (s,) in work.sets})
        return len(work.sets), len(made)

    assert sets(small, small, us=5.0) == (32, 32)
    assert sets(large, large, us=5.0) == (32, 4)  # four times 4 MiB are twice 8 MiB
    assert sets(large, large, us=1000.0) == (6, 4)
    assert sets(large, large, us=1000.0, l2=1 << 10) == (6, 2)
    assert sets(large, large, us=5.0, free=192 << 20) == (4, 4)
    with pytest.raises(OutOfMemory, match="24 MiB of 10 MiB"):
        sets(large, large, us=5.0, free=20 << 20)


def test_a_device_bench_compiles_runs_and_times():
    """On the CPU, with a function instead of a kernel."""
    types = [TensorType((64, 64), np.dtype("float32"))] * 2
    bench = DeviceBench(1 << 10, jax.devices("cpu")[0])
    work = bench.work(types, types[:1], 100.0, False)
    program = bench.prepare(lambda x, y: [x @ y], work)
    for (x, y), (result,) in zip(work.sets, program(), strict=True):
        np.testing.assert_allclose(result, x @ y, rtol=1e-4, atol=1e-4)
    assert 0 < bench.seconds(program, work) < 1
    assert len({np.asarray(x).tobytes() for x, _ in work.sets}) > 1
    with pytest.raises(TypeError, match="dot_general"):
        bench.prepare(lambda x, y: [x @ y[1:]], work)
