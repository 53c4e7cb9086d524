"""What a pass has to say of equations, and where in the user's program they are."""

from __future__ import annotations

from collections.abc import Callable

from jax.extend import source_info_util
from jax.extend.core import JaxprEqn

type Note = Callable[[str], None]


class Remarks:
    """Remarks on equations; what is said of several is said once, with their number."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, str], list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._places)

    def add(self, eqn: JaxprEqn, subject: str, remark: str) -> None:
        """Says something of an equation.

        Args:
          eqn: the place.
          subject: what is there, "the scatter that adds".
          remark: what is said of it, from the place on, " stays: its indices are floats".
        """
        place = source_info_util.summarize(eqn.source_info) or "a line of no file"
        self._places.setdefault((subject, remark), []).append(place)

    def update(self, other: Remarks) -> None:
        """Takes over what others have said."""
        for key, places in other._places.items():
            self._places.setdefault(key, []).extend(places)

    def tell(self, note: Note) -> None:
        """Gives ``note`` a line for each remark: "norm at f.py:3 and 2 more stays: …"."""
        for (subject, remark), places in self._places.items():
            others = f" and {len(places) - 1} more" if len(places) > 1 else ""
            note(f"{subject} at {places[0]}{others}{remark}")
