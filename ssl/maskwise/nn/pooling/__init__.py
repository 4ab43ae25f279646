"""The table of poolings: tokens in, a vector and the attention that made it out.

A row is a module whose first argument is the width D. It takes Tokens, [B, N, D] or [B, D, H, W] and returns Pooled.
Class attributes: `needs`, the names of the Tokens fields that it wants computed; `gives_attention`.
"""

from maskwise.nn.pooling.cls import CLS
from maskwise.nn.pooling.simpool import SimPool

POOLINGS = {"cls": CLS, "simpool": SimPool}

__all__ = ["POOLINGS", "CLS", "SimPool"]
