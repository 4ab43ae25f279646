"""Abstract backbone: a timm model that turns images into tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.nn.backbones.checkpointing import CHECKPOINTING
from maskwise.nn.backbones.drop_path import DropPath
from maskwise.nn.backbones.families.base import Family
from maskwise.nn.backbones.pretrained import StateDict
from maskwise.nn.backbones.timm_registry import FAMILIES
from maskwise.nn.tokens import Tokens

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BackboneOptions:
    """Validated arguments of `factory.Backbone`; sizes as given, `pretrained` are weights already read."""

    name: str
    image_size: int | tuple[int, int] | None = None
    patch_size: int | tuple[int, int] | None = None
    class_token: bool | None = None
    position: str = "offset"
    drop_path: float = 0.0
    mask_token: bool = False
    pretrained: StateDict | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    timm_args: dict = field(default_factory=dict)


class BackboneBase(nn.Module, ABC):
    """A timm model that turns images into Tokens, before the final norm; built by `factory.Backbone`.

    Attributes: name, kind (timm class), dim, depth (blocks), patch_size (h, w; the total stride of feature maps),
    image_size (h, w), has_class_token, mean, std (for values in 0..1), position, class_token and timm_args as given;
    num_heads of transformers; num_prefix (tokens before the patches); stage_dims of feature maps, the stem's first.
    """

    has_class_token = False
    num_prefix = 0
    stage_dims: tuple[int, ...] | None = None
    cls_token: nn.Parameter | None
    norm: nn.Module
    # how the forward pass is computed, never its result; see `set_execution`
    supports_execution_options = False
    checkpointing = "none"
    compiled = False

    def __init__(self, model: nn.Module, options: BackboneOptions):
        super().__init__()
        self.name, self.position, self.timm_args = options.name, options.position, options.timm_args
        self.kind = type(model).__name__
        self.class_token = options.class_token
        self.has_own_stats = options.mean is not None
        width = self._adopt(model, options)
        self.mean, self.std = input_stats(model, options)
        if options.mask_token and width is None:
            raise no_mask_error(self.name, "masking none")
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if options.mask_token else None
        self.drop_path = DropPath(self.depth, options.drop_path, self.family.branches)
        self._taken_norm: tuple[nn.Module] | None = None

    @abstractmethod
    def _adopt(self, model: nn.Module, options: BackboneOptions) -> int | None:
        """Adopt the timm model's parts; returns the width of a mask token, None if unsupported."""

    @property
    def family(self) -> Family:
        """Adapter of the timm class; not an attribute, so that copies of a backbone share it."""
        return FAMILIES[self.kind]

    @property
    def has_mask_token(self) -> bool:
        """Whether masked patches get a learned token; without one they are zeros, its initial value."""
        return self.mask_token is not None

    def spec(self) -> dict:
        """Return the arguments that rebuild this backbone without its weights.

        JSON-able if the timm arguments are.
        """
        return {
            "name": self.name,
            **self._sizes(),
            "class_token": self.class_token,
            "position": self.position,
            "drop_path": self.drop_path.rate,
            "mask_token": self.has_mask_token,
            **({"mean": list(self.mean), "std": list(self.std)} if self.has_own_stats else {}),
            **self.timm_args,
        }

    @abstractmethod
    def _sizes(self) -> dict:
        """Return image_size and patch_size for `spec`."""

    @abstractmethod
    def grid_for(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return the patch grid (h, w) for an image size in pixels."""

    @abstractmethod
    def check_size(self, image_hw: tuple[int, int]) -> None:
        """Raise UserError for an unsupported image size in pixels."""

    def set_execution(self, *, checkpointing: str = "none", compiled: bool = False) -> None:
        """Choose how training steps are computed; results change by rounding only.

        `checkpointing` is "none", "elementwise" or "blocks" (see `transformer_blocks.run_blocks`); `compiled` compiles
        the blocks. Raises UserError for another word, or a family that supports neither.
        """
        if checkpointing not in CHECKPOINTING:
            raise UserError(f"speed.checkpointing={checkpointing!r} is unknown: choose {', '.join(CHECKPOINTING)}")
        if not self.supports_execution_options and (compiled or checkpointing != "none"):
            raise UserError(
                f"{self.name} supports neither speed.compile nor speed.checkpointing; leave them at false and auto"
            )
        self.checkpointing, self.compiled = checkpointing, compiled

    def take_norm(self) -> nn.Module:
        """Pass the final norm to an encoder; encoders that share a backbone share the norm."""
        if self._taken_norm is None:
            self._taken_norm = (self.norm,)  # in a tuple: no longer a submodule
            self.norm = nn.Identity()
        return self._taken_norm[0]

    def freeze_as_teacher_(self) -> BackboneBase:
        """Remove mask token, drop path and gradients in place, as for a teacher (DINO, sec. 3.1)."""
        self.mask_token = None
        self.drop_path.rate = 0.0
        return self.requires_grad_(False)

    def supports_packing(self, images: Tensor) -> bool:
        """Return whether `forward_packed` is faster for several sizes of images like these."""
        return False

    @abstractmethod
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
        """Float images [B, C, H, W], bool mask [B, N] (True = masked) -> Tokens.

        `attention` adds the class token's attention row of the last block, `keys` that block's keys (transformers
        only), `layers` the outputs of these blocks, or of the stages of feature maps with 0 the stem (negative from
        the end). `drop_key` int64 [B] keys each sample's drop path. With `patches` False only the class token is used:
        a transformer that has one computes its last block for it alone, and returns patches [B, 0, D] and prefix
        [B, 1, D]. Raises UserError for an unsupported image size.
        """


def input_stats(model: nn.Module, options: BackboneOptions) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std as given, else those of the pretrained weights, else ImageNet's."""
    if options.mean is not None:
        return tuple(options.mean), tuple(options.std)
    if options.pretrained is None:
        return IMAGENET_MEAN, IMAGENET_STD
    config = model.pretrained_cfg
    return tuple(config.get("mean") or IMAGENET_MEAN), tuple(config.get("std") or IMAGENET_STD)


def no_mask_error(name: str, alternative: str = "no mask") -> UserError:
    """Return the error of a network whose patches cannot be masked."""
    return UserError(f"{name} has no patch tokens to mask: choose a Vision Transformer or a Swin, or {alternative}")


def size_text(size: tuple[int, int]) -> str:
    """Format a size (h, w) for messages."""
    return f"{size[0]}x{size[1]}"
