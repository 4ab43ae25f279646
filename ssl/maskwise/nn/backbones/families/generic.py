"""Any other network: timm models that run as a whole by `forward_features`, and modules of one's own."""

from __future__ import annotations

import functools
import inspect
import sys

from torch import nn

from maskwise.nn.backbones.families.base import Family

# timm's arguments by which a network accepts more sizes, or leaves out what draws from the global generator
FIXED_ARGUMENTS = {"drop_path_rate": 0.0, "dynamic_img_size": True, "strict_img_size": False}
# a Backbone's argument -> the names under which a class of one's own may take it
EXTERNAL_NAMES = {
    "image_size": ("image_size", "img_size"),
    "patch_size": ("patch_size",),
    "class_token": ("class_token",),
}
# timm class -> beginnings, as a pattern, of the parameters that only its class token reads
CLASS_TOKEN_PARTS = {
    "Cait": r"cls_token|blocks_token_only\.",
    "VOLO": r"cls_token|post_network\.",
    "Xcit": r"cls_token|cls_attn_blocks\.\d+\.(attn|mlp|gamma2)",
}


class GenericFamily(Family):
    """A network without a family of its own: no drop path, masks, blocks or stages; `external`: not timm's."""

    branches = 1
    block_classes = ()

    def __init__(self, model_class: type[nn.Module], external: bool = False):
        self.model_class = model_class
        taken = constructor_parameters(model_class)
        places = EXTERNAL_NAMES if external else {**EXTERNAL_NAMES, "image_size": ("img_size",)}
        self.timm_names = {own: name for own, names in places.items() for name in names if name in taken}
        if external:
            self.timm_arguments = {}
            return
        fixed = {name: value for name, value in FIXED_ARGUMENTS.items() if name in taken}
        self.timm_arguments = {"num_classes": 0, **fixed}

    def blocks(self, model: nn.Module) -> tuple:
        """Return no blocks: the network runs as a whole."""
        return ()

    def translate(self, state: dict, model: nn.Module) -> dict:
        """Rename a pretrained state dict to timm's current keys, by the function in the model's file."""
        rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        return state if rename is None else rename(state, model)


@functools.cache
def generic_family(model_class: type[nn.Module], external: bool = False) -> GenericFamily:
    """Return the adapter of a class."""
    return GenericFamily(model_class, external)


def constructor_parameters(cls: type) -> frozenset[str]:
    """Return the names of a constructor's arguments, those of parents that get its **kwargs included."""
    names: set[str] = set()
    for base in (base for base in cls.__mro__ if base not in (nn.Module, object)):
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        names |= {parameter.name for parameter in own}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break
    return frozenset(names)
