"""timm's VisionTransformer as the backbone runs it: what it is made of, and the two residual branches of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import Attention, Mlp
from timm.models import vision_transformer
from torch import Tensor

from maskwise.functional import attention
from maskwise.nn import varlen
from maskwise.nn.checkpointing import again
from maskwise.nn.varlen import Shapes

CLASS = vision_transformer.VisionTransformer
BLOCKS = (vision_transformer.Block,)
ATTENTIONS = (Attention,)
PLAIN = {"num_classes": 0, "global_pool": "", "fc_norm": False, "dynamic_img_size": False, "weight_init": "skip", "fix_init": False}
translate = vision_transformer.checkpoint_filter_fn
SHALLOW = {"depth": 1}
TAKES = {"image_size": "img_size", "patch_size": "patch_size", "class_token": "class_token"}
LEAN = PACKS = True  # its branches know the options `lean` and `shapes`


def blocks(model):
    """The blocks of a timm model, in order."""
    return model.blocks


def turns(rope, cache: dict, grid: tuple[int, int], prefix: int) -> None:
    """Positions are added to the tokens, nothing is rotated."""
    return None


def attention_branch(block, x: Tensor, turn: None, index: int, *, lean: bool = False, shapes: Shapes | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What attention adds to x [B, T, D] before drop path, and the q, k and position-free k [B, H, T, d] behind it.

    `lean` keeps no normalised tokens for the backward pass; with `shapes` x is those batches packed, [tokens, D], and q
    and k are those of the first, or packed too.
    """
    residual, q, k = attend(block.attn, x, block.norm1, lean, shapes)
    return block.ls1(residual), q, k, k


def mlp_branch(block, x: Tensor, *, lean: bool = False) -> Tensor:
    """What the MLP adds to x [B, T, D] before drop path; `lean` keeps the first layer's answer alone for the backward pass."""
    mlp = block.mlp
    if not lean or type(mlp) is not Mlp:
        return block.ls2(mlp(block.norm2(x)))
    inner = again(lambda x: mlp.fc1(block.norm2(x)), x)
    return block.ls2(mlp.drop2(again(lambda inner: mlp.fc2(mlp.norm(mlp.drop1(mlp.act(inner)))), inner)))


def attend(
    attn: Attention, x: Tensor, norm: Callable[[Tensor], Tensor], lean: bool = False, shapes: Shapes | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One timm attention layer over norm(x), giving its output shaped like x and the q and k that made it; see `attention_branch`.

    The kernel is the fused one unless the layer's `fused_attn` is off. Forward and backward of two ViT-S blocks on one
    CPU core (torch 2.13, float32, 17 to 577 tokens) took 1 to 13 % longer with explicit matrices, so length does not choose.
    """
    normed = None if lean else norm(x)
    qkv = again(lambda x: attn.qkv(norm(x)), x) if lean else attn.qkv(normed)
    if shapes is None:
        mixed, *first = mix(attn, qkv)
    elif attn.fused_attn and varlen.takes_varlen(qkv.device, qkv.dtype):
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(1)
        first = attn.q_norm(q), attn.k_norm(k)
        mixed = varlen.attend(*first, v, shapes, attn.scale).flatten(1)
    else:
        parts = [mix(attn, part.unflatten(0, shape)) for part, shape in zip(qkv.split([b * t for b, t in shapes]), shapes)]
        mixed, first = torch.cat([part[0].flatten(0, 1) for part in parts]), parts[0][1:]
    mixed = attn.norm(mixed)
    gate = getattr(attn, "gate", None)
    if gate is not None:
        mixed = mixed * gate(norm(x) if lean else normed).sigmoid()
    return attn.proj_drop(attn.proj(mixed)), *first


def mix(attn: Attention, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of [B, T, 3 D] -> [B, T, D], and its q and k [B, H, T, d]."""
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    return attention.mix(q, k, v, attn.scale, attn.fused_attn), q, k
