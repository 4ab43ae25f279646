"""Convolutional stems of vision transformers, made of timm's ConvStem and HybridEmbed."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.nn.backbones.families.whitening import SIGNS_ALONE, Whitening, responses

KERNEL = 3
NORMS = {"layer": "layernorm2d", "group": "groupnorm1", "batch": "batchnorm2d"}  # timm's names
OPTIONS = ("stem", "stem_channels", "stem_strides", "stem_kernels", "stem_norm_layer", "whiten", "whiten_signs")


@dataclass(frozen=True)
class StemOptions:
    """Convolutions in place of a ViT's patch projection: kernels, strides and channels of each layer.

    Each has a norm and a ReLU; a 1 x 1 convolution to the width of the tokens follows (Xiao et al. 2021, sec. 3). The
    patch is the product of the strides. norm: "layer" (over the channels of each pixel), "group" (over an image) or
    "batch". whiten: kernel of a `Whitening` in front, with `signs`; None without.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    kernels: tuple[int, ...]
    norm: str = "layer"
    whiten: int | None = None
    signs: bool = False

    @classmethod
    def of(cls, options: dict) -> StemOptions | None:
        """Return the stem of backbone arguments (OPTIONS); None for the patch projection.

        Raises UserError for options that do not fit one another.
        """
        given = {key: options[key] for key in OPTIONS if options.get(key) is not None}
        if given.pop("stem", "patch") == "patch":
            if given:
                raise UserError(
                    f"backbone.{next(iter(given))} belongs to a stem of convolutions: set backbone.stem=conv"
                )
            return None
        for key in ("stem_channels", "stem_strides"):
            if key not in given:
                raise UserError(
                    f"backbone.stem=conv lacks {key}: give one number per layer, such as "
                    "stem_channels=[48, 96] stem_strides=[2, 2]"
                )
        channels, strides = tuple(given["stem_channels"]), tuple(given["stem_strides"])
        kernels = tuple(given.get("stem_kernels") or (max(KERNEL, stride) for stride in strides))
        if not len(channels) == len(strides) == len(kernels) or min((*channels, *strides, *kernels), default=0) < 1:
            raise UserError(
                f"backbone.stem_channels={channels}, stem_strides={strides} and stem_kernels={kernels} do not fit: "
                "give each one positive number per layer"
            )
        for kernel, stride in zip(kernels, strides):
            if kernel != stride and (kernel < stride or kernel % 2 == 0):
                raise UserError(
                    f"backbone.stem_kernels={kernels} and stem_strides={strides} do not fit: a kernel is as wide as "
                    "its stride, or wider and odd"
                )
        norm = given.get("stem_norm_layer", "layer")
        if norm not in NORMS:
            raise UserError(f"backbone.stem_norm_layer={norm!r} is unknown: choose {', '.join(NORMS)}")
        if given.get("whiten_signs") and "whiten" not in given:
            raise UserError(SIGNS_ALONE)
        return cls(channels, strides, kernels, norm, given.get("whiten"), given.get("whiten_signs", False))

    @classmethod
    def of_network(cls, options: dict) -> StemOptions | None:
        """Return the stem of a built backbone of any family, from its arguments; None without convolutions."""
        return cls.of(options) if options.get("stem") == "conv" else None

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return math.prod(self.strides)

    def arguments(self, dim: int, in_chans: int) -> dict:
        """Return the arguments of timm's ConvStem for tokens of width `dim`."""
        paddings = (0 if kernel == stride else kernel // 2 for kernel, stride in zip(self.kernels, self.strides))
        return {
            "in_chans": in_chans,
            "depth": len(self.channels) + 1,
            "channels": (*self.channels, dim),
            "kernel_size": (*self.kernels, 1),
            "stride": (*self.strides, 1),
            "padding": (*paddings, 0),
            "norm_layer": NORMS[self.norm],
        }

    def embed_layer(self) -> Callable[..., nn.Module]:
        """Return the function that timm's VisionTransformer takes as `embed_layer`."""
        return functools.partial(conv_embed, stem=self)

    def code(self, dim: int, in_chans: int) -> list[str]:
        """Return Python lines that define `embed_layer` with timm alone."""
        whitened = ["from collections import OrderedDict", "from torch import nn"] * (self.whiten is not None)
        return [
            *whitened,
            "from functools import partial",
            "from timm.layers import HybridEmbed",
            "from timm.models.vision_transformer_hybrid import ConvStem",
            f"embed_layer = {self.expression(dim, in_chans)}",
        ]

    def expression(self, dim: int, in_chans: int) -> str:
        """Return the value of timm's `embed_layer` as a Python expression."""
        width = in_chans if self.whiten is None else responses(in_chans, self.whiten, self.signs)
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.arguments(dim, width).items())
        stem = f"ConvStem({arguments})"
        if self.whiten is not None:
            layers = [f"whiten=nn.Conv2d({in_chans}, {width}, {self.whiten}, padding='same', bias=False)"]
            layers += ["act=nn.ReLU()"] * self.signs + [f"stem={stem}"]
            stem = f"nn.Sequential(OrderedDict({', '.join(layers)}))"
        return f"partial(HybridEmbed, backbone={stem}, proj=False)"


def conv_embed(
    *,
    stem: StemOptions,
    img_size,
    in_chans: int,
    embed_dim: int,
    patch_size: int = 1,  # of the names, replaced by the strides
    bias: bool = True,
    device=None,
    dtype=None,
    **arguments,
) -> HybridEmbed:
    """Build the stem as timm's VisionTransformer calls an `embed_layer`."""
    width = in_chans
    layers = OrderedDict()
    if stem.whiten is not None:
        layers["whiten"] = Whitening(in_chans, stem.whiten, stem.signs)
        width = layers["whiten"].out_channels
    layers["stem"] = ConvStem(**stem.arguments(embed_dim, width), device=device, dtype=dtype)
    convolutions = layers["stem"] if stem.whiten is None else nn.Sequential(layers)
    embed = HybridEmbed(
        convolutions,
        img_size=img_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        proj=False,
        device=device,
        dtype=dtype,
        **arguments,
    )
    embed.feature_ratio = (stem.patch, stem.patch)  # timm's is rounded where an image is no multiple
    return embed


def total_patch(embed: nn.Module) -> tuple[int, int]:
    """Return the patch (h, w) of a `patch_embed` in pixels."""
    return tuple(embed.feat_ratio(as_scalar=False)) if isinstance(embed, HybridEmbed) else tuple(embed.patch_size)


def feature_patch(embed: HybridEmbed, patch_size: int | tuple[int, int], name: str) -> tuple[int, int]:
    """Return timm's `patch_size` of a hybrid, in positions of its feature map, for a patch in pixels.

    Raises UserError where the feature map has no such patch.
    """
    wanted = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if any(side % ratio for side, ratio in zip(wanted, embed.feature_ratio)):
        raise UserError(
            f"backbone.patch_size={patch_size} does not fit the stem of {name}: give a multiple of "
            f"{embed.feature_ratio[0]}"
        )
    patch = tuple(side // ratio for side, ratio in zip(wanted, embed.feature_ratio))
    if not isinstance(embed.proj, nn.Conv2d) and patch != (1, 1):
        raise UserError(
            f"backbone.patch_size={patch_size} does not fit {name}: its stem ends with patches of "
            f"{embed.feature_ratio[0]} pixels; leave it out"
        )
    return patch


def embed_patches(embed: nn.Module, images: Tensor) -> Tensor:
    """Embed images [B, C, H, W] as patch tokens [B, N, D] by a PatchEmbed of any image size, or a HybridEmbed.

    Convolutions run in channels-last memory: on a CPU 3 x 3 kernels are faster there (docs/performance.md), and tokens
    and norms over channels need no copy.
    """
    if isinstance(embed, HybridEmbed):
        return embed(images.contiguous(memory_format=torch.channels_last))
    return embed.norm(embed.proj(images).flatten(2).transpose(1, 2))
