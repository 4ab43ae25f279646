"""Forward pass of transformer blocks: one batch or several packed ones, checkpointed or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maskwise.functional import attention
from maskwise.nn.backbones.checkpointing import recompute
from maskwise.nn.backbones.families.base import TransformerFamily, call_block
from maskwise.nn.backbones.varlen_attention import Rows, Shapes, first_rows


class BlockOutputs(NamedTuple):
    """Outputs of the blocks.

    x: tokens, shaped as they came, or the first rows of each sequence; cls_attention [B, H, T] and keys [B, T, D] of
    the last block, if requested; stages: outputs of the requested blocks, by index.
    """

    x: Tensor
    cls_attention: Tensor | None
    keys: Tensor | None
    stages: dict[int, Tensor]


def run_blocks(
    family: TransformerFamily,
    blocks: nn.ModuleList,
    x: Tensor,
    rope: Tensor | None,
    factors: Tensor | None,
    shapes: Shapes | None,
    cls_attention: bool,
    keys: bool,
    stages: frozenset[int],
    checkpointing: str,
    rows: Rows | None = None,
) -> BlockOutputs:
    """Run the blocks of a family on tokens [B, T, D], or with `shapes` on those batches packed to [tokens, D].

    `rope` is the family's table; `factors` [depth, 2, B or tokens, ...] scale the residual branches (drop path).
    `checkpointing` sets what the backward pass recomputes: "none", the "elementwise" operations (norms and
    activations, in families that support it) or whole "blocks" (a third more work). `cls_attention`, `keys` and
    `stages` (indices of blocks) request outputs of a single batch. `rows` are the leading tokens of each sequence whose
    output is used, one number per batch: the last block computes queries, projection and MLP for these only.
    """
    cls_row = last_keys = None
    outputs: dict[int, Tensor] = {}
    saving = checkpointing if torch.is_grad_enabled() else "none"
    elementwise = saving == "elementwise" and family.recomputes_elementwise

    def run_block(i: int, x: Tensor):
        block, scale = blocks[i], None if factors is None else factors[i]
        used = rows if i == len(blocks) - 1 else None
        residual, q, k, k_unrotated = family.attention_branch(
            block, x, rope, i, recompute=elementwise, shapes=shapes, rows=used
        )
        if shapes is not None and scale is not None:  # factors of a packed batch are one per token
            scale = [first_rows(factor, used, shapes) for factor in scale]
        x = first_rows(x, used, shapes)
        x = x + (residual if scale is None else residual * scale[0])
        residual = family.mlp_branch(block, x, recompute=elementwise)
        return x + (residual if scale is None else residual * scale[1]), q, k, k_unrotated

    def run_block_tokens(i: int, x: Tensor) -> Tensor:
        return run_block(i, x)[0]

    for i in range(len(blocks)):
        if i == len(blocks) - 1 and (cls_attention or keys):
            x, q, k, k_unrotated = call_block(blocks[i], run_block, i, x)
            cls_row = attention.cls_attention(q[:, :, 0], k, blocks[i].attn.scale) if cls_attention else None
            last_keys = k_unrotated.transpose(1, 2).flatten(2) if keys else None
        elif saving == "blocks":
            x = recompute(lambda x, i=i: call_block(blocks[i], run_block_tokens, i, x), x)
        else:
            x = call_block(blocks[i], run_block_tokens, i, x)
        if i in stages:
            outputs[i] = x
    return BlockOutputs(x, cls_row, last_keys, outputs)


_compiled: Callable | None = None


def run_blocks_compiled(*arguments) -> BlockOutputs:
    """Run `run_blocks` compiled for each combination of shapes in training: three, or two with packed crops."""
    global _compiled
    if _compiled is None:
        _compiled = torch.compile(run_blocks, dynamic=False)
    return _compiled(*arguments)
