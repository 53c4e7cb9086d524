"""Multi-tensor kernels: one pointwise tree over many sets of tensors in one launch.

A training step updates hundreds of parameters, most of them a few kilobytes long, and a launch each
takes longer than the update. Here one grid covers the blocks of all members. A program finds from
its number whose block it has, takes that member's pointers, and runs the tree, which is printed
once.

The search is a tree of branches over the members' first blocks. Members are laid out from the
longest to the shortest, and a branch halves the blocks, not the members: programs of long tensors,
which are most, decide early. Each branch ends in a number that the compiler cannot see through.
Otherwise it makes selections of the branches, and every program works its way through the pointers
of many members, 250 registers' worth of them for 48.

What is reduced of a member's tensors takes one to three kernels (``mainloops.multi_tensor_sums``).
In one that leaves parts, each program stores that of its block at its own number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer, power_of_two
from jevt_kernels.mainloops import multi_tensor_sums as sums
from jevt_kernels.mainloops.multi_tensor_sums import FULL, SCALAR, Place
from jevt_kernels.mainloops.reduction import OPERATIONS, Reduction
from jevt_kernels.ops import TRITON_TYPES, is_float
from jevt_kernels.spec import Config, KernelSpec, Stages, UnsupportedKernel

SMALLEST_BLOCK = 1

#: Bytes that a program should move: starting it and its search take as long if it moves fewer.
_LEAST_MOVED = 1 << 13

#: Pointers that one launch takes. Before CUDA 12.1 a kernel has 4096 bytes for its parameters, of
#: which Triton takes some for pointers of its own.
MAX_POINTERS = 480


def configs(spec: KernelSpec) -> tuple[Config, ...]:
    """Configurations worth trying, the preferred one first."""
    longest = power_of_two(spec.space.size)
    if _reduces_members(spec):
        return (Config((("i", longest),), min(16, max(1, longest // 512))),)
    # More elements a warp than in pointwise kernels: each warp has the search to pay for.
    choices = [(2048, 4), (1024, 4), (4096, 8), (1024, 2)]
    if 2048 * _bytes_a_point(spec) < _LEAST_MOVED:
        choices.insert(0, (4096, 4))
    found = (Config((("i", min(block, longest)),), warps) for block, warps in choices)
    return tuple(dict.fromkeys(found))


def _bytes_a_point(spec: KernelSpec) -> int:
    """Bytes that a program moves at a point of its block."""
    inputs = {n.input for n in spec.tree if isinstance(n, visitor.Load) and n.index == FULL}
    outputs = {n.output for n in spec.tree if isinstance(n, visitor.Store) and n.index == FULL}
    return sum(
        sum(spec.inputs[one.inputs[slot]].dtype.itemsize for slot in inputs)
        + sum(spec.outputs[one.outputs[slot]].dtype.itemsize for slot in outputs)
        for one in spec.members[:1]  # they are alike
    )


def stages(spec: KernelSpec, config: Config) -> Stages | None:
    """The kernels of a tree with reductions; None where one kernel runs it."""
    if not sums.sums_of(spec.tree) or sums.leaves_parts(spec):
        return None
    whole = config.block("i") >= spec.space.size and _pointers(spec) <= MAX_POINTERS
    if whole and not sums.read_late(spec.tree):
        return None
    check(spec)
    found = sums.stages(spec, config.block("i"))
    for step in found.steps:
        _check_pointers(step.spec)
    return found


def _reduces_members(spec: KernelSpec) -> bool:
    """Whether one program reduces all that a member has."""
    if not sums.sums_of(spec.tree) or sums.read_late(spec.tree):
        return False
    if shared := sums.shared_outputs(spec):
        given = sum(member.size > 0 for member in spec.members)
        return all(spec.outputs[slot].size == given for slot in shared)
    return sums.in_one_program(spec.tree, spec.space.size) and _pointers(spec) <= MAX_POINTERS


def _pointers(spec: KernelSpec) -> int:
    """Pointers of one kernel that does all."""
    return len(spec.inputs) + len(spec.outputs) - len(spec.aliases)


def emit(printer: Printer) -> int:
    """Prints the body; one program instance a block of a member."""
    spec, block = printer.spec, printer.config.block("i")
    check(spec)
    _check_pointers(spec)
    names = _Names.of(spec)
    places = sums.places([member.size for member in spec.members], block)
    printer.parameters = names.parameters()
    printer.constants()
    printer.line(f"pid = {printer.program_id()}")
    # Of one type, whatever their values.
    number = "tl.full((), {}, tl.int64)" if printer.wide else "{}"
    _search(printer, names, places, number)
    grid, shared = places[-1].end, sums.shared_outputs(spec)
    if any(spec.outputs[spec.members[0].outputs[slot]].size != grid for slot in shared):
        raise UnsupportedKernel(f"expected {grid} parts of sums, one of each block")
    with printer.computing(spec.member(places[0].member)):
        printer.line(f"i = (pid - first) * BLOCK_I + {printer.lanes('i')}")
        if any(member.size % block for member in spec.members):
            printer.ragged.add("i")
            printer.line("i_ok = i < size")
        _store(printer, shared)
    return grid


def _store(printer: Printer, shared: Sequence[int]) -> None:
    """Prints the reductions and the stores, those of parts into ``shared`` outputs."""
    tree, stores = printer.spec.tree, printer.stores()
    parts = {s: n for s in stores if isinstance(n := tree[s], visitor.Store) and n.output in shared}
    others = [s for s in stores if s not in parts]
    needed = visitor.ancestors(tree, *others)
    for position in sums.sums_of(tree):
        total = Reduction(printer, position)
        alone = printer.config.block("i") == 1  # which the interpreter cannot add up
        tile = total.masked()
        if position in needed and not alone:
            total.finish(tile)
        elif position in needed:
            printer.set_value(position, tile)
        for node in (n for n in parts.values() if n.operand == position):
            part = tile if alone else total.along(tile)
            kind = TRITON_TYPES[total.dtype]
            number = f"pid + {printer.view.full(printer.view.shape(), '0', 'tl.int32')}"
            printer.line(f"tl.store(y{node.output} + {number}, ({part}).to({kind}))")
    printer.store_all(others)


def _search(printer: Printer, names: _Names, places: Sequence[Place], number: str) -> None:
    """Prints with which pointers, first block and size the programs of these places work.

    ``number`` is the pattern of an integer.
    """
    if len(places) == 1:
        (place,) = places
        for name, own in names.own(place.member):
            printer.line(f"{name} = {own}")
        size = printer.spec.members[place.member].size
        printer.line(f"first = dm.opaque({place.first}, 'mov.b32 $0, {place.first};')")
        printer.line(f"size = {number.format(size)}")
        return
    middle = (places[0].first + places[-1].end) / 2
    half = min(range(1, len(places)), key=lambda n: abs(places[n].first - middle))
    printer.open(f"if pid < {places[half].first}:")
    _search(printer, names, places[:half], number)
    printer.close()
    printer.open("else:")
    _search(printer, names, places[half:], number)
    printer.close()


@dataclasses.dataclass(frozen=True)
class _Names:
    """What the kernel's parameters are called.

    ``x1_7`` is input 1 of member 7, ``y0_7`` its output 0; what all members share has the name
    that the tree has for it, ``x1``, or, where each member reads a part of its own, ``x1_all``.

    Attributes:
      spec: the kernel.
      inputs, outputs: names by position.
    """

    spec: KernelSpec
    inputs: dict[int, str]
    outputs: dict[int, str]

    @staticmethod
    def of(spec: KernelSpec) -> _Names:
        """The names for a kernel."""
        several = len(spec.members) > 1
        inputs: dict[int, str] = {}
        outputs: dict[int, str] = {}
        parts = sums.shared_outputs(spec)
        for number, one in enumerate(spec.members):
            for slot, at in enumerate(one.inputs):
                shared = several and all(m.inputs[slot] == at for m in spec.members)
                cut = shared and any(m.starts and m.starts[slot] for m in spec.members)
                suffix = "_all" if cut else "" if shared else f"_{number}"
                inputs.setdefault(at, f"x{slot}{suffix}")
            for slot, at in enumerate(one.outputs):
                outputs[at] = f"y{slot}" if slot in parts else f"y{slot}_{number}"
        return _Names(spec, inputs, outputs)

    def own(self, member: int) -> list[tuple[str, str]]:
        """The names in the tree of a member's own tensors, and where these are."""
        one = self.spec.members[member]
        found = [
            (f"x{slot}", self.inputs[at] + (f" + {start}" if start else ""))
            for slot, (at, start) in enumerate(one.parts)
        ]
        found += [
            (f"y{slot}", self.outputs[at])
            for slot, at in enumerate(one.outputs)
            if at not in self._in_place
        ]
        return [(name, place) for name, place in found if name != place]

    def parameters(self) -> list[str]:
        """All parameters in order."""
        inputs = [self.inputs[i] for i in range(len(self.spec.inputs))]
        outputs = range(len(self.spec.outputs))
        return inputs + [self.outputs[o] for o in outputs if o not in self._in_place]

    @property
    def _in_place(self) -> set[int]:
        return {output for _, output in self.spec.aliases}


def check(spec: KernelSpec) -> None:
    """Raises UnsupportedKernel unless the tree can run over every member's tensors.

    What it asks for: a space of the longest member's points; every operand in use; outputs, but for
    parts of sums, and inputs that are written in place, each of one member; the same types and the
    same outputs in place for every member; tensors that are read and written in memory order, with
    an element a point, or with one element, which is written if it is made of sums; no iota;
    reductions of what varies, and of no other reductions.
    """
    ones = [spec.member(m) for m in range(len(spec.members))]
    longest = max((one.space.size for one in ones), default=0)
    if spec.space.sizes != (longest,) or not ones:
        raise UnsupportedKernel(
            f"expected the space of the longest of at least one member, ({longest},), got "
            f"{spec.space.sizes}"
        )
    shared = sums.shared_outputs(spec)
    readers = [i for m in spec.members for i in set(m.inputs)]
    writers = [spec.members[0].outputs[slot] for slot in shared]
    writers += [o for m in spec.members for s, o in enumerate(m.outputs) if s not in shared]
    if {*readers} != {*range(len(spec.inputs))} or sorted(writers) != [*range(len(spec.outputs))]:
        raise UnsupportedKernel("expected each input in some member, each output in one")
    if any(readers.count(i) > 1 for i, _ in spec.aliases):
        raise UnsupportedKernel("an input of several members cannot be written in place")
    kinds = [
        (one.aliases, [t.dtype.name for t in one.inputs], [t.dtype.name for t in one.outputs])
        for one in ones
    ]
    for kind in kinds:
        if kind != kinds[0]:
            raise UnsupportedKernel(f"expected members alike, got {kind} beside {kinds[0]}")
    levels, varies = visitor.levels(spec.tree), visitor.dependencies(spec.tree, spec.space)
    late = sums.read_late(spec.tree)
    for position, node in enumerate(spec.tree):
        match node:
            case visitor.Reduce():
                if node.op not in OPERATIONS or levels[position] > 1 or not varies[node.operand]:
                    raise UnsupportedKernel(
                        f"expected reductions of what varies and is none, got {node}"
                    )
                if position in late and not is_float(node.dtype):
                    raise UnsupportedKernel(f"expected floats that tensors need, got {node}")
            case visitor.Store(output, operand, index) if index == SCALAR:
                if varies[operand] or not levels[operand]:
                    raise UnsupportedKernel(f"expected numbers made of sums, got {node}")
                if output not in shared:
                    _check_node(node, spec)
            case _:
                _check_node(node, spec)


def _check_pointers(spec: KernelSpec) -> None:
    """Raises UnsupportedKernel if one launch cannot take all pointers of a kernel."""
    if (pointers := _pointers(spec)) > MAX_POINTERS:
        raise UnsupportedKernel(f"expected at most {MAX_POINTERS} pointers, got {pointers}")


def _check_node(node: visitor.Node, spec: KernelSpec) -> None:
    match node:
        case visitor.Constant() | visitor.Compute():
            return
        case visitor.Load(slot, index) if index in (FULL, SCALAR):
            for one in spec.members:
                at, start = one.parts[slot]
                size = one.size if index == FULL else 1
                kind = spec.inputs[at]
                if start + size > kind.size or (not one.starts and size != kind.size):
                    raise UnsupportedKernel(f"expected a tensor of {size} elements, got {kind}")
        case visitor.Store(slot, _, index) if index == FULL:
            for one in spec.members:
                kind = spec.outputs[one.outputs[slot]]
                if kind.size != one.size:
                    raise UnsupportedKernel(f"expected a tensor of {one.size} elements, got {kind}")
        case visitor.Store(slot, _, index) if index == SCALAR:
            for one in spec.members:
                kind = spec.outputs[one.outputs[slot]]
                if kind.size != 1 or not one.size:
                    raise UnsupportedKernel(f"expected one number of elements, got {kind}")
        case _:
            raise UnsupportedKernel(f"expected tensors in memory order, got {node}")
