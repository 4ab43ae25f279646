"""MAP for dense prediction: its tokens are fed back to the stages (MAP, sec. 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from maskwise.bounds import Count, Rate
from maskwise.errors import UserError
from maskwise.nn.multi_token.head import MAP, MAPHead, initialize
from maskwise.nn.multi_token.options import AttentionOptions, Average, FusionOptions, TokenOptions
from maskwise.nn.multi_token.stage_fusion import MultiScale
from maskwise.nn.option_groups import option_groups

JOINS = ("add", "concat")


class MAPNeck(nn.Module):
    """Maps of stages in, the same maps with MAP's tokens out; between a backbone and a dense head (MAP, sec. 4.3).

    The maps [B, dims[s], H_s, W_s] are fused and attended as in MAPHead. The groups x tokens are divided among the last
    `fed` maps (default: all) in order, and each map's share is broadcast to its positions. join, which the paper leaves
    open: "add", through a linear layer of its own per map, initially 0; or "concat", as further channels.
    out_dims: widths of the returned maps. Other arguments as in MAP, the averaged token being one of the keys; the
    fields of FusionOptions are keywords, too.
    Raises UserError for sizes that do not divide.
    """

    @option_groups
    def __init__(
        self,
        dims: Sequence[int],
        *,
        join: Literal["add", "concat"] = "add",
        fed: Count | None = None,
        heads: Count | None = None,
        average: Average | None = "mean",
        dropout: Rate = 0.05,
        fusion_options: FusionOptions = FusionOptions(level=-2),
        token_options: TokenOptions = TokenOptions(),
        attention_options: AttentionOptions = AttentionOptions(),
    ):
        super().__init__()
        total, self.fed = token_options.groups * token_options.tokens, fed or len(dims)
        if join not in JOINS:
            raise UserError(f"map: join={join!r} is unknown: choose {' or '.join(JOINS)}")
        if not 0 < self.fed <= len(dims):
            raise UserError(f"map: fed={fed} of {len(dims)} maps is out of range: choose 1 to {len(dims)}")
        if total % self.fed:
            raise UserError(
                f"map: {token_options.groups} x {token_options.tokens} tokens do not divide among {self.fed} maps: "
                "choose other groups or tokens"
            )
        self.join, dim = join, fusion_options.dim
        self.fuse = MultiScale(dims, dim, fusion_options.level, fusion_options.resample)
        self.map = MAP(
            dim,
            heads=heads,
            average=average,
            dropout=dropout,
            token_options=token_options,
            attention_options=attention_options,
        )
        initialize(self.fuse)
        share, widths = total // self.fed * dim, list(dims)[-self.fed :]
        self.out_dims = tuple(width + share for width in widths) if join == "concat" else tuple(widths)
        self.projections = nn.ModuleList(nn.Linear(share, width) for width in widths) if join == "add" else None
        for layer in self.projections or ():
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def load_head(self, head: MAPHead) -> None:
        """Copy fusion and attention of a trained head; raises UserError if its sizes differ."""
        for name in ("fuse", "map"):
            theirs, mine = getattr(head, name).state_dict(), getattr(self, name)
            sizes = [{key: value.shape for key, value in state.items()} for state in (theirs, mine.state_dict())]
            if sizes[0] != sizes[1]:
                raise UserError(f"map: `{name}` of the head has other sizes than that of the neck: give equal options")
            mine.load_state_dict(theirs)

    def forward(self, maps: Sequence[Tensor], drop_key: Tensor | None = None) -> list[Tensor]:
        """Return the last `fed` maps [B, out_dims[s], H_s, W_s]; drop_key: int64 [B], see KeyedDropout."""
        tokens = self.map(self.fuse(maps), drop_key).tokens.flatten(1, 2)
        shares = [part.flatten(1)[:, :, None, None] for part in tokens.chunk(self.fed, dim=1)]
        pairs = zip(list(maps)[-self.fed :], shares)
        if self.projections is None:
            return [torch.cat([x, share.expand(-1, -1, *x.shape[2:])], dim=1) for x, share in pairs]
        return [
            x + layer(share[..., 0, 0])[:, :, None, None].to(x.dtype)
            for (x, share), layer in zip(pairs, self.projections)
        ]
