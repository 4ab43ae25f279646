"""The table of poolings: tokens in, a vector and the attention that made it out.

A row is a module whose first argument is the width D. It takes Tokens, [B, N, D] or [B, D, H, W] and returns Pooled.
Class attributes: `needs`, the names of the Tokens fields that it wants computed; `gives_attention`.
"""

from maskwise.nn.pooling.cls import CLS
from maskwise.nn.pooling.gates import CBAM, GE, SE
from maskwise.nn.pooling.how import HOW
from maskwise.nn.pooling.kmeans import KMeans
from maskwise.nn.pooling.map import MAPPooling
from maskwise.nn.pooling.otk import OTK
from maskwise.nn.pooling.pooling import Pooling
from maskwise.nn.pooling.simple import GAP, LSE, GAPMax, GeM, Max
from maskwise.nn.pooling.simpool import SimPool
from maskwise.nn.pooling.slot import Slot
from maskwise.nn.pooling.transformer import CaiT, ViT

POOLINGS = {
    "cls": CLS, "simpool": SimPool, "gap": GAP, "max": Max, "gap_max": GAPMax, "gem": GeM, "lse": LSE, "how": HOW, "otk": OTK, "kmeans": KMeans,
    "slot": Slot, "se": SE, "cbam": CBAM, "ge": GE, "vit": ViT, "cait": CaiT, "map": MAPPooling,
}  # fmt: skip

__all__ = ["POOLINGS", "CLS", "Pooling", "SimPool", "with_attention"]


def with_attention() -> str:
    """The rows whose attention a masking can follow, as a text for whoever has to choose."""
    return ", ".join(name for name, row in POOLINGS.items() if row.gives_attention)
