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

With sums over a member's tensors there are three kernels (``mainloops.multi_tensor_sums``). In one
that stores sums, each program leaves that of its block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jevt_kernels import visitor
from jevt_kernels.codegen import Printer, power_of_two
from jevt_kernels.mainloops import multi_tensor_sums as sums
from jevt_kernels.mainloops.multi_tensor_sums import FULL, SCALAR
from jevt_kernels.mainloops.reduction import Reduction
from jevt_kernels.ops import TRITON_TYPES
from jevt_kernels.spec import Config, KernelSpec, Stages, UnsupportedKernel

SMALLEST_BLOCK = 1

#: Pointers that one launch takes. Before CUDA 12.1 a kernel has 4096 bytes for its parameters, of
#: which Triton takes some for pointers of its own.
MAX_POINTERS = 480


def configs(spec: KernelSpec) -> tuple[Config, ...]:
    """Configurations worth trying, the preferred one first."""
    longest = power_of_two(spec.space.size)
    if _adds_up_members(spec):
        return (Config((("i", longest),), min(16, max(1, longest // 512))),)
    # More elements a warp than in pointwise kernels: each warp has the search to pay for.
    choices = ((2048, 4), (1024, 4), (4096, 8), (1024, 2))
    found = (Config((("i", min(block, longest)),), warps) for block, warps in choices)
    return tuple(dict.fromkeys(found))


def stages(spec: KernelSpec, config: Config) -> Stages | None:
    """The kernels of a tree that reads its own sums; None for any other."""
    if not sums.is_in_stages(spec):
        return None
    check(spec)
    return sums.stages(spec, config.block("i"))


def _adds_up_members(spec: KernelSpec) -> bool:
    """Whether one program adds up all that a member has: its results are one number each."""
    return bool(sums.sums_of(spec.tree)) and all(t.size == 1 for t in spec.outputs)


def emit(printer: Printer) -> int:
    """Prints the body; one program instance a block of a member."""
    spec, block = printer.spec, printer.config.block("i")
    check(spec)
    names = _Names.of(spec)
    members = sorted(range(len(spec.members)), key=lambda m: -spec.members[m].size)
    members = [m for m in members if spec.members[m].size]  # the others have no block
    places = [_Place(0, 0, 0)]
    for member in members:
        size = spec.members[member].size
        places.append(_Place(member, places[-1].end, places[-1].end + -(-size // block)))
    printer.parameters = names.parameters()
    printer.constants()
    printer.line(f"pid = {printer.program_id()}")
    # Of one type, whatever their values.
    number = "tl.full((), {}, tl.int64)" if printer.wide else "{}"
    _search(printer, names, places[1:], number)
    with printer.computing(spec.member(members[0])):
        printer.line(f"i = (pid - first) * BLOCK_I + {printer.lanes('i')}")
        if any(spec.members[m].size % block for m in members):
            printer.ragged.add("i")
            printer.line("i_ok = i < size")
        added = sums.sums_of(printer.spec.tree)
        stored = {s: visitor.operands(printer.spec.tree[s])[0] for s in printer.stores()}
        for store, position in stored.items():
            if position in added:
                _store_sum(printer, store, Reduction(printer, position))
        printer.store_all([store for store, operand in stored.items() if operand not in added])
    return places[-1].end


def _store_sum(printer: Printer, store: int, total: Reduction) -> None:
    """Prints the store of the sum of a program's block, at the block's number."""
    node = printer.spec.tree[store]
    assert isinstance(node, visitor.Store)
    alone = printer.config.block("i") == 1  # which the interpreter cannot add up
    value = total.masked() if alone else f"tl.sum({total.masked()}, axis=0)"
    address = "i" if alone else "(pid - first)"
    kind = TRITON_TYPES[total.dtype]
    printer.line(f"tl.store(y{node.output} + {address}, ({value}).to({kind}))")


@dataclasses.dataclass(frozen=True)
class _Place:
    """The blocks of a member in the grid, from ``first`` up to ``end``."""

    member: int
    first: int
    end: int


def _search(printer: Printer, names: _Names, places: Sequence[_Place], number: str) -> None:
    """Prints with which pointers, first block and size the programs of these places work.

    ``number`` is the pattern of an integer.
    """
    if len(places) == 1:
        (place,) = places
        for name, parameter in names.own(place.member):
            printer.line(f"{name} = {parameter}")
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

    ``x1_7`` is input 1 of member 7, ``y0_7`` its output 0; an input that all members share has the
    name under which the tree reads it, ``x1``.

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
        for number, one in enumerate(spec.members):
            for slot, at in enumerate(one.inputs):
                shared = several and all(m.inputs[slot] == at for m in spec.members)
                inputs.setdefault(at, f"x{slot}" if shared else f"x{slot}_{number}")
            for slot, at in enumerate(one.outputs):
                outputs[at] = f"y{slot}_{number}"
        return _Names(spec, inputs, outputs)

    def own(self, member: int) -> list[tuple[str, str]]:
        """The names in the tree of a member's own tensors, and their parameters."""
        one = self.spec.members[member]
        found = [(f"x{slot}", self.inputs[at]) for slot, at in enumerate(one.inputs)]
        found += [
            (f"y{slot}", self.outputs[at])
            for slot, at in enumerate(one.outputs)
            if at not in self._in_place
        ]
        return [(name, parameter) for name, parameter in found if name != parameter]

    def parameters(self) -> list[str]:
        """All parameters in order."""
        inputs = [self.inputs[i] for i in range(len(self.spec.inputs))]
        outputs = range(len(self.spec.outputs))
        return inputs + [self.outputs[o] for o in outputs if o not in self._in_place]

    @property
    def _in_place(self) -> set[int]:
        return {output for _, output in self.spec.aliases}


def check(spec: KernelSpec) -> None:
    """Raises UnsupportedKernel unless the tree can run over every member's tensors in one launch.

    What it asks for: a space of the longest member's points; every operand in use; outputs, and
    inputs that are written in place, each of one member; the same types and the same outputs in
    place for every member; tensors that are read and written in memory order, with an element a
    point, or read only, with one element; no iota; sums of what varies, and of no other sums.
    """
    ones = [spec.member(m) for m in range(len(spec.members))]
    longest = max((one.space.size for one in ones), default=0)
    if spec.space.sizes != (longest,) or not ones:
        raise UnsupportedKernel(
            f"expected the space of the longest of at least one member, ({longest},), got "
            f"{spec.space.sizes}"
        )
    pointers = len(spec.inputs) + len(spec.outputs) - len(spec.aliases)
    if pointers > MAX_POINTERS:
        raise UnsupportedKernel(f"expected at most {MAX_POINTERS} pointers, got {pointers}")
    readers = [i for m in spec.members for i in set(m.inputs)]
    writers = [o for m in spec.members for o in m.outputs]
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
    added = sums.sums_of(spec.tree)
    if sums.is_in_stages(spec):
        held = len(added) * len(ones)
        if pointers + held > MAX_POINTERS:
            raise UnsupportedKernel(
                f"expected at most {MAX_POINTERS} pointers, got {pointers + held} with sums"
            )
    levels, varies = visitor.levels(spec.tree), visitor.dependencies(spec.tree, spec.space)
    for position, node in enumerate(spec.tree):
        if isinstance(node, visitor.Reduce):
            if node.op != "sum" or levels[position] > 1 or not varies[node.operand]:
                raise UnsupportedKernel(f"expected sums of what varies and is no sum, got {node}")
        elif not isinstance(node, visitor.Store) or node.operand not in added:
            _check_node(node, ones)


def _check_node(node: visitor.Node, ones: Sequence[KernelSpec]) -> None:
    match node:
        case visitor.Constant() | visitor.Compute():
            return
        case visitor.Load(at, index) if index in (FULL, SCALAR):
            tensors = [one.inputs[at] for one in ones]
        case visitor.Store(at, _, index) if index == FULL:
            tensors = [one.outputs[at] for one in ones]
        case _:
            raise UnsupportedKernel(f"expected tensors in memory order, got {node}")
    for one, tensor in zip(ones, tensors, strict=True):
        size = one.space.size if index == FULL else 1
        if tensor.size != size:
            raise UnsupportedKernel(f"expected a tensor of {size} elements, got {tensor}")
