"""Build a backbone from a timm name."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Literal

from maskwise.bounds import Rate, Size
from maskwise.errors import UserError
from maskwise.functional.resample import POSITION_MODES
from maskwise.nn.backbones.base import BackboneBase, BackboneOptions
from maskwise.nn.backbones.external import build_external, is_external
from maskwise.nn.backbones.families.base import FeatureMapFamily
from maskwise.nn.backbones.families.generic import GenericFamily
from maskwise.nn.backbones.feature_maps import FeatureMapBackbone
from maskwise.nn.backbones.generic import GenericBackbone
from maskwise.nn.backbones.pretrained import StateDict, read_state_dict
from maskwise.nn.backbones.timm_registry import build_timm_model, family_of
from maskwise.nn.backbones.transformer import TransformerBackbone
from maskwise.process.streams import print_notice


# named like a class because it is used like one: `Backbone(name)` is of one of three classes
def Backbone(  # noqa: N802
    name: str,
    *,
    image_size: Size | None = None,
    patch_size: Size | None = None,
    class_token: bool | None = None,
    position: Literal["offset", "size", "offset_always"] = "offset",
    drop_path: Rate = 0.0,
    mask_token: bool = False,
    weights: str | Path | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    **timm_args,
) -> BackboneBase:
    """Build the backbone of a timm name: images -> Tokens, before the final norm.

    Transformers (VisionTransformer, Eva) take images whose sides are multiples of the patch. Feature maps (ResNet,
    ConvNeXt, EfficientNet with MobileNet V1 and V2, Swin V1 and V2, MaxViT, PiT, ResMLP and MLP-Mixer) take images with
    sides of at least the total stride, MLPs those of `image_size` alone; the positions of the last map are the patches.
    Any other timm model runs as a whole (GenericBackbone), without masks and drop path, on the sizes that it takes.

    Args:
        name: a timm model name, or `module:Class` of your own network: images in, a map [B, C, h, w] or tokens
            [B, P + N, D] out, with P in its attribute `num_prefix_tokens` (none without it).
        image_size: native size, (h, w) or one side; None is timm's.
        patch_size: None is timm's.
        class_token: None is timm's choice.
        position: resampling of the position table: "offset", "size" or "offset_always" (functional.resample).
        drop_path: drop rate of the last block; it grows linearly from 0.
        mask_token: add the learned token that replaces masked patches.
        weights: local file of pretrained weights; without it weights are initialized as in the reference code.
        mean, std: input statistics for values in 0..1, one number per channel; None is ImageNet's, or those that the
            weights were trained with.
        timm_args: further arguments of the class.
    Raises UserError for an unknown or unsupported name, an argument or a file that does not fit.
    """
    pretrained = None if weights is None else read_state_dict(weights)
    backbone = build(
        BackboneOptions(
            name=name,
            image_size=image_size,
            patch_size=patch_size,
            class_token=class_token,
            position=position,
            drop_path=drop_path,
            mask_token=mask_token,
            pretrained=pretrained,
            mean=mean,
            std=std,
            timm_args=timm_args,
        )
    )
    if pretrained is not None:
        print_once(pretrained.report())
    return backbone


@functools.cache
def print_once(text: str) -> None:
    """Print one line on standard error; a run builds its backbone several times."""
    print_notice(text)


def pretrained_backbone(name: str, weights: StateDict, **options) -> BackboneBase:
    """Build a backbone with weights that are already read; `options` and errors as in `Backbone`."""
    names = {field.name for field in dataclasses.fields(BackboneOptions)}
    own = {key: value for key, value in options.items() if key in names}
    timm_args = {key: value for key, value in options.items() if key not in names}
    return build(BackboneOptions(name=name, pretrained=weights, timm_args=timm_args, **own))


def build(options: BackboneOptions) -> BackboneBase:
    """Build a backbone from its arguments, with pretrained weights that are already read; raises UserError as above."""
    mean, std = options.mean, options.std
    if options.position not in POSITION_MODES:
        raise UserError(f"backbone.position={options.position!r} is unknown: choose offset, size or offset_always")
    if not 0 <= options.drop_path < 1:
        raise UserError(
            f"backbone.drop_path={options.drop_path} is out of range: choose a rate of at least 0 and below 1"
        )
    if (mean is None) != (std is None) or mean is not None and len(mean) != len(std):
        raise UserError(f"mean={mean} and std={std} do not match: give both, with one number per channel")
    channels = {} if mean is None or len(mean) == 3 else {"in_chans": len(mean)}
    arguments = (options.image_size, options.patch_size, options.class_token, {**options.timm_args, **channels})
    if is_external(options.name):
        return GenericBackbone(build_external(options.name, *arguments), options)
    model = build_timm_model(options.name, *arguments)
    family = family_of(options.name)
    if isinstance(family, GenericFamily):
        return GenericBackbone(model, options)
    if isinstance(family, FeatureMapFamily):
        return FeatureMapBackbone(model, options)
    return TransformerBackbone(model, options)
