"""The names of the workloads, and which function makes each. Imports a model only when asked."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.options import Options

if TYPE_CHECKING:
    from benchmarks.workload import Workload

MODELS = ("bert", "vit", "resnet", "xmlcnn", "gcn")
SPELLINGS = ("bert-dpa", "vit-dpa", "vit-nnx", "gcn-bcoo")
SUBGRAPHS = ("bert-attention", "bert-mlp", "resnet-bottleneck", "xmlcnn-head", "gcn-uturn")
WORKLOADS = MODELS + SPELLINGS + SUBGRAPHS

GROUPS: Mapping[str, tuple[str, ...]] = {
    "models": MODELS,
    "spellings": SPELLINGS,
    "subgraphs": SUBGRAPHS,
    "all": WORKLOADS,
}

_MAKERS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("models.bert", "make", {}),
    "vit": ("models.vit", "make", {}),
    "resnet": ("models.resnet", "make", {}),
    "xmlcnn": ("models.xmlcnn", "make", {}),
    "gcn": ("models.gcn", "make", {}),
    "vit-nnx": ("models.vit_nnx", "make", {}),
    "gcn-bcoo": ("models.gcn", "make", {"aggregation": "bcoo"}),
    "bert-attention": ("subgraphs", "bert_attention", {}),
    "bert-mlp": ("subgraphs", "bert_mlp", {}),
    "resnet-bottleneck": ("subgraphs", "resnet_bottleneck", {}),
    "xmlcnn-head": ("subgraphs", "xmlcnn_head", {}),
    "gcn-uturn": ("subgraphs", "gcn_uturn", {}),
}


def expand(names: list[str]) -> list[str]:
    """Workload names for names of workloads and groups, in order, each once.

    Raises:
      ValueError: for an unknown name; the message lists the known ones.
    """
    out: dict[str, None] = {}
    for name in names:
        if name not in WORKLOADS and name not in GROUPS:
            known = ", ".join((*WORKLOADS, *GROUPS))
            raise ValueError(f"workloads: expected some of {known}; got {name!r}")
        out.update(dict.fromkeys(GROUPS.get(name, (name,))))
    return list(out)


def make(name: str, options: Options) -> Workload:
    """The workload of that name."""
    base, _, spelling = name.partition("-")
    if spelling == "dpa":
        # cuDNN's attention stays cuDNN's under either spelling.
        keep = options.attention == "cudnn"
        name, options = base, options if keep else options.replace(attention="dpa")
    module, function, extra = _MAKERS[name]
    return getattr(importlib.import_module(f"benchmarks.{module}"), function)(options, **extra)
