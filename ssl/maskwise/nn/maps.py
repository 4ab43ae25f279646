"""Convolutional networks, Swin, MaxViT, PiT and MLPs as backbones: maps, stage after stage, the last one read as patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.nn import swin
from maskwise.nn.backbone import Backbone, by
from maskwise.nn.timm_models import ANATOMIES
from maskwise.nn.tokens import Tokens
from maskwise.nn.weights import load_maps


class MapBackbone(Backbone):
    """A ResNet, ConvNeXt, EfficientNet or MobileNet, Swin, MaxViT, PiT, ResMLP or MLP-Mixer under timm's own names: patches are the places of the last map, row by row; no prefix, no keys.

    `layers` index the stem (0) and the stages; each comes raw, [B, C, H, W], before the final norm, which ResNets lack. MLPs have one stage.
    """

    num_prefix = 0

    def _take(self, model: nn.Module, image_size, patch_size, weights) -> int | None:
        anatomy = ANATOMIES[self.kind]
        if self.class_token and "class_token" not in anatomy.TAKES:
            raise UserError(f"backbone.class_token=True is not to be set: {self.name} has none")
        if self.position != "offset" and "position" not in anatomy.TAKES:
            raise UserError(f"backbone.position={self.position} is not to be set: {self.name} has no position table")
        if weights is None:
            draw_outliers_again_(model)
        else:
            load_maps(model, anatomy.translate, weights, anatomy.CLASSIFIER)
        self.stage_dims = tuple(anatomy.widths(model))
        self.dim, self.depth = self.stage_dims[-1], len(anatomy.blocks(model))
        self.stem_patch, total = anatomy.strides(model)
        self.patch_size, self.asked_patch = (total, total), patch_size
        native = (model.default_cfg.get("input_size") or (3, 224, 224))[1:] if image_size is None else image_size
        self.image_size = (native, native) if isinstance(native, int) else tuple(native)
        for name, part in anatomy.parts(model).items():
            setattr(self, name, part)
        self._cache: dict = {}
        self.check_size(self.image_size)
        return self.stage_dims[0] if anatomy.MASKS else None

    def _sizes(self) -> dict:
        return {"image_size": list(self.image_size), "patch_size": self.asked_patch}

    def grid_for(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """The last map's height and width for images of that size in pixels."""
        return tuple(ANATOMIES[self.kind].grid(side, self.stem_patch, self.patch_size[0]) for side in image_hw)

    def check_size(self, image_hw: tuple[int, int]) -> None:
        """Raises UserError for images with a side below the total stride, or one that is no multiple where one is needed; an MLP has one size."""
        if min(image_hw) < self.patch_size[0]:
            raise UserError(f"images of {by(image_hw)} pixels are smaller than the stride {self.patch_size[0]} of {self.name}: make them larger")
        unit = ANATOMIES[self.kind].divisor(self)
        if any(side % unit for side in image_hw):
            raise UserError(f"images of {by(image_hw)} pixels do not divide into patches of {by((unit, unit))}: resize or crop them to a multiple")
        if getattr(ANATOMIES[self.kind], "FIXED", False) and tuple(image_hw) != self.image_size:
            raise UserError(
                f"images of {by(image_hw)} pixels do not pass {self.name}, which mixes the patches of {by(self.image_size)} and of no other size: "
                "resize them, set backbone.image_size, and have no local crops (crops.local_number=0)"
            )
        if hasattr(ANATOMIES[self.kind], "check"):
            ANATOMIES[self.kind].check(self, tuple(image_hw))

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
        """Float images [B, C, H, W], bool mask [B, N] over the last map's places (True = hidden) -> Tokens; see Backbone.forward."""
        size = tuple(images.shape[-2:])
        self.check_size(size)
        anatomy, count = ANATOMIES[self.kind], len(self.stage_dims)
        x = self._embed(images, mask, self.grid_for(size))
        factors = self.drop_path(images.shape[0], images, drop_key)
        wanted = {layer % count for layer in layers}
        shown = {0: anatomy.to_map(x)} if 0 in wanted else {}
        done = 0
        for i, stage in enumerate(anatomy.stages(self)):
            x = anatomy.enter(self, i, x)
            for block in stage:
                arguments = block, x, None if factors is None else factors[done], self._cache
                gathered = getattr(block, "gathered", None)  # a block that is split over ranks collects its weights around what it does
                x = anatomy.pass_block(*arguments) if gathered is None else gathered(anatomy.pass_block, *arguments)
                done += 1
            if i + 2 == count and hasattr(anatomy, "leave"):
                x = anatomy.leave(self, x)
            if i + 1 in wanted:
                shown[i + 1] = anatomy.to_map(x)
        last = anatomy.to_map(x)
        patches = last.flatten(2).transpose(1, 2)
        stages = tuple(shown[layer % count] for layer in layers) if layers else None
        return Tokens(patches, patches[:, :0], tuple(last.shape[-2:]), None, None, stages)

    def _embed(self, images: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Tensor:
        x = ANATOMIES[self.kind].stem(self, images)
        if mask is None and self.has_mask_token and self.training:
            mask = torch.zeros(images.shape[0], grid[0] * grid[1], dtype=torch.bool, device=x.device)  # the token is in every graph
        if mask is None:
            return x
        if not ANATOMIES[self.kind].MASKS:
            raise UserError(f"{self.name} has no patch tokens to hide: choose a Vision Transformer or a Swin, or no mask")
        return swin.hide(x, mask, self.mask_token.to(x.dtype) if self.has_mask_token else x.new_zeros(()), grid, self.patch_size[0] // self.stem_patch)


@torch.no_grad()
def draw_outliers_again_(model: nn.Module) -> None:
    """Draw anew what timm's truncated normal left at its bounds of -2 and 2, a hundred standard deviations out: one weight in 17 million.

    Its uniform draw may be -1 to the bit, whose inverse error function is infinite; a ConvNeXt-S starts with two to four such weights.
    """
    for weight in model.parameters():
        if not weight.is_meta and (outside := weight.abs() == 2).any():
            weight[outside] = 0.02 * torch.randn(int(outside.sum()))
