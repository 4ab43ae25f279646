"""Table of poolings: from patch tokens to one vector per image, and the attention that formed it.

To add one, subclass `Pooling` and add a row here.
"""

from torch import nn

from maskwise.nn.pooling.base import Pooling
from maskwise.nn.pooling.cls import CLS
from maskwise.nn.pooling.dft import DFT
from maskwise.nn.pooling.gates import CBAM, GE, SE
from maskwise.nn.pooling.how import HOW
from maskwise.nn.pooling.kmeans import KMeans
from maskwise.nn.pooling.multi_token import MAPPooling
from maskwise.nn.pooling.otk import OTK
from maskwise.nn.pooling.query_attention import CaiT, ViT
from maskwise.nn.pooling.simple import GAP, LSE, GAPMax, GeM, Max
from maskwise.nn.pooling.simpool import SimPool
from maskwise.nn.pooling.slot import Slot
from maskwise.nn.pooling.vgg import VGG

POOLINGS: dict[str, type[nn.Module]] = {
    "cls": CLS,
    "simpool": SimPool,
    "gap": GAP,
    "max": Max,
    "gap_max": GAPMax,
    "gem": GeM,
    "lse": LSE,
    "how": HOW,
    "otk": OTK,
    "kmeans": KMeans,
    "slot": Slot,
    "se": SE,
    "cbam": CBAM,
    "ge": GE,
    "vit": ViT,
    "cait": CaiT,
    "map": MAPPooling,
    "vgg": VGG,
    "dft": DFT,
}

__all__ = ["POOLINGS", "CLS", "Pooling", "SimPool", "with_attention"]


def with_attention() -> str:
    """Return the names of the poolings whose attention a masking can follow, separated by commas."""
    return ", ".join(name for name, row in POOLINGS.items() if row.gives_attention)
