"""Fused Triton kernels from epilogue visitor trees. Independent of :mod:`jevt`.

A kernel is a :class:`KernelSpec`. :func:`call` runs it inside ``jax.jit`` on a GPU;
:mod:`jevt_kernels.interpreter` runs it on a CPU, :mod:`jevt_kernels.aot` compiles it without a GPU.
Importing this package does not import Triton.
"""

import sys

# Before any other import: the modules below do not even parse on an older Python.
if sys.version_info < (3, 12):
    raise ImportError(
        f"jevt needs Python 3.12 or newer, got {sys.version_info[0]}.{sys.version_info[1]}. "
        "Create the environment with a newer Python: python3.12 -m venv .venv"
    )

from jevt_kernels import aot as aot
from jevt_kernels import interpreter as interpreter
from jevt_kernels.compat import UnsupportedDevice as UnsupportedDevice
from jevt_kernels.index_map import IndexMap as IndexMap
from jevt_kernels.index_map import Space as Space
from jevt_kernels.index_map import TileAxis as TileAxis
from jevt_kernels.index_map import row_major as row_major
from jevt_kernels.launch import call as call
from jevt_kernels.launch import run as run
from jevt_kernels.spec import Config as Config
from jevt_kernels.spec import KernelSpec as KernelSpec
from jevt_kernels.spec import Source as Source
from jevt_kernels.spec import TensorType as TensorType
from jevt_kernels.spec import UnsupportedKernel as UnsupportedKernel
from jevt_kernels.visitor import Compute as Compute
from jevt_kernels.visitor import Constant as Constant
from jevt_kernels.visitor import Contract as Contract
from jevt_kernels.visitor import Iota as Iota
from jevt_kernels.visitor import Load as Load
from jevt_kernels.visitor import Reduce as Reduce
from jevt_kernels.visitor import Store as Store
