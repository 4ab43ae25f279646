"""timm's Swin Transformer: window attention for maps of any size, so that local crops pass the same network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models import swin_transformer
from torch import Tensor, nn

from maskwise.nn.backbones.families.base import FeatureMapFamily, scale_residual

# added to logits between positions that only the cyclic shift made neighbors; the value of the reference
SHIFT_MASK = -100.0


class SwinFamily(FeatureMapFamily):
    """timm's Swin Transformer; maps are [B, h, w, C] between blocks."""

    model_class = swin_transformer.SwinTransformer
    block_classes = (swin_transformer.SwinTransformerBlock,)
    attention_classes = (swin_transformer.WindowAttention,)
    timm_names = {"image_size": "img_size", "patch_size": "patch_size"}
    timm_arguments = {"num_classes": 0, "drop_path_rate": 0.0, "global_pool": "", "strict_img_size": False}
    shallow_arguments = {"depths": (1, 1, 1, 1)}
    supports_masking = True

    def translate(self, state: dict, model: nn.Module) -> dict:
        """Rename a pretrained state dict to timm's current keys."""
        return swin_transformer.checkpoint_filter_fn(state, model)

    def stages(self, model: nn.Module) -> list:
        """Return the blocks of each stage."""
        return [stage.blocks for stage in model.layers]

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules that a backbone adopts, and the final norm."""
        return {"patch_embed": model.patch_embed, "layers": model.layers, "norm": model.norm}

    def widths(self, model: nn.Module) -> list[int]:
        """Return the channels after the stem and after each stage."""
        return [
            model.patch_embed.proj.out_channels,
            *(stage.blocks[-1].norm2.weight.shape[0] for stage in model.layers),
        ]

    def strides(self, model: nn.Module) -> tuple[int, int]:
        """Return the stem's patch in pixels and the total stride."""
        patch = model.patch_embed.patch_size[0]
        return patch, patch * 2 ** sum(not isinstance(stage.downsample, nn.Identity) for stage in model.layers)

    def grid_side(self, side: int, stem_patch: int, stride: int) -> int:
        """Return the last map's side: patches drop a remainder, merging rounds up."""
        return -(-(side // stem_patch) // (stride // stem_patch))

    def divisor(self, model: nn.Module) -> int:
        """Return the patch size, the divisor of image sides."""
        return model.patch_embed.patch_size[0]

    def stem(self, model: nn.Module, images: Tensor) -> Tensor:
        """Embed the patches of images [B, C, H, W] -> [B, h, w, C]."""
        return model.patch_embed.norm(model.patch_embed.proj(images).permute(0, 2, 3, 1))

    def enter_stage(self, model: nn.Module, stage: int, x: Tensor) -> Tensor:
        """Run the patch merging before a stage's blocks."""
        return model.layers[stage].downsample(x)

    def run_block(self, block: nn.Module, x: Tensor, factors: Tensor | None, cache: dict) -> Tensor:
        """Run a block on x [B, h, w, C]; `factors` [2, B, 1, 1] scale its residual branches."""
        shifted = any(block.target_shift_size)
        x = x + scale_residual(self.attend(block.attn, block.norm1(x), shifted, cache), factors, 0)
        return x + scale_residual(block.mlp(block.norm2(x)), factors, 1)

    def to_map(self, x: Tensor) -> Tensor:
        """Return a stage's output as [B, C, h, w]."""
        return x.permute(0, 3, 1, 2)

    def project(self, attn: nn.Module, x: Tensor) -> Tensor:
        """Project x [..., C] to queries, keys and values, [..., 3 C]."""
        return attn.qkv(x)

    def scale_qk(self, attn: nn.Module, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
        """Prepare q and k [B, windows * H, positions, d]; returns them and the scale of their product."""
        return q, k, attn.scale

    def relative_bias(self, attn: nn.Module) -> Tensor:
        """Return the bias that each relative offset adds to the logits, [offsets, H]."""
        return attn.relative_position_bias_table

    def attend(self, attn: nn.Module, x: Tensor, shifted: bool, cache: dict) -> Tensor:
        """Attend inside windows of x [B, h, w, C] -> the same shape.

        A window is never wider than the map, and where it is as wide nothing is shifted. The map is padded with zeros
        to whole windows, then shifted, as in the reference; padded positions count as keys there, and here too.
        """
        sides = x.shape[1:3]
        window = tuple(min(size, side) for size, side in zip(attn.window_size, sides))
        shift = tuple(size // 2 if shifted and side > size else 0 for size, side in zip(window, sides))
        padded = tuple(-(-side // size) * size for size, side in zip(window, sides))
        x = F.pad(x, (0, 0, 0, padded[1] - sides[1], 0, padded[0] - sides[0]))
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        counts = (padded[0] // window[0], padded[1] // window[1])
        # [B, nh, wh, nw, ww, 3C] -> [3, B, nh, nw, H, wh, ww, d] -> [3, B, windows * H, positions, d]
        qkv = self.project(attn, x).unflatten(2, (counts[1], window[1])).unflatten(1, (counts[0], window[0]))
        qkv = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = qkv.flatten(5, 6).flatten(2, 4)
        index, mask = window_tables(tuple(attn.window_size), window, shift, padded, x.device, cache)
        bias = self.relative_bias(attn)[index].permute(2, 0, 1)  # [H, positions, positions]
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).flatten(0, 1)
        else:
            bias = bias.repeat(counts[0] * counts[1], 1, 1)
        q, k, scale = self.scale_qk(attn, q, k)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)
        mixed = mixed.unflatten(2, window).unflatten(1, (*counts, attn.num_heads)).permute(0, 1, 4, 2, 5, 3, 6)
        x = attn.proj(mixed.reshape(x.shape[0], *padded, -1))
        if any(shift):
            x = torch.roll(x, shift, (1, 2))
        return x[:, : sides[0], : sides[1]]


def window_tables(
    built: tuple, window: tuple, shift: tuple, padded: tuple, device: torch.device, cache: dict
) -> tuple[Tensor, Tensor | None]:
    """Return the index into a relative position table and the mask of a shifted window; stored in `cache`.

    The index is int64 [P, P] for the P positions of `window`, into a table made for windows of size `built`; the mask
    is [windows, P, P], None without a shift.
    """
    key = (built, window, shift, padded, device)
    if key not in cache:
        with torch.inference_mode(False), torch.no_grad():
            cache[key] = offset_index(built, window).to(device), shift_mask(window, shift, padded, device)
    return cache[key]


def offset_index(built: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Return the table index of each pair of positions of `window`; the table is that of the larger window `built`."""
    positions = torch.cartesian_prod(*(torch.arange(size) for size in window)).reshape(-1, 2)
    offset = positions[:, None] - positions[None] + torch.tensor(built) - 1
    return offset[..., 0] * (2 * built[1] - 1) + offset[..., 1]


def shift_mask(window: tuple, shift: tuple, padded: tuple, device: torch.device) -> Tensor | None:
    """Return SHIFT_MASK between positions of a window from opposite ends of the map, else 0: [windows, P, P].

    None without a shift.
    """
    if not any(shift):
        return None
    bands = []
    for size, step, side in zip(window, shift, padded):
        at = torch.arange(side)
        bands.append((at >= side - size).long() + (at >= side - step).long() if step else torch.zeros_like(at))
    region = 3 * bands[0][:, None] + bands[1]
    region = region.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0]))
    region = region.transpose(1, 2).flatten(2).flatten(0, 1)  # [windows, P]
    return torch.where(region[:, None] == region[:, :, None], 0.0, SHIFT_MASK).to(device)
