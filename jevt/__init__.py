"""jevt: a training-fusion compiler for JAX. ``@jevt.jit`` replaces ``@jax.jit`` on a train step."""

import jevt_kernels as _kernels  # noqa: F401  (checks the Python version)
from jevt._api import explain as explain
from jevt._api import jit as jit
from jevt._api import last_trace as last_trace
from jevt._call import JevtWarning as JevtWarning
from jevt._config import ConfigError as ConfigError
from jevt._lazy import compute_lazy as compute_lazy
from jevt._lazy import lazy as lazy
from jevt._lazy_array import DonatedInputError as DonatedInputError
from jevt._lazy_array import LazyArray as LazyArray
from jevt.pipeline import StrictError as StrictError
from jevt.report.trace import Stage as Stage
from jevt.report.trace import Trace as Trace
