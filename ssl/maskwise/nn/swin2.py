"""timm's Swin Transformer V2 as the backbone runs it: Swin's windows, cosine attention, a table that a network makes, norms behind the branches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models import swin_transformer_v2
from torch import Tensor, nn

from maskwise.nn import swin
from maskwise.nn.swin import CLASSIFIER, MAPS, MASKS, PLAIN, SHALLOW, TAKES, blocks, divisor, enter, grid, parts, stages, stem, strides, to_map, widths  # noqa: F401

CLASS = swin_transformer_v2.SwinTransformerV2
BLOCKS = (swin_transformer_v2.SwinTransformerV2Block,)
ATTENTIONS = (swin_transformer_v2.WindowAttention,)
translate = swin_transformer_v2.checkpoint_filter_fn
SHARPEST = math.log(100.0)  # of the learned factor on cosines


def pass_block(block: nn.Module, x: Tensor, scale: Tensor | None, cache: dict) -> Tensor:
    """A block of x [B, h, w, C]; scale [2, B, 1, 1] scales its two residual branches."""
    residual = block.norm1(swin.attend(block.attn, x, any(block.target_shift_size), cache, COSINE))
    x = x + (residual if scale is None else residual * scale[0].unsqueeze(-1))
    residual = block.norm2(block.mlp(x))
    return x + (residual if scale is None else residual * scale[1].unsqueeze(-1))


def project(attn: nn.Module, x: Tensor) -> Tensor:
    """Queries, keys and values [..., 3 C] of x [..., C]; keys have no bias."""
    return F.linear(x, attn.qkv.weight, None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))


def compare(attn: nn.Module, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
    """Queries and keys [B, windows * H, places, d] whose products are cosines times each head's learned factor, and the scale that is left: 1."""
    full = q.dtype if q.dtype == torch.float64 else torch.float32
    factor = attn.logit_scale.clamp(max=SHARPEST).exp().repeat(q.shape[1] // attn.num_heads, 1, 1)
    return (F.normalize(q.to(full), dim=-1) * factor).to(q.dtype), F.normalize(k.to(full), dim=-1).to(k.dtype), 1.0


def offsets(attn: nn.Module) -> Tensor:
    """What each offset adds to the logits, [offsets, H]."""
    return 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).flatten(0, 2))


COSINE = swin.Kind(project, compare, offsets)
