"""timm's Swin Transformer V2: cosine attention, a position bias from a network, norms after the branches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models import swin_transformer_v2
from torch import Tensor, nn

from maskwise.functional.precision import at_least_float32_dtype
from maskwise.nn.backbones.families.base import scale_residual
from maskwise.nn.backbones.families.swin import SwinFamily

MAX_LOG_SCALE = math.log(100.0)  # of the learned factor on cosines


class SwinV2Family(SwinFamily):
    """timm's Swin Transformer V2."""

    model_class = swin_transformer_v2.SwinTransformerV2
    block_classes = (swin_transformer_v2.SwinTransformerV2Block,)
    attention_classes = (swin_transformer_v2.WindowAttention,)

    def translate(self, state: dict, model: nn.Module) -> dict:
        """Rename a pretrained state dict to timm's current keys."""
        return swin_transformer_v2.checkpoint_filter_fn(state, model)

    def run_block(self, block: nn.Module, x: Tensor, factors: Tensor | None, cache: dict) -> Tensor:
        """Run a block on x [B, h, w, C]; `factors` [2, B, 1, 1] scale its residual branches."""
        shifted = any(block.target_shift_size)
        x = x + scale_residual(block.norm1(self.attend(block.attn, x, shifted, cache)), factors, 0)
        return x + scale_residual(block.norm2(block.mlp(x)), factors, 1)

    def project(self, attn: nn.Module, x: Tensor) -> Tensor:
        """Project x [..., C] to queries, keys and values, [..., 3 C]; keys have no bias."""
        bias = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        return F.linear(x, attn.qkv.weight, bias)

    def scale_qk(self, attn: nn.Module, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
        """Normalize q and k, so that their products are cosines times each head's learned factor; the scale is 1."""
        dtype = at_least_float32_dtype(q.dtype)
        factor = attn.logit_scale.clamp(max=MAX_LOG_SCALE).exp().repeat(q.shape[1] // attn.num_heads, 1, 1)
        q_unit, k_unit = F.normalize(q.to(dtype), dim=-1), F.normalize(k.to(dtype), dim=-1)
        return (q_unit * factor).to(q.dtype), k_unit.to(k.dtype), 1.0

    def relative_bias(self, attn: nn.Module) -> Tensor:
        """Return the bias that each relative offset adds to the logits, [offsets, H]."""
        return 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).flatten(0, 2))
