"""timm's MaxViT: convolution, attention in windows and over a grid, for any map size that these divide."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from timm.layers import RelPosBiasTf, RelPosMlp
from timm.models import maxxvit
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.nn.backbones.families.base import FeatureMapFamily, scale_residual
from maskwise.nn.backbones.families.convnext import token_norm
from maskwise.nn.backbones.families.swin import window_tables

CONVOLUTION = ("pre_norm", "down", "conv1_1x1", "norm1", "conv2_kxk", "se_early", "norm2", "se", "conv3_1x1")


class WindowedMap(NamedTuple):
    """A map [B, C, h, w] between blocks, and the last stage's sides: the maximum size of any window."""

    map: Tensor
    last_hw: tuple[int, int]


class MaxViTFamily(FeatureMapFamily):
    """The MaxViT models of timm's class MaxxVit; its other models have different blocks."""

    model_class = maxxvit.MaxxVit
    block_classes = (maxxvit.MaxxVitBlock,)
    block_parts = {
        "conv": (maxxvit.MbConvBlock,),
        "attn_block": (maxxvit.PartitionAttentionCl, type(None)),
        "attn_grid": (maxxvit.PartitionAttentionCl,),
    }
    timm_names = {"image_size": "img_size"}
    # no hidden layer after the pooling, and the norm before it
    timm_arguments = {"num_classes": 0, "drop_path_rate": 0.0, "head_hidden_size": 0}
    shallow_arguments = {"depths": (1, 1, 1, 1)}
    set_by_name = frozenset({"cfg"})
    branches = 5  # convolution, attention and MLP in windows, attention and MLP over the grid

    def translate(self, state: dict, model: nn.Module) -> dict:
        """Rename a pretrained state dict: the norm as without a hidden layer, tables resized to the model's windows."""
        state = {key.replace("head.norm.", "norm.", 1): value for key, value in state.items()}
        return maxxvit.checkpoint_filter_fn(state, model)

    def stages(self, model: nn.Module) -> list:
        """Return the blocks of each stage."""
        return [stage.blocks for stage in model.stages]

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules that a backbone adopts, and the final norm."""
        return {"stem": model.stem, "stages": model.stages, "norm": token_norm(model.norm)}

    def widths(self, model: nn.Module) -> list[int]:
        """Return the channels after the stem and after each stage."""
        return [model.stem.out_chs, *(stage.blocks[-1].attn_grid.norm2.weight.shape[0] for stage in model.stages)]

    def strides(self, model: nn.Module) -> tuple[int, int]:
        """Return 1 and the total stride."""
        return 1, 2 ** (1 + len(model.stages))

    def divisor(self, model: nn.Module) -> int:
        """Return the total stride, the divisor of image sides."""
        return self.strides(model)[1]

    def check_size(self, model: nn.Module, image_hw: tuple[int, int]) -> None:
        """Raise UserError for images whose last map is wider than the windows and no multiple of them."""
        built, unit = tuple(self.blocks(model)[-1].attn_grid.partition_size), self.divisor(model)
        if any(side > unit * size and side % (unit * size) for side, size in zip(image_hw, built)):
            pixels = "x".join(str(unit * size) for size in built)
            raise UserError(
                f"images of {image_hw[0]}x{image_hw[1]} pixels do not divide into the windows of {model.name}, "
                f"{pixels} pixels each: use multiples of these, smaller multiples of {unit}, or set backbone.image_size"
            )

    def stem(self, model: nn.Module, images: Tensor) -> WindowedMap:
        """Run the stem on images [B, C, H, W]."""
        return WindowedMap(model.stem(images), tuple(side // self.divisor(model) for side in images.shape[-2:]))

    def run_block(self, block: nn.Module, x: WindowedMap, factors: Tensor | None, cache: dict) -> WindowedMap:
        """Run a block; `factors` [5, B, 1, 1] scale its residual branches."""
        residual = x.map
        for name in CONVOLUTION:
            layer = getattr(block.conv, name)
            residual = residual if layer is None else layer(residual)
        y = (block.conv.shortcut(x.map) + scale_residual(residual, factors, 0)).permute(0, 2, 3, 1)  # [B, h, w, C]
        for part, branch in ((block.attn_block, 1), (block.attn_grid, 3)):
            if part is not None:
                residual = part.ls1(attend(part, part.norm1(y), x.last_hw, cache))
                y = y + scale_residual(residual, factors, branch)
                y = y + scale_residual(part.ls2(part.mlp(part.norm2(y))), factors, branch + 1)
        return WindowedMap(y.permute(0, 3, 1, 2), x.last_hw)

    def to_map(self, x: WindowedMap) -> Tensor:
        """Return a stage's output as [B, C, h, w]."""
        return x.map


def attend(part: nn.Module, x: Tensor, last_hw: tuple[int, int], cache: dict) -> Tensor:
    """Attend inside windows, or between equal positions of all cells of a grid: x [B, h, w, C] -> the same shape.

    A window, or a grid, is never wider than the last map, `last_hw`.
    """
    window = tuple(min(size, side) for size, side in zip(part.partition_size, last_hw))
    counts = tuple(side // size for side, size in zip(x.shape[1:3], window))
    if part.partition_block:
        order, outer, inner = (0, 1, 3, 2, 4, 5), counts, window
    else:
        order, outer, inner = (0, 2, 4, 1, 3, 5), window, counts
    # [B, windows h, windows w, position h, position w, C]
    tiles = x.unflatten(2, (outer[1], inner[1])).unflatten(1, (outer[0], inner[0])).permute(order)
    attn, shape = part.attn, tiles.shape
    qkv = attn.qkv(tiles.flatten(3, 4).flatten(0, 2))
    if attn.head_first:
        q, k, v = qkv.unflatten(-1, (attn.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
    else:
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [windows, H, positions, d]
    bias = None if attn.rel_pos is None else relative_bias(attn.rel_pos, window, cache).to(q.dtype)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attn.scale).transpose(1, 2).flatten(2)
    inverse = sorted(range(6), key=order.__getitem__)
    return attn.proj(mixed).reshape(*shape[:-1], -1).permute(inverse).flatten(3, 4).flatten(1, 2)


def relative_bias(rel_pos: nn.Module, window: tuple[int, int], cache: dict) -> Tensor:
    """Return the bias between each pair of positions, [H, positions, positions].

    A window smaller than the built one uses the middle of its table, where the same offsets are. A network that makes
    the table drops nothing in training.
    """
    built, parameter = tuple(rel_pos.window_size), next(rel_pos.parameters())
    index, _ = window_tables(built, window, (0, 0), window, parameter.device, cache)
    if isinstance(rel_pos, RelPosBiasTf):  # offsets are keys minus queries; elsewhere queries minus keys
        return rel_pos.relative_position_bias_table.flatten(1)[:, index.T]
    if not isinstance(rel_pos, RelPosMlp):
        return rel_pos.relative_position_bias_table[index].permute(2, 0, 1)
    mlp = rel_pos.mlp
    rows = mlp.fc2(mlp.norm(mlp.act(mlp.fc1(rel_pos.rel_coords_log.flatten(0, 1)))))
    table = rel_pos.bias_act(rows[index].permute(2, 0, 1))
    return table if rel_pos.bias_gain is None else rel_pos.bias_gain * table
