"""What a run may vary about a workload. Imports no framework: JAX and PyTorch workers share it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Size = Literal["full", "smoke"]
SIZES: tuple[Size, ...] = ("full", "smoke")

Attention = Literal["einsum", "dpa", "cudnn"]
ATTENTIONS: tuple[Attention, ...] = ("einsum", "dpa", "cudnn")


@dataclasses.dataclass(frozen=True)
class Options:
    """The knobs of a workload.

    Attributes:
      size: ``full`` for the shapes of the paper, ``smoke`` for shapes that a CPU runs in a second.
      dtype: name of the dtype of the computation.
      param_dtype: name of the dtype of the parameters. bfloat16 by default, as the paper trains
        with half-precision parameters; statistics of BatchNorm are float32 whatever this says.
      dropout: dropout rate of the models that have dropout (bert).
      attention: ``einsum`` writes attention out as einsum, softmax, einsum; ``dpa`` calls
        ``jax.nn.dot_product_attention``; ``cudnn`` calls it with ``implementation="cudnn"``.
      data: folder with the files of ogbn-mag, for gcn; a graph of its size is drawn otherwise.
    """

    size: Size = "full"
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"
    dropout: float = 0.0
    attention: Attention = "einsum"
    data: str | None = None

    def __post_init__(self) -> None:
        _check("size", self.size, SIZES)
        _check("attention", self.attention, ATTENTIONS)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a rate in [0, 1), got {self.dropout}")

    def replace(self, **changes: Any) -> Options:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def unusual(self) -> str:
        """The fields that are not at their default, for the note of a row; not the size."""
        usual = Options().to_json()
        told = {k: v for k, v in self.to_json().items() if k != "size" and v != usual[k]}
        return ", ".join(f"{name} {value}" for name, value in told.items())

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object; ``Options(**x)`` reads it back."""
        return dataclasses.asdict(self)


def _check(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise ValueError(f"{name}: expected one of {', '.join(legal)}, got {value!r}")
