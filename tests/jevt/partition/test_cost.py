"""The cost model: traffic of our kernels and of XLA's fusions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from partitions import trace

from jevt.lowering import spec as lowering
from jevt.lowering.rules import classify
from jevt.partition import cost, fusions
from jevt.partition import graph as graphs

H100 = cost.DEVICES["H100"]
SHAPE = (4096, 4096)
BYTES = 4 * 4096 * 4096


def bytes_of(function, *shapes):
    """What the model says each side moves, from the times without launches."""
    operands = [jax.ShapeDtypeStruct(s, np.float32) for s in shapes or (SHAPE,)]
    jaxpr, _ = trace(function, *operands)
    nodes = graphs.from_jaxpr(jaxpr, classify).nodes
    reductions = {i for i, n in enumerate(nodes) if n.kind == "reduction"}
    device = jax.tree_util.Partial(_free_launches, H100)()
    ours, xla = cost.predict_us(jaxpr, device), fusions.xla_us(jaxpr, device, reductions)
    return ours * device.bytes_per_us / BYTES, xla * device.bytes_per_us / BYTES


def _free_launches(device):
    import dataclasses

    return dataclasses.replace(device, xla_launch_us=0.0, triton_launch_us=0.0)


def test_pointwise_costs_the_same_under_xla():
    ours, xla = bytes_of(lambda x, y: (jnp.sin(x) * y + 1, x - y), SHAPE, SHAPE)
    assert ours == pytest.approx(4)
    assert xla == pytest.approx(4)


def test_softmax_reads_its_input_three_times_under_xla():
    ours, xla = bytes_of(jax.nn.softmax)
    assert ours == pytest.approx(2, rel=0.01)
    assert xla == pytest.approx(4, rel=0.01)


def test_sums_along_rows_and_along_columns_are_two_kernels_of_xla():
    ours, xla = bytes_of(lambda x: (x.sum(0), x.sum(1)))
    assert ours == pytest.approx(1, rel=0.01)
    assert xla == pytest.approx(1 + 1 / 0.75, rel=0.01)
    _, xla = bytes_of(lambda x: (x.sum(1), x.max(1)))
    assert xla == pytest.approx(1, rel=0.01)


def test_xla_reads_again_what_it_sums_along_rows():
    """A gradient beside the bias gradient that is its sum: two kernels, the second a slow one."""
    ours, xla = bytes_of(lambda x: (jnp.sin(x), jnp.sin(x).sum(0)))
    assert ours == pytest.approx(2, rel=0.01)
    assert xla == pytest.approx(2 + 1 / 0.75, rel=0.01)


def test_only_the_slice_is_read():
    ours, xla = bytes_of(lambda x: jnp.sin(x[:1024]))
    assert ours == pytest.approx(0.5)
    assert xla == pytest.approx(0.5)
    _, xla = bytes_of(lambda x: x[::2, ::2])  # alone, as an operand of cuBLAS is
    assert xla == pytest.approx(0.5)


def test_a_reshape_is_free_under_xla():
    _, xla = bytes_of(lambda x: x.reshape(-1))
    assert xla == 0


def test_arithmetic_can_be_what_counts():
    def threefry(x):
        for _ in range(40):
            x = jnp.tanh(x)
        return x

    ours, xla = bytes_of(threefry)
    assert ours > 4
    assert xla == pytest.approx(ours)


def test_devices():
    assert cost.device_model("cpu").compute_capability == 0
    for device in cost.DEVICES.values():
        assert 80 <= device.compute_capability <= 120
        assert 2e5 < device.bytes_per_us < 1e7
        assert device.flops_per_us > device.bytes_per_us


@pytest.mark.parametrize(
    ("kind", "capability", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "9.0", "H100"),
        ("NVIDIA A100-SXM4-80GB", "8.0", "A100"),
        ("NVIDIA L4", "8.9", "L4"),
        ("NVIDIA GeForce RTX 4090", "8.9", "RTX 4090"),
        ("NVIDIA L40S", "8.9", "NVIDIA L40S"),
        ("NVIDIA X900", "13.0", "NVIDIA X900"),
        ("Tesla V100-SXM2-16GB", "7.0", "Tesla V100-SXM2-16GB"),
    ],
)
def test_devices_are_told_by_their_names(monkeypatch, kind, capability, expected):
    class Present:
        device_kind = kind
        compute_capability = capability

    monkeypatch.setattr(jax, "devices", lambda platform: [Present()])
    device = cost.device_model("cuda")
    assert device.name == expected
    assert device.compute_capability == round(10 * float(capability)), "what kernels are made for"


def test_an_absent_gpu_is_taken_for_an_h100(monkeypatch):
    def absent(platform):
        raise RuntimeError("no such platform")

    monkeypatch.setattr(jax, "devices", absent)
    assert cost.device_model("cuda").name == "H100"


@pytest.mark.parametrize(
    ("rows", "columns", "passes", "launches"),
    [(16384, 1024, 2, 1), (1024, 131072, 2, 1), (512, 1 << 20, 2.8636, 1), (8, 1 << 24, 3, 2)],
    ids=["on chip", "in a loop", "in a loop beyond the cache", "in parts"],
)
def test_long_rows_are_read_twice(rows, columns, passes, launches):
    """A softmax that one pass reads and another reads and writes, unless the L2 keeps it."""
    x = jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16)
    spec = lowering.build(trace(jax.nn.softmax, x)[0], "softmax")
    again = (passes - 2) * 2 * rows * columns / H100.bytes_per_us
    expected = again + (launches - 1) * H100.triton_launch_us
    assert cost.long_rows_us(spec, H100) == pytest.approx(expected, rel=1e-3)
