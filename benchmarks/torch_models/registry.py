"""Which function makes the twin of which workload."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from benchmarks.options import Options
from benchmarks.torch_models.twin import Twin

# Other spellings of a model in JAX have the model's own twin.
_MAKERS: Mapping[str, tuple[str, str]] = {
    "bert": ("bert", "make"),
    "bert-dpa": ("bert", "make"),
    "vit": ("vit", "make"),
    "vit-dpa": ("vit", "make"),
    "vit-nnx": ("vit", "make"),
    "resnet": ("resnet", "make"),
    "xmlcnn": ("xmlcnn", "make"),
    "gcn": ("gcn", "make"),
    "gcn-bcoo": ("gcn", "make"),
    "bert-attention": ("subgraphs", "bert_attention"),
    "bert-mlp": ("subgraphs", "bert_mlp"),
    "resnet-bottleneck": ("subgraphs", "resnet_bottleneck"),
    "xmlcnn-head": ("subgraphs", "xmlcnn_head"),
    "gcn-uturn": ("subgraphs", "gcn_uturn"),
}


def make(name: str, options: Options, *, compiled: bool) -> Twin:
    """The twin of a workload; ``compiled`` where it is going to be compiled by Inductor."""
    if options.data and name.startswith("gcn"):
        raise NotImplementedError(f"{name}: the PyTorch twin only has the drawn graph")
    module, function = _MAKERS[name]
    maker = getattr(importlib.import_module(f"benchmarks.torch_models.{module}"), function)
    return maker(options, compiled=compiled) if name.startswith("gcn") else maker(options)
