"""A network of one's own, named `module:Class`, in the place of a timm model."""

from __future__ import annotations

import inspect

from torch import nn

from maskwise.errors import UserError
from maskwise.nn.backbones.families.generic import EXTERNAL_NAMES, constructor_parameters
from maskwise.process.external_code import NoClass, external_class


def is_external(name: str) -> bool:
    """Return whether a backbone's name is `module:Class`."""
    return ":" in name


def network_class(name: str) -> type[nn.Module]:
    """Import the class `module:Class` of a network; raises UserError for anything but a Module's class."""
    try:
        cls = external_class(name)
    except NoClass as error:
        raise UserError(str(error)) from None
    if not issubclass(cls, nn.Module):
        raise UserError(f"`{name}` is no torch.nn.Module: give the class of a network, images in, map or tokens out")
    return cls


def build_external(
    name: str, image_size: int | tuple[int, int] | None, patch_size, class_token: bool | None, arguments: dict
) -> nn.Module:
    """Build the network `module:Class`; raises UserError for an argument that it does not take, or where it fails.

    Sizes, class_token and in_chans are passed on to a constructor that has them.
    """
    cls = network_class(name)
    taken = constructor_parameters(cls)
    sizes = {"image_size": image_size, "patch_size": patch_size, "class_token": class_token}
    own = {}
    for key, value in sizes.items():
        place = next((place for place in EXTERNAL_NAMES[key] if place in taken), None)
        if place is not None and value is not None:
            own[place] = tuple(value) if isinstance(value, list) else value
        elif value and key == "patch_size":
            raise UserError(f"backbone.patch_size={value} cannot be set: {name} has no such argument")
    if unknown := sorted(arguments.keys() - taken):
        accepted = ", ".join(sorted(taken)) or "no arguments"
        raise UserError(f"backbone.{unknown[0]} cannot be set: {name} takes {accepted}")
    try:
        return cls(**own, **arguments)
    except UserError:
        raise
    except Exception as error:  # a constructor of one's own may raise anything
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}{inspect.signature(cls)} cannot be built: {text}") from None
