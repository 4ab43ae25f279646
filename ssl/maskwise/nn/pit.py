"""timm's Pooling-based Vision Transformer as the backbone runs it: stages of transformer blocks with strided convolutions between them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.layers import Attention
from timm.models import pit
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maskwise.functional.resample import position_table
from maskwise.nn import vit

CLASS = pit.PoolingVisionTransformer
BLOCKS = (Block,)
ATTENTIONS = (Attention,)
STEMS = (pit.ConvEmbedding,)
MAPS = True
TAKES = {"image_size": "img_size", "position": None, "class_token": None}  # None: ours, no argument of timm's
NAMED = {"patch_size", "stride", "stem_type", "distilled"}  # what timm's names settle
PLAIN = {"num_classes": 0, "drop_path_rate": 0.0}
POOL = "token"  # timm's only global pooling for it
CLASSIFIER = ("head.", "head_dist.")
MASKS = False
SHALLOW = {"depth": (1, 1, 1)}


class Places(NamedTuple):
    """What passes through the blocks: tokens of no place [B, P, D], which are not handed out, and a map [B, h, w, D]."""

    front: Tensor
    map: Tensor


def translate(state: dict, model: nn.Module) -> dict:
    """A file's tensors under timm's names, the position table resampled to the model's grid, and without what a missing class token leaves idle."""
    state = pit.checkpoint_filter_fn(state, model)
    if model.cls_token is None:
        state = {key: value for key, value in state.items() if key != "cls_token" and ".pool.fc." not in key}
    if "pos_embed" in state:
        state["pos_embed"] = resampled(state["pos_embed"], tuple(model.pos_embed.shape[-2:]), "size")
    return state


def drop_class_token(model: nn.Module) -> None:
    """Leave the class token out, and the layers between the stages that it alone passes."""
    model.cls_token = None
    for transformer in model.transformers:
        if transformer.pool is not None:
            transformer.pool.fc = nn.Identity()


def blocks(model: nn.Module) -> list:
    """The blocks of a timm model, in order."""
    return [block for transformer in model.transformers for block in transformer.blocks]


def stages(model: nn.Module) -> list:
    """The blocks of each stage."""
    return [transformer.blocks for transformer in model.transformers]


def parts(model: nn.Module) -> dict[str, nn.Module | nn.Parameter | None]:
    """The modules and tables to keep, by timm's names, and the final norm."""
    return {name: getattr(model, name) for name in ("patch_embed", "pos_embed", "cls_token", "transformers", "norm")}


def widths(model: nn.Module) -> list[int]:
    """Channels after the stem and after each stage."""
    return [model.patch_embed.conv.out_channels, *(transformer.blocks[-1].norm2.weight.shape[0] for transformer in model.transformers)]


def strides(model: nn.Module) -> tuple[tuple[int, int], int]:
    """Pixels of the stem's patch and from one patch to the next, and the total stride."""
    step = model.patch_embed.conv.stride[0]
    return (model.patch_embed.conv.kernel_size[0], step), step * 2 ** (len(model.transformers) - 1)


def grid(side: int, patch: tuple[int, int], total: int) -> int:
    """Places along a side of so many pixels: overlapping patches leave a remainder out, every halving rounds up."""
    return -(-stem_grid(side, patch) * patch[1] // total)


def stem_grid(side: int, patch: tuple[int, int]) -> int:
    """Patches along a side of so many pixels."""
    return (side - patch[0]) // patch[1] + 1


def divisor(model: nn.Module) -> int:
    """What the sides of images must be multiples of."""
    return 1


def resampled(table: Tensor, size: tuple[int, int], position: str) -> Tensor:
    """A position table [1, D, h, w] on another grid."""
    rows = position_table(table.flatten(2).transpose(1, 2), tuple(table.shape[-2:]), size, position)
    return rows.transpose(1, 2).unflatten(2, size)


def table_for(model: nn.Module, image_hw: tuple[int, int]) -> Tensor:
    """The position table that images of that size in pixels get, [1, D, h, w]."""
    return resampled(model.pos_embed, tuple(stem_grid(side, strides(model)[0]) for side in image_hw), model.position)


def stem(model: nn.Module, images: Tensor) -> Places:
    """Images [B, C, H, W] -> embedded patches with their positions, and the class token where it is kept."""
    x = (model.patch_embed.conv(images) + table_for(model, tuple(images.shape[-2:]))).permute(0, 2, 3, 1)
    front = x.new_zeros(1, 0, x.shape[-1]) if model.cls_token is None else model.cls_token
    return Places(front.expand(x.shape[0], -1, -1), x)


def enter(model: nn.Module, stage: int, x: Places) -> Places:
    """What stands before a stage's blocks."""
    pool = model.transformers[stage].pool
    if pool is None:
        return x
    halved = pool.conv(to_map(x)).permute(0, 2, 3, 1)
    return Places(pool.fc(x.front) if x.front.shape[1] else halved.new_zeros(halved.shape[0], 0, halved.shape[-1]), halved)


def pass_block(block: nn.Module, x: Places, scale: Tensor | None, cache: dict) -> Places:
    """A block over all tokens; scale [2, B, 1, 1] scales its two residual branches."""
    tokens = torch.cat([x.front, x.map.flatten(1, 2)], dim=1)
    residual = vit.attention_branch(block, tokens, None, 0)[0]
    tokens = tokens + (residual if scale is None else residual * scale[0])
    residual = vit.mlp_branch(block, tokens)
    tokens = tokens + (residual if scale is None else residual * scale[1])
    count = x.front.shape[1]
    return Places(tokens[:, :count], tokens[:, count:].unflatten(1, x.map.shape[1:3]))


def to_map(x: Places) -> Tensor:
    """A stage's output as [B, D, H, W]."""
    return x.map.permute(0, 3, 1, 2)
