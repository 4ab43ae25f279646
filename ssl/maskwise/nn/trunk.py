"""The blocks of a vision transformer: one batch or several packed into one, checkpointed or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maskwise.functional import attention as rows
from maskwise.nn.checkpointing import again
from maskwise.nn.timm_models import ANATOMIES
from maskwise.nn.varlen import Shapes


class Passed(NamedTuple):
    """What the blocks make: tokens as they came, the class token's row [B, H, T] and the keys [B, T, D] of the last block, stages by index."""

    x: Tensor
    row: Tensor | None
    keys: Tensor | None
    stages: dict[int, Tensor]


def through(
    kind: str, blocks: nn.ModuleList, x: Tensor, turns: Tensor | None, factors: Tensor | None, shapes: Shapes | None, row: bool, keys: bool,
    wanted: frozenset[int], checkpointing: str,
) -> Passed:
    """Send tokens [B, T, D] through the blocks of a row of ANATOMIES; with `shapes` they are those batches, flattened and joined to [tokens, D].

    `turns` are the anatomy's; `factors` [depth, 2, B or tokens, ...] scale the residual branches (drop path).
    `checkpointing` says what the backward pass computes again rather than keep: nothing, the "elementwise" (norms and
    activations, where the anatomy can) or whole "blocks" (a third more work). `row`, `keys` and `wanted` (indices of
    blocks whose output is a stage) are for a single batch.
    """
    anatomy = ANATOMIES[kind]
    last_row = last_keys = None
    stages: dict[int, Tensor] = {}
    saves = checkpointing if torch.is_grad_enabled() else "none"
    lean = {"lean": True} if saves == "elementwise" and anatomy.LEAN else {}
    packed = {} if shapes is None else {"shapes": shapes}

    def pass_block(i: int, x: Tensor, does: Callable):
        gathered = getattr(blocks[i], "gathered", None)  # a block that is split over ranks collects its weights around what it does
        return does(i, x) if gathered is None else gathered(does, i, x)

    def tokens(i: int, x: Tensor) -> Tensor:
        return branches(i, x)[0]

    def branches(i: int, x: Tensor):
        block, scale = blocks[i], None if factors is None else factors[i]
        residual, q, k, still = anatomy.attention_branch(block, x, turns, i, **lean, **packed)
        x = x + (residual if scale is None else residual * scale[0])
        residual = anatomy.mlp_branch(block, x, **lean)
        return x + (residual if scale is None else residual * scale[1]), q, k, still

    for i in range(len(blocks)):
        if i == len(blocks) - 1 and (row or keys):
            x, q, k, still = pass_block(i, x, branches)
            last_row = rows.cls_row(q[:, :, 0], k, blocks[i].attn.scale) if row else None
            last_keys = still.transpose(1, 2).flatten(2) if keys else None
        elif saves == "blocks":
            x = again(lambda x, i=i: pass_block(i, x, tokens), x)
        else:
            x = pass_block(i, x, tokens)
        if i in wanted:
            stages[i] = x
    return Passed(x, last_row, last_keys, stages)


_compiled: Callable | None = None


def compiled_through(*arguments) -> Passed:
    """`through`, compiled for every combination of shapes that training has (three, or two where crops are packed)."""
    global _compiled
    if _compiled is None:
        _compiled = torch.compile(through, dynamic=False)
    return _compiled(*arguments)
