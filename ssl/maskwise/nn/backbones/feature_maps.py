"""Networks with stages of feature maps; the positions of the last map are the patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.nn.backbones.base import BackboneBase, BackboneOptions, no_mask_error, size_text
from maskwise.nn.backbones.families.base import call_block
from maskwise.nn.backbones.pretrained import load_feature_maps
from maskwise.nn.tokens import Tokens

NARROW = 16  # floats of an AVX-512 register


class FeatureMapBackbone(BackboneBase):
    """A ResNet, ConvNeXt, EfficientNet or MobileNet, Swin, MaxViT, PiT, ResMLP or MLP-Mixer under timm's own keys.

    Patches are the positions of the last map in row-major order; there is no prefix and there are no keys. `layers`
    index the stem (0) and the stages; each is raw, [B, C, H, W], before the final norm, which ResNets lack. MLPs have
    one stage.
    """

    def _adopt(self, model: nn.Module, options: BackboneOptions) -> int | None:
        family = self.family
        if options.class_token and "class_token" not in family.timm_names:
            raise UserError(f"backbone.class_token=True cannot be set: {self.name} has no class token")
        if self.position != "offset" and "position" not in family.timm_names:
            raise UserError(f"backbone.position={self.position} cannot be set: {self.name} has no position table")
        if options.pretrained is None:
            redraw_outliers_(model)
        else:
            load_feature_maps(model, family, options.pretrained)
        self.stage_dims = tuple(family.widths(model))
        self.dim, self.depth = self.stage_dims[-1], len(family.blocks(model))
        self.stem_patch, stride = family.strides(model)
        self.patch_size, self.requested_patch_size = (stride, stride), options.patch_size
        native = options.image_size
        if native is None:
            native = (model.default_cfg.get("input_size") or (3, 224, 224))[1:]
        self.image_size = (native, native) if isinstance(native, int) else tuple(native)
        parts = family.parts(model)
        for name, part in {**parts, "cls_token": parts.get("cls_token")}.items():
            setattr(self, name, part)
        self._table_cache: dict = {}
        self.channels_last = family.channels_last and not has_narrow_strided_pointwise(model)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)
        self.check_size(self.image_size)
        return self.stage_dims[0] if family.supports_masking else None

    def _sizes(self) -> dict:
        return {"image_size": list(self.image_size), "patch_size": self.requested_patch_size}

    def grid_for(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return the last map's size (h, w) for an image size in pixels."""
        return tuple(self.family.grid_side(side, self.stem_patch, self.patch_size[0]) for side in image_hw)

    def check_size(self, image_hw: tuple[int, int]) -> None:
        """Raise UserError for sides below the total stride or not a multiple where needed, for MLPs any other size."""
        family, size = self.family, size_text(image_hw)
        if min(image_hw) < self.patch_size[0]:
            raise UserError(
                f"images of {size} pixels are smaller than the stride {self.patch_size[0]} of {self.name}: "
                "make them larger"
            )
        unit = family.divisor(self)
        if any(side % unit for side in image_hw):
            raise UserError(
                f"images of {size} pixels do not divide into patches of {size_text((unit, unit))}: "
                "resize or crop them to a multiple"
            )
        if family.fixed_size and tuple(image_hw) != self.image_size:
            raise UserError(
                f"images of {size} pixels do not fit {self.name}, which takes {size_text(self.image_size)} only: "
                "resize them, set backbone.image_size, and use no local crops (crops.local_number=0)"
            )
        family.check_size(self, tuple(image_hw))

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
        """Float images [B, C, H, W], bool mask [B, N] over the last map (True = masked) -> Tokens.

        See BackboneBase.forward; `attention`, `keys` and `patches` have no effect.
        """
        size = tuple(images.shape[-2:])
        self.check_size(size)
        family, count = self.family, len(self.stage_dims)
        x = self._embed(images, mask, self.grid_for(size))
        factors = self.drop_path(images.shape[0], images, drop_key)
        wanted = {layer % count for layer in layers}
        outputs = {0: family.to_map(x)} if 0 in wanted else {}
        index = 0
        for i, stage in enumerate(family.stages(self), start=1):
            x = family.enter_stage(self, i - 1, x)
            for block in stage:
                scale = None if factors is None else factors[index]
                x = call_block(block, family.run_block, block, x, scale, self._table_cache)
                index += 1
            if i == count - 1:
                x = family.leave_last_stage(self, x)
            if i in wanted:
                outputs[i] = family.to_map(x)
        last = family.to_map(x)
        patches = last.flatten(2).transpose(1, 2)
        stages = tuple(outputs[layer % count] for layer in layers) if layers else None
        return Tokens(patches, patches[:, :0], tuple(last.shape[-2:]), None, None, stages)

    def _embed(self, images: Tensor, mask: Tensor | None, grid: tuple[int, int]):
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        x = self.family.stem(self, images)
        if mask is None and self.has_mask_token and self.training:
            # the token is in every graph: DDP waits for the gradient of each parameter
            mask = torch.zeros(images.shape[0], grid[0] * grid[1], dtype=torch.bool, device=x.device)
        if mask is None:
            return x
        if not self.family.supports_masking:
            raise no_mask_error(self.name)
        token = self.mask_token.to(x.dtype) if self.has_mask_token else x.new_zeros(())
        return mask_patches(x, mask, token, grid, self.patch_size[0] // self.stem_patch)


def mask_patches(x: Tensor, mask: Tensor, token: Tensor, grid: tuple[int, int], merged: int) -> Tensor:
    """Replace stem patches x [B, h, w, C] by the token wherever the mask [B, N] of the last map's grid covers them.

    A position of `grid` covers `merged` x `merged` stem patches.
    """
    covered = mask.unflatten(1, grid)
    for dim in (1, 2):
        covered = covered.repeat_interleave(merged, dim=dim).narrow(dim, 0, x.shape[dim])
    return torch.where(covered.unsqueeze(-1), token, x)


def has_narrow_strided_pointwise(model: nn.Module) -> bool:
    """Return whether a strided 1 x 1 convolution has fewer than 16 input channels.

    In channels-last memory the gradient of its weights writes beyond its buffers on CPUs with AVX-512 (seen with torch
    2.14.1).
    """
    return any(
        isinstance(part, nn.Conv2d)
        and part.kernel_size == (1, 1)
        and part.stride != (1, 1)
        and part.in_channels // part.groups < NARROW
        for part in model.modules()
    )


@torch.no_grad()
def redraw_outliers_(model: nn.Module) -> None:
    """Redraw weights that timm's truncated normal left at its bounds of -2 and 2, one in 17 million.

    Its uniform draw may be exactly -1, whose inverse error function is infinite; a ConvNeXt-S starts with two to four
    such weights, a hundred standard deviations out.
    """
    for weight in model.parameters():
        if not weight.is_meta and (outliers := weight.abs() == 2).any():
            weight[outliers] = 0.02 * torch.randn(int(outliers.sum()))
