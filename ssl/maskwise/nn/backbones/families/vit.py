"""timm's VisionTransformer: attention and MLP branches, packed or with recomputation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention, HybridEmbed, Mlp, PatchEmbed
from timm.models import vision_transformer, vision_transformer_hybrid
from torch import Tensor, nn

from maskwise.bounds import Count
from maskwise.errors import UserError
from maskwise.functional import attention
from maskwise.nn.backbones import checkpointing, varlen_attention
from maskwise.nn.backbones.families.base import TransformerFamily
from maskwise.nn.backbones.families.conv_stem import NORMS, StemOptions
from maskwise.nn.backbones.families.whitening import Kernel
from maskwise.nn.backbones.varlen_attention import Rows, Shapes, first_rows


class ViTFamily(TransformerFamily):
    """timm's VisionTransformer (ViT, DeiT, DINOv2, hybrids, ViTamin).

    `norm_eps` is the epsilon of its layer norms (1e-6); `stem` and `stem_*` replace the patch projection by
    convolutions (`StemOptions`), with `whiten` behind a whitening of patches.
    """

    model_class = vision_transformer.VisionTransformer
    block_classes = (vision_transformer.Block,)
    attention_classes = (Attention,)
    stem_classes = (PatchEmbed, HybridEmbed)
    timm_names = {"image_size": "img_size", "patch_size": "patch_size", "class_token": "class_token"}
    timm_arguments = {
        "num_classes": 0,
        "global_pool": "",
        "fc_norm": False,
        "dynamic_img_size": False,
        "weight_init": "skip",
        "fix_init": False,
    }
    shallow_arguments = {"depth": 1}
    extra_arguments = {
        "norm_eps": float,
        "stem": Literal["patch", "conv"],
        "stem_channels": tuple[Count, ...],
        "stem_strides": tuple[Count, ...],
        "stem_kernels": tuple[Count, ...],
        "stem_norm_layer": Literal[tuple(NORMS)],
        "whiten": Kernel,
        "whiten_signs": bool,
    }
    recomputes_elementwise = True
    supports_packing = True

    def constructor_arguments(self, sizes: dict, extra: dict) -> tuple[dict, dict]:
        """Return the sizes and further arguments of timm's constructor: `embed_layer` for a stem of convolutions."""
        stem = StemOptions.of(extra)
        if stem is None:
            return sizes, {}
        patch = sizes["patch_size"]
        if patch is not None and {stem.patch} != ({patch} if isinstance(patch, int) else set(patch)):
            raise UserError(
                f"backbone.patch_size={patch} is another than the product of stem_strides={stem.strides}, "
                f"{stem.patch}: leave patch_size out"
            )
        return {**sizes, "patch_size": None}, {"embed_layer": stem.embed_layer()}

    def apply_extra_arguments(self, model: nn.Module, *, norm_eps: float | None = None, **stem) -> None:
        """Set the epsilon of all layer norms, which timm fixes at 1e-6; the stem is built by timm's constructor."""
        for module in model.modules() if norm_eps is not None else ():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps

    def translate(self, state: dict, model: nn.Module) -> dict:
        """Rename a pretrained state dict to timm's current keys."""
        return vision_transformer_hybrid.checkpoint_filter_fn(state, model)

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """Return the residual blocks in order."""
        return model.blocks

    def attention_branch(self, block, x, rope, index, *, recompute=False, shapes=None, rows=None):
        """Compute the attention residual; positions are added to the tokens, so k has no rotation."""
        residual, q, k = attention_residual(block, x, recompute=recompute, shapes=shapes, rows=rows)
        return residual, q, k, k

    def mlp_branch(self, block: nn.Module, x: Tensor, *, recompute: bool = False) -> Tensor:
        """Compute the MLP residual of x, before drop path."""
        return mlp_residual(block, x, recompute=recompute)


def attention_residual(
    block: nn.Module, x: Tensor, *, recompute: bool = False, shapes: Shapes | None = None, rows: Rows | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the attention residual of a timm Block, and its q and k [B, H, T, d].

    `recompute` saves no normalized tokens for the backward pass. With `shapes` x is those batches packed, [tokens, D],
    and q and k are packed or those of the first batch. `rows` limits residual and q to the first tokens.
    """
    residual, q, k = attend(block.attn, x, block.norm1, recompute, shapes, rows)
    return block.ls1(residual), q, k


def mlp_residual(block: nn.Module, x: Tensor, *, recompute: bool = False) -> Tensor:
    """Compute the MLP residual of a timm Block; `recompute` saves the first layer's output alone."""
    mlp = block.mlp
    if not recompute or type(mlp) is not Mlp:
        return block.ls2(mlp(block.norm2(x)))
    inner = checkpointing.recompute(lambda x: mlp.fc1(block.norm2(x)), x)
    return block.ls2(
        mlp.drop2(checkpointing.recompute(lambda inner: mlp.fc2(mlp.norm(mlp.drop1(mlp.act(inner)))), inner))
    )


def attend(
    attn: Attention,
    x: Tensor,
    norm: Callable[[Tensor], Tensor],
    recompute: bool,
    shapes: Shapes | None,
    rows: Rows | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a timm attention layer on norm(x); returns its output, shaped like x, and q and k.

    With `rows` output and q are those of the first tokens of each sequence. The kernel is the fused one unless the
    layer's `fused_attn` is off. Forward and backward of two ViT-S blocks on one CPU core (torch 2.13, float32, 17 to
    577 tokens) took 1 to 13 % longer with explicit matrices, so the sequence length does not choose the kernel.
    """
    normed = None if recompute else norm(x)
    if recompute:
        projected = checkpointing.recompute(lambda x: project(attn, norm(x), rows, shapes), x)
    else:
        projected = project(attn, normed, rows, shapes)
    if shapes is None:
        mixed, q, k = dense_attention(attn, *projected)
    else:
        mixed, q, k = packed_attention(attn, *projected, shapes, rows)
    mixed = attn.norm(mixed)
    gate = getattr(attn, "gate", None)  # newer timm versions only
    if gate is not None:
        mixed = mixed * gate(first_rows(norm(x) if recompute else normed, rows, shapes)).sigmoid()
    return attn.proj_drop(attn.proj(mixed)), q, k


def project(attn: Attention, normed: Tensor, rows: Rows | None, shapes: Shapes | None) -> tuple[Tensor, Tensor, Tensor]:
    """Project normalized tokens [..., D] to q of the first `rows` (None: all), and k and v of all, [..., H d] each."""
    if rows is None:
        return attn.qkv(normed).chunk(3, dim=-1)
    width, bias = attn.attn_dim, attn.qkv.bias
    q_weight, kv_weight = attn.qkv.weight.tensor_split([width])
    q_bias, kv_bias = (None, None) if bias is None else bias.tensor_split([width])
    # the short product first: recomputation repeats all but the last
    q = F.linear(first_rows(normed, rows, shapes), q_weight, q_bias)
    return q, *F.linear(normed, kv_weight, kv_bias).chunk(2, dim=-1)


def dense_attention(attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attend within a batch: q [B, R, D], k, v [B, T, D] -> output [B, R, D], q [B, H, R, d], k [B, H, T, d]."""
    q, k, v = (part.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2) for part in (q, k, v))
    q, k = attn.q_norm(q), attn.k_norm(k)
    return attention.multi_head_attention(q, k, v, attn.scale, attn.fused_attn), q, k


def packed_attention(
    attn: Attention, q: Tensor, k: Tensor, v: Tensor, shapes: Shapes, rows: Rows | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend within each sequence of packed batches: q [queries, D], k, v [tokens, D] -> output [queries, D], q and k.

    Without a variable-length kernel the batches are attended one after another.
    """
    if attn.fused_attn and varlen_attention.is_supported(q.device, q.dtype):
        q, k, v = (part.unflatten(-1, (attn.num_heads, attn.head_dim)) for part in (q, k, v))
        q, k = attn.q_norm(q), attn.k_norm(k)
        return varlen_attention.attend(q, k, v, shapes, attn.scale, rows).flatten(1), q, k
    query_shapes = shapes if rows is None else varlen_attention.shapes_of_rows(shapes, rows)
    batches = [
        [part.unflatten(0, shape) for part, shape in zip(x.split([b * t for b, t in sizes]), sizes)]
        for x, sizes in ((q, query_shapes), (k, shapes), (v, shapes))
    ]
    parts = [dense_attention(attn, *batch) for batch in zip(*batches)]
    return torch.cat([mixed.flatten(0, 1) for mixed, _, _ in parts]), parts[0][1], parts[0][2]
