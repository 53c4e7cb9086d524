"""The matrix products of BERT, ViT and XML-CNN: forward, input gradients, weight gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.options import Size
from benchmarks.shapes import BERT, VIT, XMLCNN, BertShape


@dataclass(frozen=True)
class Product:
    """A matrix product as ``einsum`` writes it.

    Attributes:
      name: ``<model>-<layer>-<fwd, dgrad or wgrad>``.
      sizes: of the axes, by letter.
      lhs, rhs, out: the axes of the operands and of the result. The first axes of ``lhs`` that
        ``out`` has and ``rhs`` lacks are rows, and so on.
    """

    name: str
    sizes: Mapping[str, int]
    lhs: str
    rhs: str
    out: str

    @property
    def subscripts(self) -> str:
        """For ``einsum``."""
        return f"{self.lhs},{self.rhs}->{self.out}"

    @property
    def batch(self) -> str:
        """Axes of both operands and the result."""
        return "".join(a for a in self.lhs if a in self.rhs and a in self.out)

    @property
    def m(self) -> str:
        """Rows."""
        return "".join(a for a in self.lhs if a not in self.rhs)

    @property
    def n(self) -> str:
        """Columns."""
        return "".join(a for a in self.rhs if a not in self.lhs)

    @property
    def k(self) -> str:
        """Contracted axes."""
        return "".join(a for a in self.lhs if a in self.rhs and a not in self.out)

    def shape(self, layout: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self.sizes[letter] for letter in layout)

    def count(self, letters: str) -> int:
        """The product of some sizes."""
        count = 1
        for letter in letters:
            count *= self.sizes[letter]
        return count

    @property
    def flops(self) -> int:
        """Twice the multiply-adds."""
        return 2 * self.count(self.batch + self.m + self.n + self.k)


def forward(name: str, tokens: int, inputs: int, outputs: int) -> Product:
    """``x · w``."""
    return Product(f"{name}-fwd", {"t": tokens, "i": inputs, "o": outputs}, "ti", "io", "to")


def dgrad(name: str, tokens: int, inputs: int, outputs: int) -> Product:
    """``dy · wᵀ``."""
    return Product(f"{name}-dgrad", {"t": tokens, "i": inputs, "o": outputs}, "to", "io", "ti")


def wgrad(name: str, tokens: int, inputs: int, outputs: int) -> Product:
    """``xᵀ · dy``."""
    return Product(f"{name}-wgrad", {"t": tokens, "i": inputs, "o": outputs}, "ti", "to", "io")


def layer(name: str, tokens: int, inputs: int, outputs: int) -> list[Product]:
    """The three products of a dense layer."""
    return [make(name, tokens, inputs, outputs) for make in (forward, dgrad, wgrad)]


def heads(s: BertShape) -> Mapping[str, int]:
    """Axes of attention: batch, queries, keys, heads, width of a head."""
    return {"b": s.batch, "q": s.sequence, "s": s.sequence, "h": s.heads, "d": s.hidden // s.heads}


def scores(s: BertShape) -> Product:
    """Queries times keys."""
    return Product("bert-scores-fwd", heads(s), "bqhd", "bshd", "bhqs")


def context(s: BertShape) -> Product:
    """Probabilities times values."""
    return Product("bert-context-fwd", heads(s), "bhqs", "bshd", "bqhd")


def products(size: Size) -> list[Product]:
    """All of them."""
    bert, vit, xml = BERT[size], VIT[size], XMLCNN[size]
    tokens = bert.batch * bert.sequence
    patches = vit.batch * vit.tokens
    head = {"t": tokens, "i": bert.hidden, "o": bert.vocabulary}
    return [
        *layer("bert-projection", tokens, bert.hidden, bert.hidden),
        *layer("bert-up", tokens, bert.hidden, bert.ffn),
        *layer("bert-down", tokens, bert.ffn, bert.hidden),
        scores(bert),
        context(bert),
        # The embedding's table, transposed.
        Product("bert-head-fwd", head, "ti", "oi", "to"),
        *layer("vit-qkv", patches, vit.hidden, 3 * vit.hidden),
        *layer("vit-projection", patches, vit.hidden, vit.hidden),
        *layer("vit-up", patches, vit.hidden, vit.ffn),
        *layer("vit-down", patches, vit.ffn, vit.hidden),
        forward("vit-patches", patches, 3 * vit.patch**2, vit.hidden),
        forward("vit-head", vit.batch, vit.hidden, vit.classes),
        forward("xmlcnn-hidden", xml.batch, len(xml.widths) * xml.pooled * xml.filters, xml.hidden),
        *layer("xmlcnn-labels", xml.batch, xml.hidden, xml.labels),
    ]
