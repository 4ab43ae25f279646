"""Methods: modules that turn crops into a dict of losses, and the maskings that decide what they hide."""

from maskwise.methods.dino import DINO
from maskwise.methods.ibot import IBOT
from maskwise.methods.masking import MASKINGS

METHODS = {"dino": DINO, "ibot": IBOT}

__all__ = ["DINO", "IBOT", "MASKINGS", "METHODS"]
