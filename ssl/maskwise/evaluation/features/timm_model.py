"""A timm model as an encoder, so that models that were not trained here can be evaluated."""

from __future__ import annotations

import math

from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.nn.backbones.families.conv_stem import total_patch
from maskwise.nn.encoder import CROP_PCT, Transform
from maskwise.nn.tokens import Features


def is_timm_model(model) -> bool:
    """Return whether a module has the interface of timm's classifiers."""
    methods = ("forward_features", "forward_head", "pretrained_cfg", "num_features")
    return isinstance(model, nn.Module) and all(hasattr(model, name) for name in methods)


class TimmModel(nn.Module):
    """A timm model in the form of an encoder: normalized images [B, C, H, W] -> Features without attention.

    The pooled vector is timm's own (`forward_head(pre_logits=True)`), patches are the last map or the tokens without
    prefix. Size, mean, std and crop are those of the model's pretrained tag, with the evaluation transform of this
    package. feature_terms: the features that it has. Raises UserError where the tag lacks mean or size.
    """

    feature_terms = ("pooled", "patch_mean", "patches")

    def __init__(self, model: nn.Module):
        super().__init__()
        config, name = model.pretrained_cfg or {}, type(model).__name__
        if not config.get("input_size") or not config.get("mean") or not config.get("std"):
            raise UserError(
                f"this {name} does not state its image size, mean and std (timm's pretrained_cfg); set them"
            )
        self.model = model
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        channels = next((part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d)), len(self.mean))
        if channels != len(self.mean):
            raise UserError(
                f"this {name} takes {channels} channels and its pretrained_cfg has a mean of {len(self.mean)}; set "
                f"mean and std of {channels} values in pretrained_cfg"
            )
        if hasattr(model, "cls_token") and not hasattr(model, "num_prefix_tokens"):  # PiT returns the class token alone
            raise UserError(f"this {name} returns no patches; give its weights file to maskwise.load")
        embed = getattr(model, "patch_embed", None)
        self.image_size = tuple(getattr(embed, "img_size", None) or config["input_size"][-2:])
        self.patch_size = (1, 1) if embed is None else total_patch(embed)
        self.only_size = tuple(embed.img_size) if getattr(embed, "strict_img_size", False) else None
        self.crop_pct = config.get("crop_pct") or CROP_PCT
        self.patch_dim = model.num_features
        self.dim = getattr(model, "head_hidden_size", None) or model.num_features

    @property
    def transform(self) -> Transform:
        """Evaluation transform at the model's size."""
        return Transform(self.image_size, self.crop_pct, self.mean, self.std)

    def uint8_crop(self, image) -> Tensor:
        """Resize and crop as `transform` does, without normalization."""
        return self.transform.crop(image)

    def forward(self, images: Tensor, mask: None = None, **requests) -> Features:
        """Map images to Features; attention, keys and layers are not computed."""
        if self.only_size not in (None, tuple(images.shape[-2:])):
            height, width = self.only_size
            raise UserError(
                f"this {type(self.model).__name__} takes images of {height}x{width} pixels only; create it with "
                "dynamic_img_size=True"
            )
        output = self.model.forward_features(images)
        pooled = self.model.forward_head(output, pre_logits=True)
        if output.ndim == 4:
            maps = output if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else output.movedim(1, -1)
            return Features(pooled, maps.flatten(1, 2), None, tuple(maps.shape[1:3]))
        patches = output[:, getattr(self.model, "num_prefix_tokens", 0) :]
        side = math.isqrt(patches.shape[1])
        return Features(pooled, patches, None, (side, patches.shape[1] // max(1, side)))
