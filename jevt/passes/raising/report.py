"""What a raising pass has to say of a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

type Note = Callable[[str], None]


def report(
    what: str,
    counts: Mapping[str, Sequence[int]],
    misses: Mapping[str, Sequence[str]],
    note: Note,
) -> None:
    """Tells how many were raised, and what stays.

    Args:
      what: is looked for, "norm".
      counts: for each name of a composite, how many forward and backward.
      misses: for each reason, the places where what looks like one stays.
      note: receives a line each.
    """
    for name, (forward, backward) in sorted(counts.items()):
        note(f"{name}: {forward} forward, {backward} backward")
    for reason, places in misses.items():
        others = f" and {len(places) - 1} more" if len(places) > 1 else ""
        note(f"{what} at {places[0]}{others} stays: {reason}")
