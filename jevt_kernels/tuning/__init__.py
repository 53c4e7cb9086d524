"""Measured choice: search spaces, measurement on the device, and the store of what was measured."""

from jevt_kernels.tuning.bench import Bench as Bench
from jevt_kernels.tuning.bench import DeviceBench as DeviceBench
from jevt_kernels.tuning.bench import Work as Work
from jevt_kernels.tuning.calibrate import calibrate as calibrate
from jevt_kernels.tuning.contest import Limits as Limits
from jevt_kernels.tuning.contest import Trial as Trial
from jevt_kernels.tuning.contest import contest as contest
from jevt_kernels.tuning.identity import Identity as Identity
from jevt_kernels.tuning.identity import local as local
from jevt_kernels.tuning.key import anonymous as anonymous
from jevt_kernels.tuning.key import key as key
from jevt_kernels.tuning.measure import Result as Result
from jevt_kernels.tuning.measure import measure as measure
from jevt_kernels.tuning.record import Calibration as Calibration
from jevt_kernels.tuning.record import Record as Record
from jevt_kernels.tuning.space import describe as describe
from jevt_kernels.tuning.space import offered as offered
from jevt_kernels.tuning.space import search_space as search_space
from jevt_kernels.tuning.store import NOTHING as NOTHING
from jevt_kernels.tuning.store import Snapshot as Snapshot
from jevt_kernels.tuning.store import Store as Store
from jevt_kernels.tuning.store import StoreWarning as StoreWarning
from jevt_kernels.tuning.store import default_folder as default_folder
from jevt_kernels.tuning.store import opened as opened
