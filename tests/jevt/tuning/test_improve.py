"""``tune="on"``: what a plan lacks is measured, stored, and planned with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from tuning_bench import FakeBench

import jevt
from jevt import _config, pipeline
from jevt.partition.cost import DEVICES, device_model
from jevt.tuning import improve
from jevt_kernels import launch, tuning
from jevt_kernels.reference import reference
from jevt_kernels.tuning import Calibration, Identity, Record, Store, offered

GPU = Identity("NVIDIA H100 80GB HBM3", 90, (("jaxlib", "1"),))
CALIBRATION = Calibration(2.5e6, 5e8, 2.5, 3.5)
X = jax.ShapeDtypeStruct((2048, 256), jnp.float32)


def softmax(x):
    return jax.nn.softmax(x)


def layers(x):
    """Two equal groups, and another one in a loop."""
    x = jax.nn.softmax(jnp.sort(jax.nn.softmax(jnp.sort(x))))
    return jax.lax.scan(lambda c, _: (jnp.sort(jax.nn.log_softmax(c)), None), x, None, length=3)[0]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a GPU, its store, and a bench that is to be set."""

    class Machine:
        store = Store(tmp_path, GPU)
        bench = FakeBench(lambda config: 1.0 if config else 2.0)
        plans = 0

        def compile(
            self, function, *arguments, tune="on", backend="auto", strict=False, jaxpr=None
        ):
            environment = _config.Environment(cache_dir=tmp_path)
            options = _config.Options(backend, strict, environment, tune)
            jaxpr = jaxpr or jax.make_jaxpr(function)(*arguments)
            context = pipeline.make_context(options, ("cuda",), (False,) * len(arguments), False)
            return pipeline.compile(jaxpr, context, environment=environment)

    machine = Machine()
    machine.store.add({}, CALIBRATION)
    tuning.opened.cache_clear()
    pipeline._cache.clear()  # JAX gives the jaxpr of an earlier test again
    monkeypatch.setattr(tuning, "local", lambda: GPU)
    monkeypatch.setattr(improve, "make_bench", lambda device: machine.bench)
    monkeypatch.setattr(launch, "precompile", lambda *arguments: None)
    partition = pipeline.partition

    def counting(*arguments):
        machine.plans += 1
        return partition(*arguments)

    monkeypatch.setattr(pipeline, "partition", counting)
    yield machine
    tuning.opened.cache_clear()


def kernels(trace):
    from jevt.partition.printing import all_groups

    return [g for g in all_groups(trace.plan) if g.spec is not None]


def test_what_is_missing_is_measured_and_stored(gpu, capsys):
    second = {}

    def us(config):
        return {None: 9.0, second.get("config"): 3.0}.get(config, 5.0)

    gpu.bench = FakeBench(us)
    second["config"] = offered(kernels(gpu.compile(softmax, X, tune="off"))[0].spec)[1]
    assert gpu.bench.prepared == []
    (group,) = kernels(gpu.compile(softmax, X))
    assert (group.target, group.config) == ("triton", second["config"])
    assert group.measured_us == pytest.approx(3)
    (record,) = gpu.store.load().kernels.values()
    assert (record.config, record.xla_us) == (second["config"], pytest.approx(9))
    error = capsys.readouterr().err
    assert error.startswith(f"jevt: tuning 1 of 1, {group.name}: ")
    assert "3.0 µs" in error and error.count("\n") == 1


def test_equal_kernels_are_measured_once_and_those_of_bodies_too(gpu):
    groups = kernels(gpu.compile(layers, X))
    assert len(groups) == 3
    assert [g.measured_us for g in groups] == pytest.approx([1, 1, 1])
    assert gpu.bench.prepared.count(None) == 2
    assert len(gpu.store.load().kernels) == 2


def test_what_is_known_is_not_measured_again(gpu):
    first = gpu.compile(layers, X)
    gpu.bench = FakeBench({})
    tuning.opened.cache_clear()  # another process
    again = gpu.compile(layers, X)
    assert [g.config for g in kernels(again)] == [g.config for g in kernels(first)]
    off = gpu.compile(layers, X, tune="off")
    assert [(g.target, g.config) for g in kernels(off)] == [
        (g.target, g.config) for g in kernels(first)
    ]


def test_programs_are_planned_once_for_what_is_known(gpu):
    jaxpr = jax.make_jaxpr(softmax)(X)
    first = gpu.compile(softmax, X, jaxpr=jaxpr)
    plans = gpu.plans
    assert gpu.compile(softmax, X, jaxpr=jaxpr) is first
    assert gpu.plans == plans
    (key,) = gpu.store.load().kernels
    slower = Record(offered(kernels(first)[0].spec)[0], 50.0, 2.0)
    Store(gpu.store.path.parent.parent, GPU).add({key: slower})  # another process's
    later = gpu.compile(softmax, X, jaxpr=jaxpr)
    assert gpu.plans == plans + 1
    assert [g.target for g in kernels(later)] == ["xla"]
    assert [g.target for g in kernels(first)] == ["triton"]


def test_xla_that_is_faster_keeps_the_group(gpu):
    gpu.bench = FakeBench(lambda config: 5.0 if config else 2.0)
    trace = gpu.compile(softmax, X, strict=True)
    assert kernels(trace)[0].reason == "measured: 5.0 µs as a kernel, 2.0 µs as XLA runs it"
    assert trace.warnings == ()
    assert "measured: 5.0 µs as a kernel" in str(trace)


def test_kernels_that_are_wrong_are_fallbacks(gpu):
    class Kernels:
        def __contains__(self, config):
            return config is not None

    gpu.bench = FakeBench(lambda config: 1.0, wrong=Kernels())
    trace = gpu.compile(softmax, X)
    (group,) = kernels(trace)
    assert (group.target, group.fallback) == ("xla", True)
    assert group.reason.startswith("measured: wrong: output 0 differs from XLA's by")
    with pytest.raises(pipeline.StrictError, match="wrong: output 0"):
        gpu.compile(softmax, X, strict=True)


@pytest.mark.parametrize("error", [RuntimeError("CUDA_ERROR\nat length"), MemoryError("full")])
def test_what_cannot_be_measured_goes_by_predictions_and_is_noted(gpu, error):
    gpu.bench = FakeBench(lambda config: 1.0, {None: error})
    trace = gpu.compile(softmax, X)
    (group,) = kernels(trace)
    assert (group.target, group.measured_us) == ("triton", None)
    (note,) = (n for n in trace.notes if not n.startswith("raise_"))
    assert note.startswith(f"partition: {group.name}, which is not measured: ")
    assert str(error).splitlines()[0] in note
    assert gpu.store.load().kernels == {}


def test_nothing_that_is_only_tried_stays(gpu):
    def tried(x):
        return x * 2 + 1

    x = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
    gpu.bench = FakeBench(lambda config: 1.0, {None: RuntimeError("no")})
    (group,) = kernels(gpu.compile(tried, x))
    assert gpu.bench.prepared == [None]
    assert group.target == "xla" and group.reason.startswith("cost model: ")


def test_an_error_of_the_bench_does_not_break_the_program(gpu):
    class Broken(FakeBench):
        def work(self, *arguments):
            raise SystemError("broken")

    gpu.bench = Broken({})
    assert "broken" in gpu.compile(softmax, X).notes[-1]


def test_a_product_that_loses_is_split_and_the_rest_measured(gpu):
    def layer(x, w, b):
        h = x @ w + b
        return h, jax.nn.gelu(h, approximate=False)

    small = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2048, 64), (64, 1024), (1024,))]

    def us(config):
        if config is None:
            return 4e3
        return 5e3 if "k" in dict(config.blocks) else 1.0

    gpu.bench = FakeBench(us)
    trace = gpu.compile(layer, *small)
    targets = {g.kind: (g.target, g.measured_us) for g in kernels(trace)}
    assert targets["pointwise"] == ("triton", pytest.approx(1))
    (product,) = (g for g in trace.plan.groups if g.kind == "gemm")
    assert product.reason == "cost model: a matrix product alone is cuBLAS's"
    assert len(gpu.store.load().kernels) == 2


def test_threads_of_the_caller_do_not_matter(gpu):
    import threading

    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        gpu.compile(jax.nn.softmax, jax.ShapeDtypeStruct((512, 256), jnp.float64))
    assert threading.get_ident() not in gpu.bench.threads
    (record,) = gpu.store.load().kernels.values()
    assert record.config is not None


def test_a_device_is_calibrated_once(gpu, tmp_path, monkeypatch):
    gpu.store.path.unlink()
    measured = []
    monkeypatch.setattr(
        tuning, "calibrate", lambda bench, capability: measured.append(capability) or CALIBRATION
    )
    assert gpu.compile(softmax, X, tune="off").context.device == device_model("cuda")
    assert measured == []
    device = gpu.compile(softmax, X).context.device
    gpu.compile(layers, X)
    assert measured == [90]
    assert (device.bytes_per_us, device.cublas_flops_per_us) == (2.5e6, 5e8)
    assert (device.xla_launch_us, device.triton_launch_us) == (2.5, 3.5)
    assert gpu.compile(softmax, X, tune="off").context.device == device


def test_a_device_that_cannot_be_calibrated(gpu, monkeypatch):
    gpu.store.path.unlink()

    def full(bench, capability):
        raise MemoryError("full")

    monkeypatch.setattr(tuning, "calibrate", full)
    with pytest.warns(jevt.JevtWarning, match="could not be calibrated.*MemoryError: full"):
        trace = gpu.compile(softmax, X)
    assert trace.context.device == DEVICES["H100"]
    assert kernels(trace)[0].measured_us == pytest.approx(1)


def test_calibrated_models():
    class Present:
        device_kind = "NVIDIA H200"
        compute_capability = "9.0"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda platform: [Present()])
        table, device = device_model("cuda"), device_model("cuda", CALIBRATION)
    assert device.kernel_flops_per_us == pytest.approx(
        5e8 * table.kernel_flops_per_us / table.cublas_flops_per_us
    )
    assert (device.l2_bytes, device.flops_per_us) == (table.l2_bytes, table.flops_per_us)
    assert device_model("cpu", CALIBRATION) == device_model("cpu")


def test_where_nothing_is_known_nor_measured(gpu, monkeypatch):
    (group,) = kernels(gpu.compile(softmax, X))
    assert group.measured_us is not None
    left = gpu.compile(softmax, X, backend="xla").context
    assert not left.tune
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.warns(jevt.JevtWarning, match="no effect in a program of several processes"):
        trace = gpu.compile(softmax, X)
    assert kernels(trace)[0].measured_us is None
    assert not trace.context.tune
    monkeypatch.undo()
    options = _config.Options(tune="on")
    assert not pipeline.make_context(options, ("cpu",), (), False).tune


def test_backend_triton_measures_whatever_can_be_a_kernel(gpu):
    gpu.bench = FakeBench(lambda config: 5.0 if config else 2.0)
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    assert kernels(gpu.compile(lambda x: x * 2 + 1, x))[0].measured_us in (None, 2.0)
    (group,) = kernels(gpu.compile(lambda x: x * 2 + 1, x, backend="triton"))
    assert (group.target, group.measured_us) == ("triton", pytest.approx(5))


def test_a_terminal_has_one_line(monkeypatch, capsys):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for report in improve._progress(2):
        report("text " * 50)
    first, second = capsys.readouterr().err.split("\r")[1:]
    assert "tuning 1 of 2" in first and not first.endswith("\n")
    assert "tuning 2 of 2" in second and second.endswith("\n")
    assert len(first) < 120


@pytest.mark.cuda_lowering
def test_measuring_while_a_program_is_lowered(gpu, monkeypatch):
    """With JAX's own compiler and clock, on the CPU, and references in place of kernels."""
    monkeypatch.setenv("JEVT_CACHE_DIR", str(gpu.store.path.parent.parent))

    def call(spec, *operands, config, compute_capability):
        return reference(spec, *operands)

    monkeypatch.setattr(launch, "call", call)
    gpu.bench = tuning.DeviceBench(1 << 10, jax.devices("cpu")[0])

    @jevt.jit(tune="on", backend="triton")
    def step(x):
        return jax.nn.softmax(x)

    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    with jax.debug_nans(True), jax.transfer_guard("disallow"):
        jax.jit(lambda x: step(x) * 2).trace(x).lower(lowering_platforms=("cuda",))
    (record,) = gpu.store.load().kernels.values()
    assert record.config is not None and record.error == ""
    assert 0 < record.kernel_us < 1e6 and 0 < record.xla_us < 1e6
    trace = step.trace(x).lower(lowering_platforms=("cuda",)) and jevt.last_trace(step)
    (group,) = kernels(trace)
    assert (group.target, group.config) == ("triton", record.config)
    assert group.measured_us == record.kernel_us
