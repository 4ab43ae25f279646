"""Vision transformers: any image size, mask token, keyed drop path, the CLS attention row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.functional import attention
from maskwise.functional.resample import position_table
from maskwise.nn.backbones import varlen_attention
from maskwise.nn.backbones.base import BackboneBase, BackboneOptions, size_text
from maskwise.nn.backbones.families.conv_stem import embed_patches, total_patch
from maskwise.nn.backbones.pretrained import load_transformer
from maskwise.nn.backbones.transformer_blocks import BlockOutputs, run_blocks, run_blocks_compiled
from maskwise.nn.backbones.varlen_attention import Rows
from maskwise.nn.tokens import Tokens


class TransformerBackbone(BackboneBase):
    """A VisionTransformer or Eva: class token and registers as prefix, positions from a table or by rotation."""

    supports_execution_options = True

    def _adopt(self, model: nn.Module, options: BackboneOptions) -> int:
        self.dim, self.depth = model.embed_dim, len(model.blocks)
        self.num_heads = model.blocks[-1].attn.num_heads
        self.patch_size, self.image_size = total_patch(model.patch_embed), tuple(model.patch_embed.img_size)
        if any(side % patch for side, patch in zip(self.image_size, self.patch_size)):
            raise UserError(
                f"image_size {size_text(self.image_size)} is not a multiple of the patch "
                f"{size_text(self.patch_size)}: choose a multiple"
            )
        self.table_grid = self.grid_for(self.image_size)
        self.has_class_token = model.cls_token is not None
        self.num_prefix = model.num_prefix_tokens
        self.table_prefix = 0 if model.no_embed_class else self.num_prefix
        if options.pretrained is None:
            initialize(model)
        else:
            load_transformer(model, self.family, options.pretrained, self.table_prefix, self.table_grid)
        for name in ("patch_embed", "norm_pre", "blocks", "norm", "cls_token", "reg_token", "pos_embed"):
            setattr(self, name, getattr(model, name))
        self.rope = getattr(model, "rope", None)  # Eva only
        self._rope_cache: dict = {}
        self.token_drop = nn.Dropout(0.0)  # see set_token_dropout_
        return self.dim

    def _sizes(self) -> dict:
        return {
            "image_size": [side * patch for side, patch in zip(self.table_grid, self.patch_size)],
            "patch_size": list(self.patch_size),
        }

    def grid_for(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return the patch grid (h, w) for an image size in pixels."""
        return image_hw[0] // self.patch_size[0], image_hw[1] // self.patch_size[1]

    def check_size(self, image_hw: tuple[int, int]) -> None:
        """Raise UserError for image sides that are not multiples of the patch."""
        if any(side % patch for side, patch in zip(image_hw, self.patch_size)):
            raise UserError(
                f"images of {size_text(image_hw)} pixels do not divide into patches of {size_text(self.patch_size)}: "
                "resize or crop them to a multiple"
            )

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        *,
        attention: bool = False,
        keys: bool = False,
        layers: tuple[int, ...] = (),
        drop_key: Tensor | None = None,
        patches: bool = True,
    ) -> Tokens:
        """Float images [B, C, H, W], bool mask [B, N] (True = masked) -> Tokens; see BackboneBase.forward."""
        x, grid = self._tokens(images, mask)
        factors = self.drop_path(x.shape[0], x, drop_key)
        stages = frozenset(layer % self.depth for layer in layers)
        rows = None if patches or self.depth - 1 in stages else self._class_rows((x.shape[1],), (False,))
        out = self._run_blocks(
            x, grid, factors, cls_attention=attention and self.has_class_token, keys=keys, stages=stages, rows=rows
        )
        return Tokens(
            out.x[:, self.num_prefix :],
            out.x[:, : self.num_prefix],
            grid,
            None if out.cls_attention is None else out.cls_attention[..., self.num_prefix :],
            None if out.keys is None else out.keys[:, self.num_prefix :],
            tuple(out.stages[layer % self.depth] for layer in layers) if layers else None,
        )

    def class_attention(self, images: Tensor) -> Tensor:
        """Return the class token's attention to the patches in every block, [B, depth, heads, N], float32.

        Rows sum to less than 1, since prefix tokens are among the keys. Raises UserError without a class token.
        """
        if not self.has_class_token:
            raise UserError(f"{self.name} has no class token here, so that no block has attention of one")
        x, grid = self._tokens(images, None)
        rope = self.family.rope(self.rope, self._rope_cache, grid, self.num_prefix)
        rows = []
        for i, block in enumerate(self.blocks):
            residual, q, k, _ = self.family.attention_branch(block, x, rope, i)
            rows.append(attention.cls_attention(q[:, :, 0], k, block.attn.scale)[..., self.num_prefix :])
            x = x + residual
            x = x + self.family.mlp_branch(block, x)
        return torch.stack(rows, dim=1)

    def supports_packing(self, images: Tensor) -> bool:
        """Return whether attention over packed sequences has a kernel for images like these."""
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
        return self.family.supports_packing and varlen_attention.is_supported(images.device, dtype)

    def forward_packed(
        self, batches: list[tuple[Tensor, Tensor | None, Tensor | None]], patches: tuple[bool, ...] | None = None
    ) -> list[Tokens]:
        """Run batches of different image sizes, (images, mask, drop key) each, as one packed batch.

        `patches` says for each batch whether its patches are used (None: all are), as in `forward`.
        """
        inputs = [self._tokens(images, mask) for images, mask, _ in batches]
        shapes = tuple(x.shape[:2] for x, _ in inputs)
        factors = [self.drop_path(len(x), x, key) for (x, _), (_, _, key) in zip(inputs, batches)]
        if factors[0] is None:
            packed_factors = None
        else:
            packed_factors = torch.cat(
                [part.expand(-1, -1, -1, shape[1], -1).flatten(2, 3) for part, shape in zip(factors, shapes)], dim=2
            )
        packed = torch.cat([x.flatten(0, 1) for x, _ in inputs])
        rows = None if patches is None else self._class_rows(tuple(length for _, length in shapes), patches)
        packed = self._run_blocks(packed, inputs[0][1], packed_factors, shapes=shapes, rows=rows).x
        shapes_out = shapes if rows is None else varlen_attention.shapes_of_rows(shapes, rows)
        batches_out = packed.split([batch * length for batch, length in shapes_out])
        tokens = []
        for x, shape, (_, grid) in zip(batches_out, shapes_out, inputs):
            x = x.unflatten(0, shape)
            tokens.append(Tokens(x[:, self.num_prefix :], x[:, : self.num_prefix], grid))
        return tokens

    def _tokens(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        """Embed images -> tokens [B, T, D] with positions, and the patch grid."""
        size = tuple(images.shape[-2:])
        self.check_size(size)
        grid = self.grid_for(size)
        return self.norm_pre(self.token_drop(self._embed(images, mask, grid))), grid

    def _class_rows(self, lengths: Rows, patches: tuple[bool, ...]) -> Rows | None:
        """Return how many leading tokens of each sequence are used after the last block; None for all."""
        # dropout draws one number per entry: fewer tokens would be other draws
        if all(patches) or not self.has_class_token or (self.training and has_dropout(self.blocks[-1])):
            return None
        return tuple(length if used else 1 for length, used in zip(lengths, patches))

    def _run_blocks(
        self, x, grid, factors, *, shapes=None, cls_attention=False, keys=False, stages=frozenset(), rows=None
    ) -> BlockOutputs:
        # evaluation has batches of many sizes: only training is worth compiling
        run = run_blocks_compiled if self.compiled and self.training else run_blocks
        rope = self.family.rope(self.rope, self._rope_cache, grid, self.num_prefix)
        # recomputation would draw other dropout
        checkpointing = "none" if self.token_drop.p else self.checkpointing
        return run(self.family, self.blocks, x, rope, factors, shapes, cls_attention, keys, stages, checkpointing, rows)

    def _embed(self, images: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Tensor:
        x = embed_patches(self.patch_embed, images)
        if mask is None and self.has_mask_token and self.training:
            # the token is in every graph: DDP waits for the gradient of each parameter
            mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        if mask is not None:
            token = self.mask_token.to(x.dtype) if self.has_mask_token else x.new_zeros(())
            x = torch.where(mask.unsqueeze(-1), token, x)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.pos_embed is None:
            return torch.cat([*prefix, x], dim=1)
        rows = self.pos_embed.shape[1]
        prefix_table, table = self.pos_embed.split((self.table_prefix, rows - self.table_prefix), dim=1)
        x = x + position_table(table, self.table_grid, grid, self.position)
        if not prefix:
            return x
        front = torch.cat(prefix, dim=1)
        return torch.cat([front + prefix_table if self.table_prefix else front, x], dim=1)


def has_dropout(block: nn.Module) -> bool:
    """Return whether a block draws dropout in training."""
    return any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in block.modules())


def set_token_dropout_(backbone: nn.Module, rate: float) -> None:
    """Set the dropout of a VisionTransformer's tokens where timm's `drop_rate` acts.

    That is on the tokens at the start, after every projection and twice in every MLP. The draws are torch's: by key,
    one for each of T * D entries in 37 places would cost as much as the blocks. Raises UserError for another backbone.
    """
    if not isinstance(backbone, TransformerBackbone) or backbone.kind != "VisionTransformer":
        raise UserError(
            f"method.dropout={rate} is for Vision Transformers only: set it to 0, or use classifier.dropout instead"
        )
    layers = [backbone.token_drop]
    for block in backbone.blocks:
        layers += [block.attn.proj_drop, *(layer for layer in block.mlp.modules() if isinstance(layer, nn.Dropout))]
    for layer in layers:
        layer.p = rate


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Initialize as the DINO and iBOT code: Linears and tables at std 0.02, biases at 0.

    Norms, layer scales and the patch convolution keep torch's and timm's values.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for table in (model.cls_token, model.reg_token, model.pos_embed):
        if table is not None:
            nn.init.normal_(table, std=0.02)
