"""Calibration from a table of times, and the command that shows it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jevt_kernels.tuning import Identity, Record, Store, calibrate
from jevt_kernels.tuning.__main__ import main
from jevt_kernels.tuning.bench import Work

DEVICE = Identity("Fake GPU", 90, (("jaxlib", "1"),))


class Bench:
    """Counts what a program would launch: 2 µs a small fusion of XLA's, 3 µs a kernel of ours."""

    def work(self, inputs, outputs, us, positive):
        self.large = inputs[0].size
        return Work(((inputs, outputs),))

    def prepare(self, function, work):
        inputs, _ = work.sets[0]
        operands = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in inputs]
        jaxpr = jax.make_jaxpr(function)(*operands)
        names = [e.primitive.name for e in jaxpr.eqns]
        if "dot_general" in names:
            return 200.0
        if "neg" in names:
            return 400.0
        kernels = sum("triton" in name for name in names)
        return 50.0 + 3.0 * kernels + 2.0 * names.count("add")

    def seconds(self, program, work):
        return program * 1e-6


@pytest.mark.cuda_lowering
def test_rates_and_launches():
    found = calibrate(Bench(), 90)
    assert found.cublas_flops_per_us == pytest.approx(2 * 16384 * 4096 * 1024 / 200)
    assert found.bytes_per_us == pytest.approx(2 * 2 * 2**28 / 400)
    assert found.xla_launch_us == pytest.approx(2)
    assert found.triton_launch_us == pytest.approx(3)
    assert found.when


@pytest.mark.interpret
def test_the_kernel_that_is_launched_adds_one():
    from jevt_kernels import interpreter
    from jevt_kernels.spec import TensorType
    from jevt_kernels.tuning.calibrate import _increment

    x = np.linspace(-1, 1, 1024, dtype=np.float32)
    (got,) = interpreter.run(_increment(TensorType((1024,), x.dtype)), jnp.asarray(x))
    np.testing.assert_array_equal(got, x + 1)


@pytest.mark.cuda_lowering
def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JEVT_CACHE_DIR", str(tmp_path))
    assert main(["calibrate"], DEVICE, Bench()) == 0
    out = capsys.readouterr().out
    assert "Fake GPU" in out and "xla_launch_us 2\n" in out
    assert Store(tmp_path, DEVICE).load().calibration is not None
    Store(tmp_path, DEVICE).add({"abcdef0123": Record(None, None, 9.5, "wrong: output 0", "gemm")})
    assert main(["show"], DEVICE) == 0
    assert "abcdef01 gemm: wrong: output 0, XLA 9.5 µs" in capsys.readouterr().out


def test_the_command_without_a_gpu(capsys):
    assert main(["show"], None) == 1
    assert "no CUDA GPU" in capsys.readouterr().err


def test_unknown_commands(capsys):
    with pytest.raises(SystemExit):
        main(["tune"], DEVICE)
    assert "calibrate" in capsys.readouterr().err
