"""Find, check and build timm models; errors name the nearest supported model."""

from __future__ import annotations

import difflib
import functools
import re
import warnings
from typing import NoReturn

import torch
from torch import nn

from maskwise.compat import ready_torchvision
from maskwise.errors import UserError

ready_torchvision()
import timm  # noqa: E402
from timm.models import FeatureListNet  # noqa: E402

from maskwise.nn.backbones.families.base import Family  # noqa: E402
from maskwise.nn.backbones.families.conv_stem import feature_patch  # noqa: E402
from maskwise.nn.backbones.families.convnext import ConvNeXtFamily  # noqa: E402
from maskwise.nn.backbones.families.efficientnet import EfficientNetFamily  # noqa: E402
from maskwise.nn.backbones.families.eva import EvaFamily  # noqa: E402
from maskwise.nn.backbones.families.generic import GenericFamily, generic_family  # noqa: E402
from maskwise.nn.backbones.families.maxvit import MaxViTFamily  # noqa: E402
from maskwise.nn.backbones.families.mlp_mixer import MLPMixerFamily  # noqa: E402
from maskwise.nn.backbones.families.pit import PiTFamily  # noqa: E402
from maskwise.nn.backbones.families.resnet import ResNetFamily  # noqa: E402
from maskwise.nn.backbones.families.swin import SwinFamily  # noqa: E402
from maskwise.nn.backbones.families.swin_v2 import SwinV2Family  # noqa: E402
from maskwise.nn.backbones.families.vit import ViTFamily  # noqa: E402

# timm class name -> family
FAMILIES: dict[str, Family] = {
    "VisionTransformer": ViTFamily(),
    "Eva": EvaFamily(),
    "ResNet": ResNetFamily(),
    "ConvNeXt": ConvNeXtFamily(),
    "SwinTransformer": SwinFamily(),
    "SwinTransformerV2": SwinV2Family(),
    "PoolingVisionTransformer": PiTFamily(),
    "MlpMixer": MLPMixerFamily(),
    "EfficientNet": EfficientNetFamily(),
    "MaxxVit": MaxViTFamily(),
}
# timm file that holds models of the class -> timm class name
CLASS_OF_FILE = {
    "vision_transformer": "VisionTransformer",
    "vision_transformer_hybrid": "VisionTransformer",
    "vitamin": "VisionTransformer",
    "deit": "VisionTransformer",
    "eva": "Eva",
    "resnet": "ResNet",
    "convnext": "ConvNeXt",
    "swin_transformer": "SwinTransformer",
    "swin_transformer_v2": "SwinTransformerV2",
    "pit": "PoolingVisionTransformer",
    "mlp_mixer": "MlpMixer",
    "efficientnet": "EfficientNet",
    "maxxvit": "MaxxVit",
}
HYBRID_FILES = ("vision_transformer_hybrid", "vitamin")  # whose names hold a stem of convolutions
DOWNLOADS = "timm cannot open it without downloading a ResNet for its stem"
# timm file or model -> why it cannot even run as a whole (GenericBackbone)
REFUSED = {
    "coat": "it returns the tokens of several scales, each with a class token",
    "crossvit": "it returns the tokens of two patch sizes, each with a class token",
    "efficientvim": "it returns a list of maps, and the states of its layers",
    "vit_small_resnet26d_224": DOWNLOADS,
    "vit_small_resnet50d_s16_224": DOWNLOADS,
    "vit_base_resnet26d_224": DOWNLOADS,
    "vit_base_resnet50d_224": DOWNLOADS,
}
DEFAULT_FAMILY = FAMILIES["VisionTransformer"]
FALLBACK = "vit_small_patch16_224"
# timm arguments that are refused -> the reason or the argument to use instead
REFUSED_ARGUMENTS = {
    "num_classes": "there is no classifier",
    "global_pool": "the encoder's pooling does that",
    "img_size": "use image_size",
    "drop_path_rate": "use drop_path",
    "pretrained": "use weights=FILE",
    "dynamic_img_size": "any image size is accepted",
    "dynamic_img_pad": "resize the images instead",
    "drop_rate": "only drop_path is keyed by sample",
    "pos_drop_rate": "only drop_path is keyed by sample",
    "patch_drop_rate": "only drop_path is keyed by sample",
    "proj_drop_rate": "only drop_path is keyed by sample",
    "attn_drop_rate": "only drop_path is keyed by sample",
    "drop_block_rate": "only drop_path is keyed by sample",
    "strict_img_size": "any image size is accepted",
    "always_partition": "windows are never wider than the map",
    "rope_shift_coords": "crops shift the patches already",
    "rope_jitter_coords": "crops scale the patches already",
    "rope_rescale_coords": "crops scale the patches already",
    "weight_init": "initialization follows the reference code",
    "fix_init": "initialization follows the reference code",
}


def build_timm_model(
    name: str,
    image_size: int | tuple[int, int] | None,
    patch_size: int | tuple[int, int] | None,
    class_token: bool | None,
    timm_args: dict,
) -> nn.Module:
    """Build the bare timm model; raises UserError in one line where it cannot be built or is not supported."""
    check_name(name)
    timm_args = dict(timm_args)
    if refused := sorted(set(timm_args) & set(REFUSED_ARGUMENTS)):
        raise UserError(f"backbone.{refused[0]} cannot be set: {REFUSED_ARGUMENTS[refused[0]]}")
    check_not_refused(name)
    family = family_of(name) or DEFAULT_FAMILY
    sizes = {"image_size": image_size, "patch_size": patch_size, "class_token": class_token}
    extra = {key: timm_args.pop(key) for key in family.extra_arguments if key in timm_args}
    sizes, from_extra = family.constructor_arguments(sizes, extra)
    if timm_file(name) in HYBRID_FILES:
        if "embed_layer" in from_extra:
            raise UserError(f"backbone.stem={extra['stem']} cannot be set: the stem is part of the name {name}")
        native = build_on_meta(name).patch_embed
        if sizes["patch_size"] is not None:
            sizes["patch_size"] = feature_patch(native, sizes["patch_size"], name)
    options = timm_options(name, family, sizes) | from_extra
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm warns of its own renamed models
            model = timm.create_model(name, pretrained=False, **family.timm_arguments, **options, **timm_args)
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise_build_error(name, {**options, **timm_args}, error)
    if isinstance(family, GenericFamily):
        return model
    check_supported(name, model)
    if timm_file(name) in HYBRID_FILES:
        model.patch_embed.feature_ratio = native.feature_ratio  # timm's is rounded where an image is no multiple
    if extra:
        family.apply_extra_arguments(model, **extra)
    if class_token is False:
        family.drop_class_token(model)
    return model


@functools.cache
def family_of(name: str) -> Family | None:
    """Return the adapter of a timm model: its own family's, else the generic one; None for an unknown name."""
    if not timm.is_model(name) or refusal(name) is not None:
        return None
    own, model = FAMILIES.get(CLASS_OF_FILE.get(timm_file(name), "")), build_shallow(name)
    if own is not None and unsupported_reason(model) is None:
        return own
    return None if model is None else generic_family(type(model))


def timm_options(name: str, family: Family, arguments: dict) -> dict:
    """Translate sizes and class token to the timm class's arguments; raises UserError for unsupported ones."""
    options = {}
    for key, value in arguments.items():
        if key in family.timm_names:
            if value is not None and family.timm_names[key]:
                options[family.timm_names[key]] = tuple(value) if isinstance(value, list) else value
        elif value and key != "image_size":  # feature maps take any image size
            raise UserError(f"backbone.{key}={value} cannot be set: {name} has no {key.replace('_', ' ')}")
    return options


def extra_arguments(name: str) -> dict[str, type]:
    """Return the arguments that a model's family adds to timm's, with their types."""
    family = family_of(name)
    return {} if family is None else dict(family.extra_arguments)


def timm_class(name: str) -> type:
    """Return the timm class whose constructor takes a recipe's further arguments."""
    return (family_of(name) or DEFAULT_FAMILY).model_class


def refusal(name: str) -> str | None:
    """Return why a timm model cannot be a backbone; None if it can."""
    return REFUSED.get(name) or REFUSED.get(timm_file(name))


def check_not_refused(name: str) -> None:
    """Raise UserError for a model that no adapter takes, and name the nearest that one does."""
    reason = refusal(name)
    if reason is None:
        return
    near = difflib.get_close_matches(name, timm.list_models(), 20, 0.5)
    nearest = next((other for other in near if refusal(other) is None), FALLBACK)
    raise UserError(f"{name} is not supported: {reason}; the nearest is {nearest}")


def check_name(name: str) -> None:
    """Raise UserError for a name unknown to timm."""
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), 3, 0.5)
    hint = f"the nearest are {', '.join(near)}" if near else f"an example is {FALLBACK}"
    raise UserError(f"timm has no model {name!r}; {hint}")


def timm_file(name: str) -> str:
    """Return the name of the timm file that holds a model."""
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def build_on_meta(name: str, **options) -> nn.Module | None:
    """Build a model with timm's defaults on the meta device; None where that fails."""
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return timm.create_model(name, pretrained=False, **options)
    except Exception:  # models of other families may raise anything without storage
        return None


def build_shallow(name: str) -> nn.Module | None:
    """Build a model with the fewest blocks that show its parts, on the meta device."""
    own = FAMILIES.get(CLASS_OF_FILE.get(timm_file(name), ""))
    model = build_on_meta(name, **own.shallow_arguments) if own and own.shallow_arguments else None
    return build_on_meta(name) if model is None else model


def unsupported_reason(model: nn.Module | None) -> str | None:
    """Return why a timm model has no family of its own (masks, drop path, stages); None if it has."""
    if model is None:
        return "it is of another family"
    family = FAMILIES.get(type(model).__name__)
    if family is None or type(model) is not family.model_class:
        return f"its class is {type(model).__name__}"
    for block in family.blocks(model):
        if type(block) not in family.block_classes:
            return f"its blocks are {type(block).__name__}"
        if hasattr(block, "attn") and type(block.attn) not in family.attention_classes:
            return f"its attention is {type(block.attn).__name__}"
        for name, classes in family.block_parts.items():
            if type(getattr(block, name)) not in classes:
                return f"its blocks are made of {type(getattr(block, name)).__name__}"
    if hasattr(model, "patch_embed") and type(model.patch_embed) not in family.stem_classes:
        return f"its stem is {type(model.patch_embed).__name__}"
    if isinstance(getattr(getattr(model, "patch_embed", None), "backbone", None), FeatureListNet):
        return DOWNLOADS
    return None


@functools.lru_cache(maxsize=1)
def candidate_names() -> tuple[str, ...]:
    """Return the names in timm's files of the families; some run as a whole."""
    return tuple(name for name in timm.list_models() if timm_file(name) in CLASS_OF_FILE)


def supported_models() -> dict[tuple[str, str], list[str]]:
    """Return {(timm file, "by blocks" or "whole"): names} of all models that can be a backbone."""
    models: dict[tuple[str, str], list[str]] = {}
    for name in timm.list_models():
        file = timm_file(name)
        if refusal(name) is not None:
            continue
        own = file in CLASS_OF_FILE and unsupported_reason(build_shallow(name)) is None
        models.setdefault((file, "by blocks" if own else "whole"), []).append(name)
    return models


def check_supported(name: str, model: nn.Module | None) -> None:
    """Raise UserError for arguments that take a model out of its family."""
    reason = unsupported_reason(model)
    if reason is not None:
        raise UserError(f"{name} is not supported with these arguments: {reason}; leave them out")


def raise_build_error(name: str, options: dict, error: Exception) -> NoReturn:
    """Raise the UserError for an exception of timm's constructor."""
    if repeated := re.search(r"multiple values for keyword argument '(\w+)'", str(error)):
        raise UserError(
            f"backbone.{repeated[1]} cannot be set: it is part of the name {name}; choose another name"
        ) from None
    lines = str(error).splitlines()
    text = re.sub(r"^\w+\.__init__\(\) ", "", lines[0]) if lines else type(error).__name__
    arguments = ", ".join(f"{key}={value}" for key, value in options.items()) or "these arguments"
    raise UserError(f"timm cannot build {name} with {arguments}: {text}") from None
