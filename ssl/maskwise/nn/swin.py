"""timm's Swin Transformer as the backbone runs it: windows for any map, so that local crops pass the same network."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models import swin_transformer
from torch import Tensor, nn

CLASS = swin_transformer.SwinTransformer
BLOCKS = (swin_transformer.SwinTransformerBlock,)
ATTENTIONS = (swin_transformer.WindowAttention,)
MAPS = True
TAKES = {"image_size": "img_size", "patch_size": "patch_size"}
PLAIN = {"num_classes": 0, "drop_path_rate": 0.0, "global_pool": "", "strict_img_size": False}
CLASSIFIER = ("head.",)
MASKS = True
SHALLOW = {"depths": (1, 1, 1, 1)}
translate = swin_transformer.checkpoint_filter_fn
FAR = -100.0  # what keeps places apart that are neighbours only by the cyclic shift; the reference's value


def blocks(model: nn.Module) -> list:
    """The blocks of a timm model, in order."""
    return [block for stage in model.layers for block in stage.blocks]


def stages(model: nn.Module) -> list:
    """The blocks of each stage."""
    return [stage.blocks for stage in model.layers]


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules to keep, by timm's names, and the final norm."""
    return {"patch_embed": model.patch_embed, "layers": model.layers, "norm": model.norm}


def widths(model: nn.Module) -> list[int]:
    """Channels after the stem and after each stage."""
    return [model.patch_embed.proj.out_channels, *(stage.blocks[-1].norm2.weight.shape[0] for stage in model.layers)]


def strides(model: nn.Module) -> tuple[int, int]:
    """Pixels of the stem's patch, and the total stride."""
    first = model.patch_embed.patch_size[0]
    return first, first * 2 ** sum(not isinstance(stage.downsample, nn.Identity) for stage in model.layers)


def grid(side: int, patch: int, total: int) -> int:
    """Places along a side of so many pixels: patches leave a remainder out, merging rounds up."""
    return -(-(side // patch) // (total // patch))


def divisor(model: nn.Module) -> int:
    """What the sides of images must be multiples of."""
    return model.patch_embed.patch_size[0]


def stem(model: nn.Module, images: Tensor) -> Tensor:
    """Images [B, C, H, W] -> embedded patches [B, h, w, C]."""
    return model.patch_embed.norm(model.patch_embed.proj(images).permute(0, 2, 3, 1))


def hide(x: Tensor, mask: Tensor, token: Tensor, grid: tuple[int, int], merged: int) -> Tensor:
    """Embedded patches [B, h, w, C] with the token in place of all `merged` x `merged` of them that a hidden place of `mask` [B, N] covers
    (attmask.md fact 52); `grid` is that of the last map, which the mask is drawn on."""
    wide = mask.unflatten(1, grid)
    for dim in (1, 2):
        wide = wide.repeat_interleave(merged, dim=dim).narrow(dim, 0, x.shape[dim])
    return torch.where(wide.unsqueeze(-1), token, x)


def enter(model: nn.Module, stage: int, x: Tensor) -> Tensor:
    """What stands before a stage's blocks."""
    return model.layers[stage].downsample(x)


def pass_block(block: nn.Module, x: Tensor, scale: Tensor | None, cache: dict) -> Tensor:
    """A block of x [B, h, w, C]; scale [2, B, 1, 1] scales its two residual branches."""
    residual = attend(block.attn, block.norm1(x), any(block.target_shift_size), cache)
    x = x + (residual if scale is None else residual * scale[0].unsqueeze(-1))
    residual = block.mlp(block.norm2(x))
    return x + (residual if scale is None else residual * scale[1].unsqueeze(-1))


class Kind(NamedTuple):
    """What Swins differ in: (attn, x) -> q, k, v side by side; (attn, q, k) -> q, k and the scale of their products; attn -> what each offset adds."""

    project: Callable[[nn.Module, Tensor], Tensor]
    compare: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor, float]]
    offsets: Callable[[nn.Module], Tensor]


DOT = Kind(lambda attn, x: attn.qkv(x), lambda attn, q, k: (q, k, attn.scale), lambda attn: attn.relative_position_bias_table)


def attend(attn: nn.Module, x: Tensor, shifted: bool, cache: dict, kind: Kind = DOT) -> Tensor:
    """Attention inside windows of x [B, h, w, C] -> the same shape.

    A window is never wider than the map, and where it is as wide nothing is shifted. The map is padded with zeros to
    whole windows, then shifted, as the reference does; its places count as keys there, and here too.
    """
    sides = x.shape[1:3]
    window = tuple(min(size, side) for size, side in zip(attn.window_size, sides))
    shift = tuple(size // 2 if shifted and side > size else 0 for size, side in zip(window, sides))
    whole = tuple(-(-side // size) * size for size, side in zip(window, sides))
    x = F.pad(x, (0, 0, 0, whole[1] - sides[1], 0, whole[0] - sides[0]))
    if any(shift):
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    across = (whole[0] // window[0], whole[1] // window[1])
    qkv = kind.project(attn, x).unflatten(2, (across[1], window[1])).unflatten(1, (across[0], window[0]))  # [B, nh, wh, nw, ww, 3C]
    qkv = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(5, 0, 1, 3, 6, 2, 4, 7)  # [3, B, nh, nw, H, wh, ww, d]
    q, k, v = qkv.flatten(5, 6).flatten(2, 4)  # [B, windows * H, places, d]
    index, apart = tables(tuple(attn.window_size), window, shift, whole, x.device, cache)
    bias = kind.offsets(attn)[index].permute(2, 0, 1)  # [H, places, places]
    if apart is not None:
        bias = (bias + apart.unsqueeze(1)).flatten(0, 1)
    else:
        bias = bias.repeat(across[0] * across[1], 1, 1)
    q, k, scale = kind.compare(attn, q, k)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)
    mixed = mixed.unflatten(2, window).unflatten(1, (*across, attn.num_heads)).permute(0, 1, 4, 2, 5, 3, 6)
    x = attn.proj(mixed.reshape(x.shape[0], *whole, -1))
    if any(shift):
        x = torch.roll(x, shift, (1, 2))
    return x[:, : sides[0], : sides[1]]


def tables(built: tuple, window: tuple, shift: tuple, whole: tuple, device: torch.device, cache: dict) -> tuple[Tensor, Tensor | None]:
    """Rows of the relative positions' table, which was built for windows `built`, for each pair of places of a window, int64 [P, P];
    and FAR for pairs that only the shift brought together, [windows, P, P], None without a shift."""
    key = (built, window, shift, whole, device)
    if key not in cache:
        with torch.inference_mode(False), torch.no_grad():
            cache[key] = index_of(built, window).to(device), apart_of(window, shift, whole, device)
    return cache[key]


def index_of(built: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Where the table for windows of size `built` holds the offset between each pair of places of a window that is no larger."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in window)).reshape(-1, 2)
    offset = places[:, None] - places[None] + torch.tensor(built) - 1
    return offset[..., 0] * (2 * built[1] - 1) + offset[..., 1]


def apart_of(window: tuple, shift: tuple, whole: tuple, device) -> Tensor | None:
    """FAR between places of a shifted window that come from different ends of the map, [windows, P, P]; None without a shift."""
    if not any(shift):
        return None
    ends = []
    for size, step, side in zip(window, shift, whole):
        at = torch.arange(side)
        ends.append((at >= side - size).long() + (at >= side - step).long() if step else torch.zeros_like(at))
    region = 3 * ends[0][:, None] + ends[1]
    region = region.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0])).transpose(1, 2).flatten(2).flatten(0, 1)  # [windows, P]
    return torch.where(region[:, None] == region[:, :, None], 0.0, FAR).to(device)


def to_map(x: Tensor) -> Tensor:
    """A stage's output as [B, C, H, W]."""
    return x.permute(0, 3, 1, 2)
