"""timm's MaxViT as the backbone runs it: a convolution, attention inside windows and attention over a grid, for any map that they divide."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from timm.layers import RelPosBiasTf, RelPosMlp
from timm.models import maxxvit
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.nn import swin
from maskwise.nn.convnext import of_tokens

CLASS = maxxvit.MaxxVit
BLOCKS = (maxxvit.MaxxVitBlock,)
PIECES = {  # what a block is made of; other families of this class of timm's have other blocks, or other pieces in them
    "conv": (maxxvit.MbConvBlock,), "attn_block": (maxxvit.PartitionAttentionCl, type(None)), "attn_grid": (maxxvit.PartitionAttentionCl,),
}  # fmt: skip
BRANCHES = 5  # of a block: the convolution, attention and MLP in windows, attention and MLP over the grid
MAPS = True
TAKES = {"image_size": "img_size"}
NAMED = {"cfg"}  # what timm's names settle
PLAIN = {"num_classes": 0, "drop_path_rate": 0.0, "head_hidden_size": 0}  # no layer behind the pooling, and the norm before it
CLASSIFIER = ("head.",)
MASKS = False
SHALLOW = {"depths": (1, 1, 1, 1)}
CONVOLUTION = ("pre_norm", "down", "conv1_1x1", "norm1", "conv2_kxk", "se_early", "norm2", "se", "conv3_1x1")


class Windowed(NamedTuple):
    """What passes through the blocks: a map [B, C, h, w], and the sides of the last stage's map, which no window is wider than."""

    map: Tensor
    last: tuple[int, int]


def translate(state: dict, model: nn.Module) -> dict:
    """A file's tensors with the norm where it stands without a hidden layer, tables resampled to the model's windows."""
    return maxxvit.checkpoint_filter_fn({key.replace("head.norm.", "norm.", 1): value for key, value in state.items()}, model)


def blocks(model: nn.Module) -> list:
    """The blocks of a timm model, in order."""
    return [block for stage in model.stages for block in stage.blocks]


def stages(model: nn.Module) -> list:
    """The blocks of each stage."""
    return [stage.blocks for stage in model.stages]


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules to keep, by timm's names, and the final norm."""
    return {"stem": model.stem, "stages": model.stages, "norm": of_tokens(model.norm)}


def widths(model: nn.Module) -> list[int]:
    """Channels after the stem and after each stage."""
    return [model.stem.out_chs, *(stage.blocks[-1].attn_grid.norm2.weight.shape[0] for stage in model.stages)]


def strides(model: nn.Module) -> tuple[int, int]:
    """Pixels of the stem's patch, or 1, and the total stride."""
    return 1, 2 ** (1 + len(model.stages))


def grid(side: int, patch: int, total: int) -> int:
    """Places along a side of so many pixels."""
    return side // total


def divisor(model: nn.Module) -> int:
    """What the sides of images must be multiples of."""
    return strides(model)[1]


def check(model: nn.Module, image_hw: tuple[int, int]) -> None:
    """Raises UserError for images whose last map is wider than the windows and no multiple of them."""
    built, unit = window_of(model), divisor(model)
    if any(side > unit * size and side % (unit * size) for side, size in zip(image_hw, built)):
        most = "x".join(str(unit * size) for size in built)
        raise UserError(
            f"images of {image_hw[0]}x{image_hw[1]} pixels do not divide into the windows of {model.name}, which are those of {most} pixels: "
            f"take multiples of these, or of {unit} below them, or set backbone.image_size"
        )


def window_of(model: nn.Module) -> tuple[int, int]:
    """The window that the model was built with."""
    return tuple(blocks(model)[-1].attn_grid.partition_size)


def stem(model: nn.Module, images: Tensor) -> Windowed:
    """Images [B, C, H, W] -> the stem's map."""
    return Windowed(model.stem(images), tuple(side // divisor(model) for side in images.shape[-2:]))


def enter(model: nn.Module, stage: int, x: Windowed) -> Windowed:
    """Nothing stands before a stage's blocks."""
    return x


def pass_block(block: nn.Module, x: Windowed, scale: Tensor | None, cache: dict) -> Windowed:
    """A block; scale [5, B, 1, 1] scales its residual branches."""

    def kept(branch: Tensor, index: int) -> Tensor:
        return branch if scale is None else branch * scale[index].unsqueeze(-1)

    branch = x.map
    for name in CONVOLUTION:
        layer = getattr(block.conv, name)
        branch = branch if layer is None else layer(branch)
    places = (block.conv.shortcut(x.map) + kept(branch, 0)).permute(0, 2, 3, 1)
    for piece, first in ((block.attn_block, 1), (block.attn_grid, 3)):
        if piece is not None:
            places = places + kept(piece.ls1(attend(piece, piece.norm1(places), x.last, cache)), first)
            places = places + kept(piece.ls2(piece.mlp(piece.norm2(places))), first + 1)
    return Windowed(places.permute(0, 3, 1, 2), x.last)


def attend(piece: nn.Module, x: Tensor, last: tuple[int, int], cache: dict) -> Tensor:
    """Attention of x [B, h, w, C] between the places of a window, or between those that have the same place in their cell of a grid -> the same shape.

    A window, and a grid, is never wider than the last map, `last`.
    """
    window = tuple(min(size, side) for size, side in zip(piece.partition_size, last))
    across = tuple(side // size for side, size in zip(x.shape[1:3], window))
    order = (0, 1, 3, 2, 4, 5) if piece.partition_block else (0, 2, 4, 1, 3, 5)  # [B, windows, windows, place, place, C]
    outer, inner = (across, window) if piece.partition_block else (window, across)
    tiles = x.unflatten(2, (outer[1], inner[1])).unflatten(1, (outer[0], inner[0])).permute(order)
    attn, shape = piece.attn, tiles.shape
    qkv = attn.qkv(tiles.flatten(3, 4).flatten(0, 2))
    if attn.head_first:
        q, k, v = qkv.unflatten(-1, (attn.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
    else:
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [windows, H, places, d]
    bias = None if attn.rel_pos is None else bias_of(attn.rel_pos, window, cache).to(q.dtype)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attn.scale).transpose(1, 2).flatten(2)
    back = sorted(range(6), key=order.__getitem__)
    return attn.proj(mixed).reshape(*shape[:-1], -1).permute(back).flatten(3, 4).flatten(1, 2)


def bias_of(rel_pos: nn.Module, window: tuple[int, int], cache: dict) -> Tensor:
    """What the offset between each pair of places adds to the logits, [H, places, places]: for a window that is smaller than the built one
    the middle of its table, where the same offsets stand. A network that makes the table drops nothing while it trains."""
    built, tensor = tuple(rel_pos.window_size), next(rel_pos.parameters())
    index, _ = swin.tables(built, window, (0, 0), window, tensor.device, cache)
    if isinstance(rel_pos, RelPosBiasTf):  # keys minus queries, where the others have queries minus keys
        return rel_pos.relative_position_bias_table.flatten(1)[:, index.T]
    if not isinstance(rel_pos, RelPosMlp):
        return rel_pos.relative_position_bias_table[index].permute(2, 0, 1)
    mlp = rel_pos.mlp
    rows = mlp.fc2(mlp.norm(mlp.act(mlp.fc1(rel_pos.rel_coords_log.flatten(0, 1)))))
    table = rel_pos.bias_act(rows[index].permute(2, 0, 1))
    return table if rel_pos.bias_gain is None else rel_pos.bias_gain * table


def to_map(x: Windowed) -> Tensor:
    """A stage's output as [B, C, H, W]."""
    return x.map
