"""The backbone of an encoder: any supported timm model as a maker of tokens."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.nn.drop_path import DropPath
from maskwise.nn.timm_models import ANATOMIES, anatomy_of, build, timm  # noqa: F401  (made ready there)
from maskwise.nn.tokens import Tokens
from maskwise.nn.weights import CLASSIFIER, load_pretrained, mismatch, read_tensors, strip_prefixes  # noqa: F401  (they were at home here)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A timm model as a maker of tokens: images -> Tokens, before the final norm. The name decides which of its families is built.

    Transformers (VisionTransformer, Eva; `nn/transformer.py`): any image whose sides are multiples of the patch; the
    position table is resampled by `position` ("offset", "size" or "offset_always", see functional.resample).
    `class_token` None keeps the model's own choice. Maps (ResNet, ConvNeXt, EfficientNet with MobileNet V1 and V2, Swin V1 and V2, MaxViT, PiT, ResMLP and MLP-Mixer; `nn/maps.py`): any image with
    sides of the total stride at least, of MLPs those of `image_size` alone; the last map's places are the patches. `drop_path` is the last block's rate. `mask_token`
    adds the token that replaces hidden patches. `weights` is a local file of pretrained weights; without it all weights
    are drawn as the references draw them. `mean` and `std` (for values in 0..1) have a number for each channel of the
    images; None is ImageNet's RGB, or what the weights were trained with. Further timm arguments pass through.
    Attributes: dim, depth (blocks), patch_size (h, w; of maps the total stride), image_size (h, w), has_class_token,
    has_mask_token, mean, std; num_heads of transformers; stage_dims of maps, the stem's width first.
    Raises UserError for a name that timm lacks, a model of another family, an argument or a file that does not fit.
    """

    has_class_token = False

    def __new__(cls, name: str | None = None, **options):
        if cls is Backbone and name is not None:
            from maskwise.nn.maps import MapBackbone  # both families stand on this class
            from maskwise.nn.transformer import TransformerBackbone

            cls = MapBackbone if getattr(anatomy_of(name), "MAPS", False) else TransformerBackbone
        return super().__new__(cls)

    def __init__(
        self,
        name: str,
        *,
        image_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        class_token: bool | None = None,
        position: str = "offset",
        drop_path: float = 0.0,
        mask_token: bool = False,
        weights: str | Path | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **timm_args,
    ):
        super().__init__()
        if position not in ("offset", "size", "offset_always"):
            raise UserError(f"backbone.position={position!r} is unknown: choose offset, size or offset_always")
        if not 0 <= drop_path < 1:
            raise UserError(f"backbone.drop_path={drop_path} is not a rate: choose one from 0 to below 1")
        if (mean is None) != (std is None) or mean is not None and len(mean) != len(std):
            raise UserError(f"mean={mean} and std={std} do not go together: give both, one number a channel")
        channels = {} if mean is None or len(mean) == 3 else {"in_chans": len(mean)}
        model = build(name, image_size, patch_size, class_token, {**timm_args, **channels})
        self.name, self.position, self.timm_args, self.kind = name, position, timm_args, type(model).__name__
        self.class_token = class_token
        self.channels_given = mean is not None
        self.mean, self.std = (IMAGENET_MEAN, IMAGENET_STD) if mean is None else (tuple(mean), tuple(std))
        width = self._take(model, image_size, patch_size, weights)
        if weights is not None and mean is None:
            self.mean, self.std = (tuple(model.pretrained_cfg.get(key) or default) for key, default in (("mean", self.mean), ("std", self.std)))
        if mask_token and width is None:
            raise UserError(f"{name} has no patch tokens to hide: choose a Vision Transformer or a Swin, or masking none")
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if mask_token else None
        self.drop_path = DropPath(self.depth, drop_path, getattr(ANATOMIES[self.kind], "BRANCHES", 2))
        self._handed: tuple[nn.Module] | None = None

    def _take(self, model: nn.Module, image_size, patch_size, weights: str | Path | None) -> int | None:
        """Make the timm model's parts this module's own; returns the width of a mask token, None where none can be."""
        raise NotImplementedError

    @property
    def has_mask_token(self) -> bool:
        """Whether hidden patches have a learned token; without one they are replaced by zeros, its first value."""
        return self.mask_token is not None

    def spec(self) -> dict:
        """The arguments that build this backbone again, weights aside; JSON-able where the timm arguments are."""
        return {
            "name": self.name,
            **self._sizes(),
            "class_token": self.class_token,
            "position": self.position,
            "drop_path": self.drop_path.rate,
            "mask_token": self.has_mask_token,
            **({"mean": list(self.mean), "std": list(self.std)} if self.channels_given else {}),
            **self.timm_args,
        }

    def _sizes(self) -> dict:
        """image_size and patch_size as they were given."""
        raise NotImplementedError

    def grid_for(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """The patch grid (h, w) of images of that size in pixels."""
        raise NotImplementedError

    def check_size(self, image_hw: tuple[int, int]) -> None:
        """Raises UserError for images of a size that this backbone does not take."""
        raise NotImplementedError

    def take_norm(self) -> nn.Module:
        """Hand the final norm to whoever orders pooling and norm; encoders that share a backbone share it too."""
        if self._handed is None:
            self._handed = (self.norm,)  # in a tuple: remembered, but no longer a part of this module
            self.norm = nn.Identity()
        return self._handed[0]

    def freeze_as_teacher_(self) -> Backbone:
        """Make this a teacher's backbone in place: no mask token, no drop path, no gradients (attmask.md 1.1)."""
        self.mask_token = None
        self.drop_path.rate = 0.0
        return self.requires_grad_(False)

    def packs(self, images: Tensor) -> bool:
        """Whether batches of several image sizes are better taken together."""
        return False

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
        """Float images [B, C, H, W], bool mask [B, N] (True = hidden) -> Tokens.

        `attention` adds the class token's row of the last block, `keys` that block's keys (transformers only), `layers`
        the outputs of the blocks of these indices, or of the stages of maps, 0 being the stem (negative from the end).
        `drop_key` int64 [B] draws the drop path of each row. Raises UserError for images of a size that does not fit.
        """
        raise NotImplementedError


_arguments = inspect.signature(Backbone.__init__)
Backbone.__signature__ = _arguments.replace(parameters=list(_arguments.parameters.values())[1:])  # not that of __new__


def by(size: tuple[int, int]) -> str:
    """A size in words."""
    return f"{size[0]}x{size[1]}"
