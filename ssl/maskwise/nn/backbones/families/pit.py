"""timm's Pooling-based Vision Transformer: stages of transformer blocks with strided convolutions between them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.layers import Attention
from timm.models import pit
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maskwise.functional.resample import position_table
from maskwise.nn.backbones.families.base import FeatureMapFamily
from maskwise.nn.backbones.families.vit import attention_residual, mlp_residual


class MapWithPrefix(NamedTuple):
    """Prefix tokens [B, P, D], internal to the network, and a map [B, h, w, D]."""

    prefix: Tensor
    map: Tensor


class PiTFamily(FeatureMapFamily):
    """timm's PoolingVisionTransformer; the class token stays internal, `class_token` False removes it."""

    model_class = pit.PoolingVisionTransformer
    block_classes = (Block,)
    attention_classes = (Attention,)
    stem_classes = (pit.ConvEmbedding,)
    timm_names = {"image_size": "img_size", "position": None, "class_token": None}
    shallow_arguments = {"depth": (1, 1, 1)}
    set_by_name = frozenset({"patch_size", "stride", "stem_type", "distilled"})
    classifier_prefixes = ("head.", "head_dist.")
    timm_pooling = "token"  # timm has no other for this class

    def translate(self, state: dict, model: nn.Module) -> dict:
        """Rename a pretrained state dict and resample its position table to the model's grid.

        Without a class token its parameters are left out.
        """
        state = pit.checkpoint_filter_fn(state, model)
        if model.cls_token is None:
            state = {key: value for key, value in state.items() if key != "cls_token" and ".pool.fc." not in key}
        if "pos_embed" in state:
            state["pos_embed"] = resample_table(state["pos_embed"], tuple(model.pos_embed.shape[-2:]), "size")
        return state

    def drop_class_token(self, model: nn.Module) -> None:
        """Remove the class token, and the layers between stages that only it uses."""
        model.cls_token = None
        for transformer in model.transformers:
            if transformer.pool is not None:
                transformer.pool.fc = nn.Identity()

    def stages(self, model: nn.Module) -> list:
        """Return the blocks of each stage."""
        return [transformer.blocks for transformer in model.transformers]

    def parts(self, model: nn.Module) -> dict[str, nn.Module | nn.Parameter | None]:
        """Return the modules and parameters that a backbone adopts, and the final norm."""
        names = ("patch_embed", "pos_embed", "cls_token", "transformers", "norm")
        return {name: getattr(model, name) for name in names}

    def widths(self, model: nn.Module) -> list[int]:
        """Return the channels after the stem and after each stage."""
        return [
            model.patch_embed.conv.out_channels,
            *(transformer.blocks[-1].norm2.weight.shape[0] for transformer in model.transformers),
        ]

    def strides(self, model: nn.Module) -> tuple[tuple[int, int], int]:
        """Return the stem's (patch size, stride) in pixels, and the total stride."""
        stride = model.patch_embed.conv.stride[0]
        return (model.patch_embed.conv.kernel_size[0], stride), stride * 2 ** (len(model.transformers) - 1)

    def grid_side(self, side: int, stem_patch: tuple[int, int], stride: int) -> int:
        """Return the last map's side: overlapping patches drop a remainder, every halving rounds up."""
        return -(-stem_side(side, stem_patch) * stem_patch[1] // stride)

    def position_table(self, model: nn.Module, image_hw: tuple[int, int]) -> Tensor:
        """Return the position table for an image size, [1, D, h, w]."""
        stem_patch, _ = self.strides(model)
        return resample_table(model.pos_embed, tuple(stem_side(side, stem_patch) for side in image_hw), model.position)

    def stem(self, model: nn.Module, images: Tensor) -> MapWithPrefix:
        """Embed the patches of images [B, C, H, W] with their positions, and add the class token if there is one."""
        x = model.patch_embed.conv(images) + self.position_table(model, tuple(images.shape[-2:]))
        x = x.permute(0, 2, 3, 1)
        prefix = x.new_zeros(1, 0, x.shape[-1]) if model.cls_token is None else model.cls_token
        return MapWithPrefix(prefix.expand(x.shape[0], -1, -1), x)

    def enter_stage(self, model: nn.Module, stage: int, x: MapWithPrefix) -> MapWithPrefix:
        """Run the pooling convolution before a stage's blocks."""
        pool = model.transformers[stage].pool
        if pool is None:
            return x
        halved = pool.conv(self.to_map(x)).permute(0, 2, 3, 1)
        if x.prefix.shape[1]:
            return MapWithPrefix(pool.fc(x.prefix), halved)
        return MapWithPrefix(halved.new_zeros(halved.shape[0], 0, halved.shape[-1]), halved)

    def run_block(self, block: nn.Module, x: MapWithPrefix, factors: Tensor | None, cache: dict) -> MapWithPrefix:
        """Run a block over all tokens; `factors` [2, B, 1, 1] scale its residual branches."""
        tokens = torch.cat([x.prefix, x.map.flatten(1, 2)], dim=1)
        residual, _, _ = attention_residual(block, tokens)
        tokens = tokens + (residual if factors is None else residual * factors[0])
        residual = mlp_residual(block, tokens)
        tokens = tokens + (residual if factors is None else residual * factors[1])
        count = x.prefix.shape[1]
        return MapWithPrefix(tokens[:, :count], tokens[:, count:].unflatten(1, x.map.shape[1:3]))

    def to_map(self, x: MapWithPrefix) -> Tensor:
        """Return a stage's output as [B, D, h, w]."""
        return x.map.permute(0, 3, 1, 2)


def stem_side(side: int, stem_patch: tuple[int, int]) -> int:
    """Return the number of stem patches, (size, stride), along an image side in pixels."""
    return (side - stem_patch[0]) // stem_patch[1] + 1


def resample_table(table: Tensor, grid: tuple[int, int], position: str) -> Tensor:
    """Resample a position table [1, D, h, w] to another grid."""
    rows = position_table(table.flatten(2).transpose(1, 2), tuple(table.shape[-2:]), grid, position)
    return rows.transpose(1, 2).unflatten(2, grid)
