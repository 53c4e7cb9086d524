"""The emulator of Gluon's kernels sees missing waits, and waits for nothing."""

from __future__ import annotations

import sys

import gluon_emulator
import numpy as np
import pytest
import triton.language as tl
from gluon_emulator import Descriptor, launch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def _load(source, buffer, filled, comes):
    if comes:
        mbarrier.expect(filled.index(0), 32)
        tma.async_copy_global_to_shared(source, [8], filled.index(0), buffer.index(0))


@gluon.jit
def _store(result, buffer, filled, waits):
    if waits:
        mbarrier.wait(filled.index(0), 0)
    tma.async_copy_shared_to_global(result, [8], buffer.index(0))
    tma.store_wait(0)


@gluon.jit
def _copy(source, result, comes, waits):
    buffer = gl.allocate_shared_memory(source.dtype, [1, 8], source.layout)
    filled = gl.allocate_shared_memory(tl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(filled.index(0), count=1)
    tasks = [(_store, (result, buffer, filled, waits)), (_load, (source, buffer, filled, comes))]
    gl.warp_specialize(tasks, [1], [24])


def copied(comes=True, waits=True):
    """A tile that begins at element 8 of 12."""
    source, result = np.arange(12, dtype=np.float32), np.zeros(12, np.float32)
    described = (Descriptor(array, (8,)) for array in (source, result))
    launch(sys.modules[__name__], "_copy", 1, *described, comes, waits)
    return result


def test_a_tile_beyond_the_end():
    np.testing.assert_array_equal(copied(), [0] * 8 + [8, 9, 10, 11])


def test_a_missing_wait():
    assert np.isnan(copied(waits=False)[8:]).all()


def test_a_wait_for_nothing(monkeypatch):
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 0.2)
    with pytest.raises(AssertionError, match="nobody arrives"):
        copied(comes=False)
