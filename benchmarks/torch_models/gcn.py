"""The twin of ``models/gcn.py``: cuSPARSE's CSR product in eager mode, a gather and an index_add
where Inductor compiles, which cannot see into sparse tensors."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from benchmarks.options import Options
from benchmarks.shapes import GCN, GcnShape
from benchmarks.torch_models.twin import (
    Batch,
    Twin,
    build,
    cross_entropy,
    device,
    dtype_of,
    generator,
    integers,
    normal,
)


class EdgeList(NamedTuple):
    """``int64[edges]`` ends and their weights."""

    src: torch.Tensor
    dst: torch.Tensor
    weight: torch.Tensor

    def aggregate(self, h: torch.Tensor) -> torch.Tensor:
        messages = h[self.src] * self.weight[:, None]
        return torch.zeros_like(h).index_add(0, self.dst, messages)


class Csr(NamedTuple):
    """The adjacency matrix and its transpose, both CSR."""

    matrix: torch.Tensor
    transpose: torch.Tensor

    def aggregate(self, h: torch.Tensor) -> torch.Tensor:
        return _CsrProduct.apply(self.matrix, self.transpose, h)


class _CsrProduct(torch.autograd.Function):
    """A·h, with Aᵀ at hand for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, matrix: torch.Tensor, transpose: torch.Tensor, h: torch.Tensor
    ) -> torch.Tensor:
        ctx.transpose = transpose
        return matrix @ h

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        return None, None, ctx.transpose @ grad.contiguous()


class Gcn(nn.Module):
    """Features ``[nodes, features]`` to logits ``[nodes, classes]``."""

    def __init__(self, shape: GcnShape) -> None:
        super().__init__()
        widths = [shape.features] + [shape.hidden] * shape.convolutions
        self.convolutions = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
        self.classes = nn.Linear(shape.hidden, shape.classes)

    def forward(self, h: torch.Tensor, graph: EdgeList | Csr) -> torch.Tensor:
        for conv in self.convolutions:
            h = conv(h)
            h = functional.relu(graph.aggregate(h) + h)
        return self.classes(h)


def draw_graph(shape: GcnShape, options: Options, *, csr: bool) -> EdgeList | Csr:
    """A power-law graph drawn as ``models/_graph.py`` draws it (other random numbers).

    An edge list where ``csr`` is false, and on a CPU, which has no bfloat16 CSR product.
    """
    random = generator(-1000)

    def ends() -> torch.Tensor:
        u = torch.rand(shape.edges, generator=random, device=device())
        rank = (shape.nodes * u**shape.skew).long().clamp(max=shape.nodes - 1)
        return torch.randperm(shape.nodes, generator=random, device=device())[rank]

    src, dst = ends(), ends()
    degree = torch.bincount(dst, minlength=shape.nodes).float()
    weight = (1 / degree[dst]).to(dtype_of(options))
    if not csr or device().type == "cpu":
        return EdgeList(src, dst, weight)
    return Csr(_to_csr(dst, src, weight, shape.nodes), _to_csr(src, dst, weight, shape.nodes))


def _to_csr(
    rows: torch.Tensor, columns: torch.Tensor, weight: torch.Tensor, nodes: int
) -> torch.Tensor:
    order = torch.argsort(rows, stable=True)
    starts = torch.zeros(nodes + 1, dtype=torch.int32, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=nodes).cumsum(0)
    return torch.sparse_csr_tensor(
        starts, columns[order].int(), weight[order], size=(nodes, nodes), check_invariants=False
    )


def make(options: Options, *, compiled: bool = False) -> Twin:
    """The twin of the GCN's training step."""
    s = GCN[options.size]
    graph = draw_graph(s, options, csr=not compiled)

    def batch(seed: int) -> Batch:
        random = generator(seed)
        return {
            "features": normal((s.nodes, s.features), options, random),
            "labels": integers((s.nodes,), s.classes, random),
            "graph": graph,
        }

    def forward(module: nn.Module, batch: Batch) -> torch.Tensor:
        return cross_entropy(module(batch["features"], batch["graph"]), batch["labels"])

    return Twin(build(lambda: Gcn(s), options), forward, batch)
