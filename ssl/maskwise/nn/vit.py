"""timm's VisionTransformer as the backbone runs it: what it is made of, and the two residual branches of a block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import vision_transformer
from torch import Tensor

CLASS = vision_transformer.VisionTransformer
BLOCKS = (vision_transformer.Block,)
ATTENTIONS = (Attention,)
PLAIN = {"num_classes": 0, "global_pool": "", "fc_norm": False, "dynamic_img_size": False, "weight_init": "skip", "fix_init": False}
translate = vision_transformer.checkpoint_filter_fn


def turns(rope, cache: dict, grid: tuple[int, int], prefix: int) -> None:
    """Positions are added to the tokens, nothing is rotated."""
    return None


def attention_branch(block, x: Tensor, turn: None, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What attention adds to x [B, T, D] before drop path, and the q, k and position-free k [B, H, T, d] behind it."""
    residual, q, k = attend(block.attn, block.norm1(x))
    return block.ls1(residual), q, k, k


def mlp_branch(block, x: Tensor) -> Tensor:
    """What the MLP adds to x [B, T, D] before drop path."""
    return block.ls2(block.mlp(block.norm2(x)))


def attend(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One timm attention layer, giving its output [B, T, D] and the q and k [B, H, T, d] that made it.

    The kernel is the fused one unless the layer's `fused_attn` is off. Forward and backward of two ViT-S blocks on one
    CPU core (torch 2.13, float32, 17 to 577 tokens) took 1 to 13 % longer with explicit matrices, so length does not choose.
    """
    batch, length, _ = x.shape
    q, k, v = attn.qkv(x).reshape(batch, length, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if attn.fused_attn:
        mixed = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
    else:
        logits = (q * attn.scale) @ k.transpose(-2, -1)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        mixed = logits.softmax(dim=-1, dtype=wide).to(v.dtype) @ v
    mixed = attn.norm(mixed.transpose(1, 2).reshape(batch, length, -1))
    gate = getattr(attn, "gate", None)
    return attn.proj(mixed if gate is None else mixed * gate(x).sigmoid()), q, k
