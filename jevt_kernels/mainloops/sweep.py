"""One pass of a loop over a row: the accumulators of its reductions along ``col``.

Sums relative to a maximum so far, and the maximum, have an accumulator for each group of columns
that a thread loads at once, as long as a thread holds so many: the sums are scaled once a group.
Without groups, the two exponentials and selections of each element took twice the instructions, and
the accumulators as many registers as the row's tile: 992 instructions and 73 registers against 640
and 40 for a softmax's gradient. Other sums beside them are in groups too: a cross entropy of soft
labels [16384, 30528] in bfloat16 takes 1045 us on an H100, 1115 with a tile of its labels' sums.
"""

from __future__ import annotations

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer
from jevt_kernels.mainloops.passes import Online, Passes
from jevt_kernels.mainloops.reduction import Reduction, hoist
from jevt_kernels.ops import is_float
from jevt_kernels.spec import KernelSpec
from jevt_kernels.visitor import Compute

#: What a thread loads with one instruction at most.
_LOADED_BYTES = 16


def in_groups(spec: KernelSpec, plan: Passes, number: int) -> frozenset[int]:
    """The reductions of a pass whose accumulators have one element for each group of columns."""
    made = plan.of[number]
    online = {p for p in made if p in plan.online}
    if not online:
        return frozenset()
    maxima = {plan.online[position].maximum for position in online}
    return frozenset(p for p in made if p in online or p in maxima or _is_total(spec.tree[p]))


def _is_total(node: visitor.Node) -> bool:
    return isinstance(node, visitor.Reduce) and node.op == "sum" and is_float(node.dtype)


class Sweep:
    """A pass.

    A loop calls :meth:`accumulate` for each tile; afterwards :meth:`finish` gives the values if the
    loop went over the whole row, :meth:`partial` what is known of them if it went over a part.
    """

    def __init__(self, printer: Printer, plan: Passes, number: int) -> None:
        self.printer = printer
        self.plan = plan
        self.number = number
        self.reductions = [Reduction(printer, position) for position in plan.of[number]]
        self.group = _group(printer)
        self.in_groups = in_groups(printer.spec, plan, number)

    def start(self) -> None:
        """Prints the accumulators, and what tiles need that is the same for all of them."""
        for reduction in self.reductions:
            reduction.start(self.group if reduction.position in self.in_groups else 1)
            below = visitor.ancestors(self.printer.spec.tree, reduction.node.operand)
            ready = [p for p in below if self.plan.known[p] <= self.number]
            hoist(self.printer, ready, "col")

    def accumulate(self) -> None:
        """Prints the update by the present tile."""
        for reduction in self.reductions:
            if reduction.position in self.plan.online:
                continue
            followers = self._followers(reduction)
            if not followers:
                grouped = reduction.position in self.in_groups and self.group > 1
                value = f"dm.group_sums({reduction.masked()}, {self.group})" if grouped else ""
                reduction.accumulate(value)
                continue
            value = self.printer.bind(
                ("operand", reduction.position), reduction.masked(), f"x{reduction.position}_tile"
            )
            for base in dict.fromkeys(self._base(online) for _, online in followers):
                most = self._accumulate_relative(reduction, value, base)
            if self.group > 1:
                self.printer.line(f"{reduction.accumulator} = {most}")
            else:
                reduction.accumulate(value)

    def _accumulate_relative(self, maximum: Reduction, value: str, base: str) -> str:
        """Prints the update of the sums relative to a maximum, before that of the maximum.

        Returns the name of the new maxima of groups, if there are groups.
        """
        stem = f"{base}{maximum.position}"
        most, scale, unit = f"{stem}_most", f"{stem}_scale", f"{stem}_unit"
        old = maximum.accumulator
        if self.group > 1:
            made = f"{most}, {scale}, {unit} = dm.grouped_{base}({old}, {value}, {self.group})"
        else:
            made = f"{scale}, {unit} = dm.online_{base}({old}, {value})"
        self.printer.line(made)
        for reduction, online in self._followers(maximum):
            if self._base(online) == base:
                self.printer.set_value(online.exponential, unit)
                share = reduction.masked()
                if self.group > 1:
                    share = f"dm.group_sums({share}, {self.group})"
                reduction.accumulate(share, scale=scale)
        return most

    def finish(self) -> None:
        """Prints the values."""
        for reduction in self.reductions:
            online = self.plan.online.get(reduction.position)
            tile = reduction.accumulator
            if online is not None:  # the maximum's value is known by now: it comes first
                base, maximum = self._base(online), Reduction(self.printer, online.maximum)
                less = self.printer.value(online.subtrahend)
                tile = f"{tile} * tl.{base}({maximum.accumulator} - {less})"
            reduction.finish(tile)

    def partial(self, reduction: Reduction) -> str:
        """What the pass knows of a reduction; of an online sum, relative to the maximum."""
        online = self.plan.online.get(reduction.position)
        if online is None:
            return self._of_part(reduction)
        maximum = Reduction(self.printer, online.maximum)
        most = self._of_part(maximum)
        scaled = f"dm.relative_{self._base(online)}({maximum.accumulator}, {most})"
        return reduction.along(f"{reduction.accumulator} * {scaled}")

    def _of_part(self, reduction: Reduction) -> str:
        name = f"part{reduction.position}"
        return self.printer.bind(name, reduction.along(reduction.accumulator), name)

    def _followers(self, maximum: Reduction) -> list[tuple[Reduction, Online]]:
        return [
            (reduction, self.plan.online[reduction.position])
            for reduction in self.reductions
            if reduction.position in self.plan.online
            and self.plan.online[reduction.position].maximum == maximum.position
        ]

    def _base(self, online: Online) -> str:
        node = self.printer.spec.tree[online.exponential]
        assert isinstance(node, Compute)
        return node.op


def _group(printer: Printer) -> int:
    """Neighbouring columns that a thread loads at once; 1 if it has not so many of a tile."""
    config, col = printer.config, printer.spec.space.tile_axis("col")
    widths = [
        printer.spec.inputs[node.input].dtype.itemsize
        for node in printer.spec.tree
        if isinstance(node, visitor.Load) and node.index.depends_on(col)
    ]
    group = min(8, _LOADED_BYTES // max(widths, default=_LOADED_BYTES))
    held = config.block("row") * config.block("col") // (32 * config.num_warps)
    return group if min(held, config.block("col")) >= group else 1
