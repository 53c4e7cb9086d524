"""Runs the text of a Gluon kernel for sm_90 with NumPy: each task of its warps in a thread.

It is there for the protocol between the warps. What is asynchronous happens as late as it may: a
copy into shared memory at some time before its barrier's phase ends, a product and a copy out of
shared memory when they are waited for. What a copy is under way to is NaN meanwhile. So what is
read or overwritten too early gives wrong numbers, and a wait for nothing ends in an error. Layouts,
registers and fences have no meaning here.
"""

from __future__ import annotations

import dataclasses
import importlib
import random
import threading
import time
import types
from typing import Any

import numpy as np

from jevt_kernels.gluon_kernels import GluonKernel

#: Seconds after which a barrier will not be passed any more.
PATIENCE = 20.0

#: Seconds that a copy into shared memory takes.
_LATENCIES = (0, 1e-4, 5e-3)

#: Seconds that a task waits after it has arrived at a barrier: what it should have done before is
#: too late then.
_DELAYS = (*[0] * 30, 1e-2)

#: What is a thread's own: its program, and its products and copies under way.
_own = threading.local()
_changed = threading.Condition()
_random = random.Random(0)


class Tensor(np.ndarray):
    """A value in registers."""

    def to(self, dtype):
        return np.asarray(self).astype(dtype).view(Tensor)


def _tensor(array):
    return np.array(array).view(Tensor)


@dataclasses.dataclass
class Buffer:
    """A view of shared memory."""

    array: np.ndarray

    def _view(self, array):
        assert np.shares_memory(array, self.array)
        return Buffer(array)

    def index(self, i):
        return self._view(self.array[int(i)])

    def slice(self, start, length, dim=0):
        return self._view(self.array[(slice(None),) * dim + (slice(start, start + length),)])

    def reshape(self, shape):
        return self._view(self.array.reshape(shape))

    def permute(self, order):
        return self._view(self.array.transpose(order))

    def load(self, layout):
        return _tensor(self.array)

    def store(self, value):
        assert (value.shape, value.dtype) == (self.array.shape, self.array.dtype)
        self.array[...] = value


@dataclasses.dataclass
class Descriptor:
    """A tensor descriptor: tiles of an array, 0 beyond its ends."""

    array: np.ndarray
    block: tuple[int, ...]
    layout: None = None

    @property
    def dtype(self):
        return self.array.dtype

    def _inside(self, at):
        """Where a tile lies in the array, and which part of it."""
        ends = [
            min(start + n, size)
            for start, n, size in zip(at, self.block, self.array.shape, strict=True)
        ]
        pairs = list(zip(at, ends, strict=True))
        return tuple(slice(a, max(a, b)) for a, b in pairs), tuple(
            slice(0, max(0, b - a)) for a, b in pairs
        )

    def read(self, at):
        tile = np.zeros(self.block, self.dtype)
        where, part = self._inside(at)
        tile[part] = self.array[where]
        return tile

    def write(self, at, tile):
        where, part = self._inside(at)
        self.array[where] = tile[part]


@dataclasses.dataclass
class Pointer:
    """A pointer to the elements of a one-dimensional array, or an array of pointers."""

    array: np.ndarray
    offset: Any = 0

    def __add__(self, offset):
        return Pointer(self.array, self.offset + offset)


class _Barrier:
    def arrive(self, count=0, nbytes=0):
        with _changed:
            self.pending -= count
            self.bytes += nbytes
            assert self.pending >= 0, "more arrivals than a phase has"
            if self.pending == self.bytes == 0:
                self.phase ^= 1
                self.pending = self.count
                _changed.notify_all()


class _Barriers:
    def __init__(self, count):
        self._slots = [_Barrier() for _ in range(count)]

    def index(self, i):
        return self._slots[int(i)]


class _mbarrier:
    MBarrierLayout = staticmethod(lambda: "barrier")

    @staticmethod
    def init(barrier, count):
        barrier.count = barrier.pending = count
        barrier.bytes = barrier.phase = 0

    @staticmethod
    def wait(barrier, phase, pred=True):
        with _changed:
            passed = not pred or _changed.wait_for(lambda: barrier.phase != phase, PATIENCE)
        assert passed, "a barrier that nobody arrives at"
        time.sleep(_random.random() * 1e-4)

    @staticmethod
    def arrive(barrier, pred=True):
        if pred:
            barrier.arrive(1)
            time.sleep(_random.choice(_DELAYS))

    @staticmethod
    def expect(barrier, nbytes):
        barrier.arrive(1, nbytes)


class _tma:
    @staticmethod
    def async_copy_global_to_shared(descriptor, at, barrier, buffer):
        assert buffer.array.shape == tuple(descriptor.block)
        buffer.array[...] = np.nan

        def copy():
            time.sleep(_random.choice(_LATENCIES))
            buffer.array[...] = descriptor.read(at)
            barrier.arrive(0, -buffer.array.nbytes)

        threading.Thread(target=copy, daemon=True).start()

    @staticmethod
    def async_copy_shared_to_global(descriptor, at, buffer):
        assert buffer.array.shape == tuple(descriptor.block)
        _own.stores.append(lambda: descriptor.write(at, buffer.array))

    @staticmethod
    def store_wait(left):
        while len(_own.stores) > left:
            _own.stores.pop(0)()


class _Product:
    """A product under way; its value is there once it has been waited for."""

    def __init__(self, lhs, rhs, accumulator):
        self._operands, self._accumulator = (lhs, rhs), accumulator
        self.value = None

    def finish(self):
        lhs, rhs = (np.float32(getattr(x, "array", x)) for x in self._operands)
        start = self._accumulator
        start = start.value if isinstance(start, _Product) else start
        self.value = _tensor(lhs @ rhs + start)
        assert self.value.shape == start.shape


def _warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    product = _Product(a, b, acc if use_acc else np.zeros_like(acc))
    _own.products.append(product)
    return product


def _warpgroup_mma_wait(left, deps):
    while len(_own.products) > left:
        _own.products.pop(0).finish()
    values = tuple(product.value for product in deps)
    assert all(value is not None for value in values)
    return values if len(values) > 1 else values[0]


def _choose(condition, x, y):
    return np.where(condition, x, y).view(Tensor) if np.ndim(condition) else (x, y)[not condition]


def _exp2(x):
    with np.errstate(over="ignore"):
        return np.exp2(x)


def _store(pointer, value, mask=True):
    if mask:
        pointer.array[pointer.offset] = value


_tl = types.SimpleNamespace(
    float32=np.float32,
    int64="barrier",
    program_id=lambda axis: _own.program,
    where=_choose,
    exp2=_exp2,
    expand_dims=np.expand_dims,
    sum=lambda x, axis: np.sum(x, axis=axis),
    load=lambda pointer, mask, other: _tensor(
        pointer.array[pointer.offset] if mask else np.full(pointer.offset.shape, other, np.float32)
    ),
    store=_store,
    debug_barrier=lambda: None,
)


def _allocate(dtype, shape, layout):
    if dtype == "barrier":
        return _Barriers(shape[0])
    return Buffer(np.full(shape, np.nan, dtype))


def _specialize(tasks, warps, registers):
    program, errors = _own.program, []

    def work(function, arguments):
        _own.program, _own.products, _own.stores = program, [], []
        try:
            function(*arguments)
            assert not _own.products and not _own.stores, "nobody waits for what is under way"
        except Exception as error:  # noqa: BLE001 - told by the thread that started this one
            errors.append(error)

    threads = [threading.Thread(target=work, args=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _layout(*arguments):
    return None


_gl = types.SimpleNamespace(
    constexpr=None,
    BlockedLayout=_layout,
    DotOperandLayout=_layout,
    NVMMADistributedLayout=_layout,
    NVMMASharedLayout=_layout,
    SliceLayout=_layout,
    SwizzledSharedLayout=_layout,
    static_range=range,
    convert_layout=lambda x, layout: x,
    zeros=lambda shape, dtype, layout: np.zeros(shape, dtype).view(Tensor),
    arange=lambda start, end, layout: np.arange(start, end).view(Tensor),
    allocate_shared_memory=_allocate,
    warp_specialize=_specialize,
)

_LANGUAGE = {
    "gl": _gl,
    "tl": _tl,
    "mbarrier": _mbarrier,
    "tma": _tma,
    "warpgroup_mma": _warpgroup_mma,
    "warpgroup_mma_wait": _warpgroup_mma_wait,
    "fence_async_shared": lambda: None,
}


def run(kernel: GluonKernel, *inputs: np.ndarray) -> list[np.ndarray]:
    """The outputs of a kernel, whose programs run one after the other."""
    outputs = [np.full(o.type.shape, np.nan, o.type.dtype) for o in kernel.outputs]
    operands = (*kernel.inputs, *kernel.outputs)
    launch(
        importlib.import_module(kernel.module),
        kernel.name,
        kernel.programs,
        *(
            Pointer(array.reshape(-1))
            if operand.view is None
            else Descriptor(array.reshape(operand.view.shape), operand.view.block)
            for operand, array in zip(operands, (*inputs, *outputs), strict=True)
        ),
        *dict(kernel.constants).values(),
    )
    return outputs


def launch(module: types.ModuleType, entry: str, programs: int, *arguments: Any) -> None:
    """Runs a kernel of a module, program after program.

    Args:
      module: its functions are decorated with ``gluon.jit``.
      entry: the kernel's name.
      programs: of the grid.
      *arguments: :class:`Descriptor`, :class:`Pointer`, or numbers.
    """
    names: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(function := getattr(value, "fn", None), types.FunctionType):
            value = types.FunctionType(function.__code__, names, name)
        names[name] = getattr(value, "value", value)
    names |= _LANGUAGE
    for _own.program in range(programs):
        names[entry](*arguments)
