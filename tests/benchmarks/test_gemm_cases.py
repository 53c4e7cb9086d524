"""The kernels of the GEMM suites compute their cases' functions; the search for a configuration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kernels import gemm, gemm_shapes, search
from benchmarks.kernels.case import cases
from jevt_kernels import codegen
from jevt_kernels.reference import reference
from jevt_kernels.tuning import search_space

CASES = {
    **{p.name: gemm.make_case(p, gemm.PLAIN) for p in gemm_shapes.products("smoke")},
    **{case.name: case for case in gemm.epilogues("smoke")},
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_computes_the_function(name):
    case = CASES[name]
    arguments = case.args(0)
    expected = jax.tree.leaves(jax.jit(case.fun)(*(x.astype(jnp.float32) for x in arguments)))
    got = jax.jit(lambda *x: reference(case.kernel(), *x))(*arguments)
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape
        x, y = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(x - y) <= 5e-3 * np.linalg.norm(y)


def test_enough_shapes():
    assert len(gemm_shapes.products("full")) >= 20
    kinds = {p.name.rpartition("-")[2] for p in gemm_shapes.products("full")}
    assert kinds == {"fwd", "dgrad", "wgrad"}
    models = {p.name.partition("-")[0] for p in gemm_shapes.products("full")}
    assert models == {"bert", "vit", "xmlcnn"}


def test_every_kernel_is_generated_at_full_size():
    for suite in ("gemm", "gemm-epilogue"):
        for case in cases(suite, "full"):
            codegen.generate(case.kernel())


def spec():
    return CASES["bert-up-fwd"].kernel()


class Bench:
    """Times from a function of the configuration."""

    def __init__(self, us):
        self.us = us
        self.sets = []

    def prepare(self, function, work):
        self.sets = work.sets
        return functools.partial(self.us, function.keywords["config"])

    def seconds(self, program, work):
        return program() * 1e-6


def test_search_takes_the_fastest():
    first, second, third = search_space(spec(), 90, 3).chosen
    times = {first: 3e3, second: 1e3}

    def us(config):
        if config not in times:
            raise ValueError(f"out of resources{100 * '!'}\nat length")
        return times[config]

    bench = Bench(us)
    config, trials = search.fastest(spec(), [(1,), (2,)], most=3, limit_s=60, bench=bench)
    assert bench.sets == ((1,), (2,), (1,), (2,), (1,), (2,))
    assert config == second
    assert [t.config for t in trials] == [second, first, third]
    assert trials[0].us == pytest.approx(1e3)
    assert trials[2].error == "ValueError: out of resources".ljust(80, "!")


def test_large_results_are_held_only_a_few_times(monkeypatch):
    monkeypatch.setattr(search, "_RESULT_BYTES", 2 * spec().outputs[0].nbytes)
    bench = Bench(lambda config: 1.0)
    search.fastest(spec(), [(1,)], most=1, limit_s=60, bench=bench)
    assert len(bench.sets) == 2


def test_search_without_success():
    def us(config):
        raise MemoryError("shared memory")

    with pytest.raises(RuntimeError, match="no configuration of gemm_plain runs: .*shared memory"):
        search.fastest(spec(), [(1,)], most=2, limit_s=60, bench=Bench(us))


@pytest.mark.cuda_lowering
def test_programs_of_the_search_lower_for_cuda():
    import jevt_kernels

    case = CASES["bert-down-dgrad-gelu"]
    arguments = case.args(0)
    call = functools.partial(jevt_kernels.call, case.kernel(), compute_capability=90)
    text = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call_ffi") == 1
