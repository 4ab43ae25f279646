"""timm's Eva (EVA, EVA02, DINOv3, PE, RoPE ViTs): transformers with rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from timm.models import eva
from torch import Tensor, nn

from maskwise.functional import attention
from maskwise.nn.backbones.families.base import TransformerFamily
from maskwise.nn.backbones.varlen_attention import Rows, first_rows


class EvaFamily(TransformerFamily):
    """timm's Eva. Each crop size has its own rotary table, so batches are neither packed nor recomputed in parts."""

    model_class = eva.Eva
    block_classes = (eva.EvaBlock, eva.EvaBlockPostNorm)
    # the names differ between timm versions
    attention_classes = tuple(getattr(eva, name) for name in ("EvaAttention", "AttentionRope") if hasattr(eva, name))
    timm_names = {"image_size": "img_size", "patch_size": "patch_size", "class_token": "class_token"}
    # dynamic_img_size lets the rotary embedding serve any grid, which local crops need
    timm_arguments = {"num_classes": 0, "global_pool": "", "use_fc_norm": False, "dynamic_img_size": True}
    shallow_arguments = {"depth": 1}

    def translate(self, state: dict, model: nn.Module) -> dict:
        """Rename a pretrained state dict to timm's current keys."""
        return eva.checkpoint_filter_fn(state, model)

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """Return the residual blocks in order."""
        return model.blocks

    def rope(self, embedding: nn.Module | None, cache: dict, grid: tuple[int, int], num_prefix: int) -> Tensor | None:
        """Return sines and cosines of every token's angles: [T, 2 d], or [depth, H, T, 2 d] if learned per block.

        The coordinates are those of the given grid: DINOv3 spans [-1, 1] with every crop's own grid (patch centers),
        EVA02 stretches it over the grid of its pretraining. Prefix tokens are not rotated. Fixed tables go into
        `cache`, so that a step copies nothing to the device.
        """
        if embedding is None:
            return None
        if next(embedding.parameters(), None) is not None:
            return with_unrotated_prefix(embedding.get_embed(grid), num_prefix)
        device = next(embedding.buffers()).device
        if (grid, device) not in cache:
            was_training = embedding.training
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                table = embedding.eval().get_embed(grid).to(device)
                cache[grid, device] = with_unrotated_prefix(table, num_prefix)
            embedding.train(was_training)
        return cache[grid, device]

    def attention_branch(self, block, x, rope, index, *, recompute=False, shapes=None, rows=None):
        """Compute the attention residual of block `index`, and q, k and k before rotation, [B, H, T, d]."""
        if rope is not None and rope.ndim == 4:
            rope = rope[index]
        if type(block) is eva.EvaBlockPostNorm:
            residual, *qk = attend(block.attn, x, rope, rows)
            return block.norm1(residual), *qk
        residual, *qk = attend(block.attn, block.norm1(x), rope, rows)
        return residual if block.gamma_1 is None else block.gamma_1 * residual, *qk

    def mlp_branch(self, block: nn.Module, x: Tensor, *, recompute: bool = False) -> Tensor:
        """Compute the MLP residual of x, before drop path."""
        if type(block) is eva.EvaBlockPostNorm:
            return block.norm2(block.mlp(x))
        residual = block.mlp(block.norm2(x))
        return residual if block.gamma_2 is None else block.gamma_2 * residual


def with_unrotated_prefix(table: Tensor, num_prefix: int) -> Tensor:
    """Prepend `num_prefix` rows of sine 0 and cosine 1 to a rotary table [..., N, 2 d]."""
    width = table.shape[-1] // 2
    prefix = table.new_zeros(*table.shape[:-2], num_prefix, 2 * width)
    prefix[..., width:] = 1
    return torch.cat([prefix, table], dim=-2)


def rotate(x: Tensor, rope: Tensor, half: bool) -> Tensor:
    """Rotate pairs of features of x [B, H, T, d] by rope [T, 2 d], in the table's precision.

    Pairs are (i, i + d/2) with `half`, else neighbors.
    """
    sin, cos = rope.chunk(2, dim=-1)
    if half:
        first, second = x.chunk(2, dim=-1)
        crossed = torch.cat([-second, first], dim=-1)
    else:
        crossed = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + crossed * sin).to(x.dtype)


def attend(
    attn: nn.Module, x: Tensor, rope: Tensor | None, rows: Rows | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run an Eva attention layer: output [B, T, D], rotated q and k, and k before rotation, [B, H, T, d].

    With `rows` output and q are those of the first tokens. Handles fused and split projections, missing biases on k,
    and keys and values shared by groups of heads.
    """
    read = first_rows(x, rows, None)
    q, k, v = (part.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for part in project(attn, x, read))
    q, unrotated = attn.q_norm(q), attn.k_norm(k)
    k = unrotated
    if rope is not None:
        q_rope = rope if rows is None else rope[..., : rows[0], :]
        q, k = rotate(q, q_rope, attn.rotate_half), rotate(k, rope, attn.rotate_half)
    q, k = q.to(v.dtype), k.to(v.dtype)
    group = attn.num_heads // k.shape[1]
    if group > 1:
        k, v, unrotated = (part.repeat_interleave(group, dim=1) for part in (k, v, unrotated))
    mixed = attn.norm(attention.multi_head_attention(q, k, v, attn.scale, attn.fused_attn))
    gate = getattr(attn, "gate", None)  # newer timm versions only
    return attn.proj(mixed if gate is None else mixed * gate(read).sigmoid()), q, k, unrotated


def project(attn: nn.Module, x: Tensor, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project `read` [B, R, D], x itself or its first tokens, to q [B, R, H d], and x [B, T, D] to k and v."""
    if attn.qkv is None:
        return attn.q_proj(read), attn.k_proj(x), attn.v_proj(x)
    if getattr(attn, "q_bias", None) is None:  # only one of timm's two attention classes has it
        bias = attn.qkv.bias
    else:
        bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    if read is x:
        return F.linear(x, attn.qkv.weight, bias).chunk(3, dim=-1)
    width = len(attn.qkv.weight) // 3
    q_weight, kv_weight = attn.qkv.weight.tensor_split([width])
    q_bias, kv_bias = (None, None) if bias is None else bias.tensor_split([width])
    return F.linear(read, q_weight, q_bias), *F.linear(x, kv_weight, kv_bias).chunk(2, dim=-1)
