"""Backbone, pooling and final norm as one module: images in, features out."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from maskwise.functional.errors import UserError
from maskwise.functional.picture import orientation, to_rgb, turned
from maskwise.functional.resample import resize_image, short_side
from maskwise.nn.backbone import Backbone
from maskwise.nn.maps import MapBackbone
from maskwise.nn.pooling import POOLINGS, Pooling
from maskwise.nn.tokens import Features, Tokens

CROP_PCT = 0.875


@dataclass(frozen=True)
class Transform:
    """A PIL image or uint8 or uint16 [C, H, W] -> float [C, S, S], normalised; C is the length of `mean`.

    A PIL image is turned as its EXIF orientation says, as image files are everywhere here.
    The short side is resized to round(S / crop_pct), antialiased bicubic, then the centre is cut out (attmask.md 5.1).
    """

    size: tuple[int, int]
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image) -> Tensor:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        image = self.crop(image)
        return (image.float() / torch.iinfo(image.dtype).max - mean) / std

    def crop(self, image) -> Tensor:
        """The geometry alone: a PIL image or uint8 or uint16 [C, H, W] -> the same, [C, S, S]."""
        if not isinstance(image, Tensor):
            modes = {1: "L", 3: "RGB", 4: "RGBA"}
            if len(self.mean) not in modes:
                raise UserError(f"the encoder takes {len(self.mean)} channels; give tensors [{len(self.mean)}, H, W] instead of pictures")
            pixels = np.array(to_rgb(image) if len(self.mean) == 3 else image.convert(modes[len(self.mean)]))
            pixels = turned(pixels, orientation(image))
            image = torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous()
        height, width = image.shape[-2:]
        target = round(max(self.size) / self.crop_pct)
        image = resize_image(image, short_side((height, width), target))
        top, left = ((there - wanted) // 2 for there, wanted in zip(image.shape[-2:], self.size))
        return image[..., top : top + self.size[0], left : left + self.size[1]]


class Encoder(nn.Module):
    """Images -> Features: a backbone, a pooling of its tokens, and the backbone's final norm.

    norm="after" pools raw tokens and then normalises the vector (self-supervised SimPool), "before" normalises the
    tokens and then pools (supervised); for the class token the two are equal. Patches are normalised in both.
    Attributes: dim, mean, std, image_size (h, w), crop_pct, transform. Raises UserError where pooling and backbone do not fit.
    """

    def __init__(self, backbone: Backbone, pooling: nn.Module, norm: str = "after"):
        super().__init__()
        if norm not in ("after", "before"):
            raise UserError(f"pooling.norm={norm!r} is unknown: choose after or before")
        if "cls_attention" in pooling.needs and not backbone.has_class_token:
            remedy = "choose pooling simpool" if isinstance(backbone, MapBackbone) else "set backbone.class_token=true, or choose pooling simpool"
            lack = "has none" if getattr(backbone, "cls_token", None) is None else "hands none out"  # a PiT's stays inside
            raise UserError(f"pooling {pooling_row(pooling)} needs a class token and {backbone.name} {lack}: {remedy}")
        if getattr(pooling, "dim", backbone.dim) != backbone.dim:
            raise UserError(f"the pooling is {pooling.dim} wide and {backbone.name} {backbone.dim}: give the pooling the backbone's dim")
        self.backbone = backbone
        self.pooling = pooling
        self.norm = backbone.take_norm()
        self.norm_order = norm
        self.dim = backbone.dim
        self.mean, self.std, self.image_size = backbone.mean, backbone.std, backbone.image_size
        self.crop_pct = CROP_PCT

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        *,
        attention: bool = True,
        keys: bool = False,
        layers: tuple[int, ...] = (),
        drop_key: Tensor | None = None,
    ) -> Features:
        """Normalised float images [B, 3, H, W], bool mask [B, N] (True = hidden) -> Features.

        Without `attention` none is computed that only masking or a viewer would need; see Backbone.forward for the rest.
        """
        row = attention and "cls_attention" in self.pooling.needs
        return self._features(self.backbone(images, mask, attention=row, keys=keys, layers=layers, drop_key=drop_key), attention)

    def packs(self, images: Tensor) -> bool:
        """Whether images like these are better taken `together` with others."""
        return hasattr(self.backbone, "packs") and self.backbone.packs(images)

    def together(self, batches: list[tuple[Tensor, Tensor | None, Tensor | None]]) -> list[Features]:
        """Several batches of images of different sizes, each with mask and drop key, in one call -> Features of each, without attention."""
        return [self._features(tokens, False) for tokens in self.backbone.together(batches)]

    def _features(self, tokens: Tokens, attention: bool) -> Features:
        if self.norm_order == "before":
            tokens.patches, tokens.prefix = self.norm(tokens.patches), self.norm(tokens.prefix)
            pooled, patches = self.pooling(tokens), tokens.patches
            vector, vectors = pooled.vector, pooled.vectors
        else:
            pooled = self.pooling(tokens)
            vector, patches = self.norm(pooled.vector), self.norm(tokens.patches)
            vectors = None if pooled.vectors is None else self.norm(pooled.vectors)
        stages = None if tokens.stages is None else tuple(stage if stage.ndim == 4 else self.norm(stage) for stage in tokens.stages)
        return Features(vector, patches, pooled.attention if attention else None, tokens.grid, tokens.keys, stages, vectors)

    @property
    def transform(self) -> Transform:
        """What makes an image file's pixels an input of this encoder."""
        return Transform(tuple(self.image_size), self.crop_pct, tuple(self.mean), tuple(self.std))

    def uncoloured(self, image) -> Tensor:
        """What the encoder sees of a PIL image or uint8 [3, H, W], as a picture: uint8 [3, S, S]."""
        return self.transform.crop(image)

    def spec(self) -> dict:
        """What `encoder_from_spec` builds this encoder from, weights aside; JSON-able.

        Raises UserError for a pooling outside the table or a timm argument that JSON cannot hold.
        """
        pooling = {"name": pooling_row(self.pooling), **(self.pooling.arguments() if isinstance(self.pooling, Pooling) else {"dim": self.dim})}
        spec = {
            "backbone": self.backbone.spec(),
            "pooling": pooling,
            "norm": self.norm_order,
            "image_size": list(self.image_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "crop_pct": self.crop_pct,
        }
        try:
            return json.loads(json.dumps(spec))
        except TypeError as error:
            raise UserError(f"this encoder cannot be described in a file: {error}; give timm arguments by name") from None


def encoder_from_spec(spec: dict) -> Encoder:
    """Build the encoder that `Encoder.spec` described, with fresh weights; raises UserError for an unknown pooling."""
    pooling = dict(spec["pooling"])
    name = pooling.pop("name")
    if name not in POOLINGS:
        raise UserError(f"no pooling {name!r}; there are {', '.join(POOLINGS)}")
    encoder = Encoder(Backbone(**spec["backbone"]), POOLINGS[name](**pooling), norm=spec["norm"])
    encoder.image_size, encoder.crop_pct = tuple(spec["image_size"]), spec["crop_pct"]
    encoder.mean, encoder.std = tuple(spec["mean"]), tuple(spec["std"])
    return encoder


def pooling_row(pooling: nn.Module) -> str:
    """The name of a pooling in POOLINGS, or `module:Name` for one from elsewhere."""
    for name, cls in POOLINGS.items():
        if type(pooling) is cls:
            return name
    return f"{type(pooling).__module__}:{type(pooling).__name__}"
