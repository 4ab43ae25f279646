"""Training methods, which return a dict of losses for crops or labeled images, and maskings."""

from maskwise.methods.dino import DINO
from maskwise.methods.distill import Distill
from maskwise.methods.ibot import IBOT
from maskwise.methods.masking import MASKINGS
from maskwise.methods.mst import MST
from maskwise.methods.supervised import Supervised

METHODS = {"dino": DINO, "ibot": IBOT, "mst": MST, "distill": Distill, "supervised": Supervised}

__all__ = ["DINO", "IBOT", "Distill", "MASKINGS", "METHODS", "MST", "Supervised"]
