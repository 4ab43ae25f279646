"""timm's Eva (EVA, EVA02, DINOv3, PE, RoPE ViTs) as the backbone runs it: q and k are turned by their patch's place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models import eva
from torch import Tensor

from maskwise.functional import attention

CLASS = eva.Eva
BLOCKS = (eva.EvaBlock, eva.EvaBlockPostNorm)
ATTENTIONS = tuple(getattr(eva, name) for name in ("EvaAttention", "AttentionRope") if hasattr(eva, name))
# with dynamic_img_size the rotary embedding answers for any grid, which local crops need
PLAIN = {"num_classes": 0, "global_pool": "", "use_fc_norm": False, "dynamic_img_size": True}
translate = eva.checkpoint_filter_fn
SHALLOW = {"depth": 1}
TAKES = {"image_size": "img_size", "patch_size": "patch_size", "class_token": "class_token"}
LEAN = PACKS = False  # every crop size has its own turns


def blocks(model):
    """The blocks of a timm model, in order."""
    return model.blocks


def turns(rope, cache: dict, grid: tuple[int, int], prefix: int) -> Tensor | None:
    """Sines and cosines of every token's angles: [T, 2 d], or [depth, H, T, 2 d] where each block learns its own.

    The coordinates are those of the grid at hand: DINOv3 spans [-1, 1] with every crop's own grid (patch centres),
    EVA02 stretches it over the grid of its pretraining. The `prefix` tokens have no place and are not turned. Fixed
    tables are kept in `cache`, so that a step copies nothing to the device.
    """
    if rope is None:
        return None
    learned = next(rope.parameters(), None)
    if learned is not None:
        return unturned(rope.get_embed(grid), prefix)
    device = next(rope.buffers()).device
    if (grid, device) not in cache:
        former = rope.training
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            cache[grid, device] = unturned(rope.eval().get_embed(grid).to(device), prefix)
        rope.train(former)
    return cache[grid, device]


def unturned(table: Tensor, prefix: int) -> Tensor:
    """A table with `prefix` rows of sine 0 and cosine 1 in front."""
    width = table.shape[-1] // 2
    still = table.new_zeros(*table.shape[:-2], prefix, 2 * width)
    still[..., width:] = 1
    return torch.cat([still, table], dim=-2)


def rotate(x: Tensor, turn: Tensor, half: bool) -> Tensor:
    """Turn each pair of features of x [B, H, T, d]; pairs are (i, i + d/2) with `half`, else neighbours. Computed in the table's precision."""
    sin, cos = turn.chunk(2, dim=-1)
    if half:
        first, second = x.chunk(2, dim=-1)
        crossed = torch.cat([-second, first], dim=-1)
    else:
        crossed = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + crossed * sin).to(x.dtype)


def attention_branch(block, x: Tensor, turn: Tensor | None, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What attention adds to x [B, T, D] before drop path, and the q, k and position-free k [B, H, T, d] behind it."""
    if turn is not None and turn.ndim == 4:
        turn = turn[index]
    if type(block) is eva.EvaBlockPostNorm:
        residual, *rows = attend(block.attn, x, turn)
        return block.norm1(residual), *rows
    residual, *rows = attend(block.attn, block.norm1(x), turn)
    return residual if block.gamma_1 is None else block.gamma_1 * residual, *rows


def mlp_branch(block, x: Tensor) -> Tensor:
    """What the MLP adds to x [B, T, D] before drop path."""
    if type(block) is eva.EvaBlockPostNorm:
        return block.norm2(block.mlp(x))
    residual = block.mlp(block.norm2(x))
    return residual if block.gamma_2 is None else block.gamma_2 * residual


def attend(attn, x: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One Eva attention layer: its output [B, T, D], the turned q and k, and k before its turn, [B, H, T, d].

    Fused or split projections, no bias on k, keys and values shared by groups of heads: whatever the layer has.
    """
    q, k, v = (each.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for each in project(attn, x))
    q, still = attn.q_norm(q), attn.k_norm(k)
    k = still
    if turn is not None:
        q, k = rotate(q, turn, attn.rotate_half), rotate(k, turn, attn.rotate_half)
    q, k = q.to(v.dtype), k.to(v.dtype)
    shared = attn.num_heads // k.shape[1]
    if shared > 1:
        k, v, still = (each.repeat_interleave(shared, dim=1) for each in (k, v, still))
    mixed = attn.norm(attention.mix(q, k, v, attn.scale, attn.fused_attn))
    gate = getattr(attn, "gate", None)
    return attn.proj(mixed if gate is None else mixed * gate(x).sigmoid()), q, k, still


def project(attn, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, T, H d] of x [B, T, D]."""
    if attn.qkv is None:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv(x).chunk(3, dim=-1)
    bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    return F.linear(x, attn.qkv.weight, bias).chunk(3, dim=-1)
