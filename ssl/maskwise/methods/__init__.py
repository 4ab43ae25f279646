"""Methods: modules that turn crops into a dict of losses, and the maskings that decide what they hide."""

from maskwise.methods.dino import DINO
from maskwise.methods.ibot import IBOT
from maskwise.methods.masking import MASKINGS
from maskwise.methods.mst import MST

METHODS = {"dino": DINO, "ibot": IBOT, "mst": MST}

__all__ = ["DINO", "IBOT", "MASKINGS", "METHODS", "MST"]
