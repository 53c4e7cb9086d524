"""What a device sustains, measured: copies, matrix products, launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jevt_kernels import launch
from jevt_kernels.index_map import IndexMap, Space, TileAxis
from jevt_kernels.spec import KernelSpec, TensorType
from jevt_kernels.tuning.bench import Bench
from jevt_kernels.tuning.record import Calibration, now
from jevt_kernels.visitor import Compute, Constant, Load, Store

#: Rows, columns and contraction of a product as training steps have them: the feed-forward layer of
#: a BERT-Large on 32 sequences of 512.
_PRODUCT = (16384, 4096, 1024)

#: Elements of the array that is copied, of 2 bytes.
_COPIED = 1 << 28

#: Elements of an array so small that a launch is all that it costs.
_LAUNCHED = 1 << 10

#: Launches of the shorter and of the longer program, whose difference is what launches cost.
_SHORT, _LONG = 50, 250

_TURNS = 3
_BFLOAT16 = np.dtype(jnp.bfloat16)


def calibrate(bench: Bench, capability: int, *, scale: int = 1) -> Calibration:
    """Measures a device; takes a few seconds.

    Args:
      bench: on it.
      capability: its compute capability, 90 for sm_90.
      scale: by how much to divide the sizes, where there is little memory.

    Raises:
      jevt_kernels.tuning.bench.OutOfMemory: there is no room for the operands.
    """
    m, n, k = _PRODUCT[0] // scale, _PRODUCT[1], _PRODUCT[2]
    lhs, rhs, result = (TensorType(shape, _BFLOAT16) for shape in ((m, k), (k, n), (m, n)))
    product = _us(bench, lambda x, y: [x @ y], [lhs, rhs], [result], 200.0)
    copied = TensorType((_COPIED // scale,), _BFLOAT16)
    copy = _us(bench, lambda x: [-x], [copied], [copied], 1000.0)
    small = TensorType((_LAUNCHED,), np.dtype("float32"))
    kernel = _increment(small)
    xla = _launch_us(bench, lambda x: x + 1, small)
    triton = _launch_us(
        bench, lambda x: launch.call(kernel, x, compute_capability=capability)[0], small
    )
    return Calibration(
        bytes_per_us=2 * copied.nbytes / copy,
        cublas_flops_per_us=2 * m * n * k / product,
        xla_launch_us=xla,
        triton_launch_us=triton,
        when=now(),
    )


def _us(
    bench: Bench,
    function: Callable[..., Sequence[Any]],
    inputs: Sequence[TensorType],
    outputs: Sequence[TensorType],
    about_us: float,
) -> float:
    """The least time of a call in a few turns."""
    work = bench.work(inputs, outputs, about_us, False)
    program = bench.prepare(function, work)
    return min(bench.seconds(program, work) for _ in range(_TURNS)) * 1e6


def _launch_us(bench: Bench, once: Callable[[Any], Any], small: TensorType) -> float:
    """A launch in a long row of them, by which two programs differ that are started alike."""

    def chain(length: int) -> Callable[[Any], Sequence[Any]]:
        def function(x: Any) -> Sequence[Any]:
            for _ in range(length):
                x = jax.lax.optimization_barrier(once(x))
            return [x]

        return function

    short, long = (_us(bench, chain(n), [small], [small], 1000.0) for n in (_SHORT, _LONG))
    # Noise can make the difference nothing, which a cost never is.
    return max(long - short, 0.1) / (_LONG - _SHORT)


def _increment(tensor: TensorType) -> KernelSpec:
    """x + 1."""
    index = IndexMap((1,))
    return KernelSpec(
        name="increment",
        mainloop="pointwise",
        space=Space(tensor.shape, (TileAxis("i", (0,)),)),
        tree=(
            Load(0, index),
            Constant(1.0, tensor.dtype),
            Compute("add", (0, 1), tensor.dtype),
            Store(0, 2, index),
        ),
        inputs=(tensor,),
        outputs=(tensor,),
    )
