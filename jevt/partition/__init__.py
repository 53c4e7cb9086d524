"""Partitioning: which equations become one kernel.

In processing order: :mod:`.graph` reads the jaxpr, :mod:`.recompute` and :mod:`.duplicate` copy
what is cheap to make again, :mod:`.contract` joins what no good partition separates,
:mod:`.components` splits the rest, :mod:`.absorb` joins leaves to what they read, :mod:`.problem`
states what is optimised, :mod:`.copies` what several groups may compute, :mod:`.batch` and
:mod:`.solve` with :mod:`.greedy` and :mod:`.ilp` optimise it, :mod:`.targets` with :mod:`.cost`
chooses between a kernel and XLA, :mod:`.plan` is the result, of which :mod:`.printing`,
:mod:`.serial` and :mod:`.neighbours` tell. :mod:`.run` is the way through.
"""

from jevt.partition.cost import device_model as device_model
from jevt.partition.plan import Group as Group
from jevt.partition.plan import Plan as Plan
from jevt.partition.printing import fallbacks as fallbacks
from jevt.partition.printing import format_plan as format_plan
from jevt.partition.printing import summary as summary
from jevt.partition.run import partition as partition
from jevt.partition.serial import from_json as from_json
from jevt.partition.serial import to_json as to_json
