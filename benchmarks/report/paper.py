"""The paper's own figures, quoted: the only measured numbers that are written down in code.

Source: Chen et al., *EVT: Accelerating Deep Learning Training with Epilogue Visitor Tree*,
ASPLOS 2024. End-to-end speedups: Figure 12, one A100. Subgraphs: Figures 13 to 17, from the
paper's public artifact, against eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping

OVER_INDUCTOR: Mapping[str, float] = {"bert": 1.20, "vit": 1.07, "resnet": 1.14, "xmlcnn": 1.11}

OVER_NVFUSER: Mapping[str, float] = {
    "bert": 1.29,
    "vit": 1.22,
    "resnet": 1.41,
    "xmlcnn": 1.24,
    "gcn": 1.52,
}

SUBGRAPH_OVER_EAGER: Mapping[str, float] = {
    "bert-attention": 1.54,
    "bert-mlp": 1.19,
    "resnet-bottleneck": 1.25,
    "xmlcnn-head": 4.08,
    "gcn-uturn": 3.09,
}
