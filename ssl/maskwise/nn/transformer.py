"""timm vision transformers with a forward of our own: any image size, mask token, keyed drop path, the CLS row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.functional.resample import position_table
from maskwise.nn import trunk, varlen
from maskwise.nn.backbone import Backbone, by
from maskwise.nn.timm_models import ANATOMIES
from maskwise.nn.tokens import Tokens
from maskwise.nn.weights import load_pretrained


class TransformerBackbone(Backbone):
    """A VisionTransformer or Eva: class token and registers as prefix, positions from a table or by rotation."""

    def _take(self, model: nn.Module, image_size, patch_size, weights) -> int:
        self.dim, self.depth = model.embed_dim, len(model.blocks)
        self.num_heads = model.blocks[-1].attn.num_heads
        self.patch_size, self.image_size = tuple(model.patch_embed.patch_size), tuple(model.patch_embed.img_size)
        if any(side % patch for side, patch in zip(self.image_size, self.patch_size)):
            raise UserError(f"image_size {by(self.image_size)} is not a multiple of the patch {by(self.patch_size)}: choose a multiple")
        self.table_grid = self.grid_for(self.image_size)
        self.has_class_token = model.cls_token is not None
        self.num_prefix = model.num_prefix_tokens
        self.table_prefix = 0 if model.no_embed_class else self.num_prefix
        if weights is None:
            initialise(model)
        else:
            load_pretrained(model, ANATOMIES[self.kind].translate, weights, self.table_prefix, self.table_grid)
        self.patch_embed, self.norm_pre, self.blocks, self.norm = model.patch_embed, model.norm_pre, model.blocks, model.norm
        self.cls_token, self.reg_token, self.pos_embed = model.cls_token, model.reg_token, model.pos_embed
        self.rope = getattr(model, "rope", None)
        self._turns: dict = {}
        self.token_drop = nn.Dropout(0.0)  # see dropout.drop_tokens_
        self.checkpointing, self.compiled = "none", False  # how to compute, never what: see `speed`
        return self.dim

    def _sizes(self) -> dict:
        return {
            "image_size": [side * patch for side, patch in zip(self.table_grid, self.patch_size)],
            "patch_size": list(self.patch_size),
        }

    def grid_for(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """The patch grid (h, w) of images of that size in pixels."""
        return image_hw[0] // self.patch_size[0], image_hw[1] // self.patch_size[1]

    def check_size(self, image_hw: tuple[int, int]) -> None:
        """Raises UserError for images whose sides are not multiples of the patch."""
        if any(side % patch for side, patch in zip(image_hw, self.patch_size)):
            raise UserError(f"images of {by(image_hw)} pixels do not divide into patches of {by(self.patch_size)}: resize or crop them to a multiple")

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        *,
        attention: bool = False,
        keys: bool = False,
        layers: tuple[int, ...] = (),
        drop_key: Tensor | None = None,
    ) -> Tokens:
        """Float images [B, C, H, W], bool mask [B, N] (True = hidden) -> Tokens; see Backbone.forward."""
        x, grid = self._start(images, mask)
        factors = self.drop_path(x.shape[0], x, drop_key)
        wanted = frozenset(layer % self.depth for layer in layers)
        passed = self._through(x, grid, factors, None, attention and self.has_class_token, keys, wanted)
        x, row, last_keys = passed.x, passed.row, passed.keys
        return Tokens(
            x[:, self.num_prefix :],
            x[:, : self.num_prefix],
            grid,
            None if row is None else row[..., self.num_prefix :],
            None if last_keys is None else last_keys[:, self.num_prefix :],
            tuple(passed.stages[layer % self.depth] for layer in layers) if layers else None,
        )

    def packs(self, images: Tensor) -> bool:
        """Whether `together` is the better way for images like these: where attention over packed sequences has a kernel."""
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else images.dtype
        return ANATOMIES[self.kind].PACKS and varlen.takes_varlen(images.device, dtype)

    def together(self, batches: list[tuple[Tensor, Tensor | None, Tensor | None]]) -> list[Tokens]:
        """Several batches of images of different sizes, each with mask and drop key, as one packed batch -> Tokens of each."""
        started = [self._start(images, mask) for images, mask, _ in batches]
        shapes = tuple(x.shape[:2] for x, _ in started)
        factors = [self.drop_path(len(x), x, key) for (x, _), (_, _, key) in zip(started, batches)]
        if factors[0] is None:
            factors = None
        else:
            factors = torch.cat([each.expand(-1, -1, -1, shape[1], -1).flatten(2, 3) for each, shape in zip(factors, shapes)], dim=2)
        joined = self._through(torch.cat([x.flatten(0, 1) for x, _ in started]), started[0][1], factors, shapes, False, False, frozenset()).x
        parts = (part.unflatten(0, shape) for part, shape in zip(joined.split([b * t for b, t in shapes]), shapes))
        return [Tokens(x[:, self.num_prefix :], x[:, : self.num_prefix], grid) for x, (_, grid) in zip(parts, started)]

    def _start(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        """Tokens [B, T, D] with their positions, and the grid of the patches."""
        size = tuple(images.shape[-2:])
        self.check_size(size)
        grid = self.grid_for(size)
        return self.norm_pre(self.token_drop(self._embed(images, mask, grid))), grid

    def _through(self, x, grid, factors, shapes, row, keys, wanted) -> trunk.Passed:
        # evaluations have batches of many sizes: only training is worth compiling
        run = trunk.compiled_through if self.compiled and self.training else trunk.through
        turns = ANATOMIES[self.kind].turns(self.rope, self._turns, grid, self.num_prefix)
        saves = "none" if self.token_drop.p else self.checkpointing  # what is computed again would drop other entries
        return run(self.kind, self.blocks, x, turns, factors, shapes, row, keys, wanted, saves)

    def _embed(self, images: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Tensor:
        x = self.patch_embed.norm(self.patch_embed.proj(images).flatten(2).transpose(1, 2))
        if mask is None and self.has_mask_token and self.training:
            mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)  # the token is in every graph: no rank waits for its gradient
        if mask is not None:
            token = self.mask_token.to(x.dtype) if self.has_mask_token else x.new_zeros(())
            x = torch.where(mask.unsqueeze(-1), token, x)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.pos_embed is None:
            return torch.cat([*prefix, x], dim=1)
        own, patches = self.pos_embed.split((self.table_prefix, self.pos_embed.shape[1] - self.table_prefix), dim=1)
        x = x + position_table(patches, self.table_grid, grid, self.position)
        if not prefix:
            return x
        front = torch.cat(prefix, dim=1)
        return torch.cat([front + own if self.table_prefix else front, x], dim=1)


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Draw weights as attmask.md 1.1; norms, layer scales and the patch convolution keep the framework's values."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for table in (model.cls_token, model.reg_token, model.pos_embed):
        if table is not None:
            nn.init.normal_(table, std=0.02)

