"""Encoder: backbone, pooling and final norm as one module; images in, features out."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from maskwise.compat import present_names
from maskwise.errors import UserError
from maskwise.nn.backbones.base import BackboneBase
from maskwise.nn.backbones.factory import Backbone
from maskwise.nn.backbones.transformer import TransformerBackbone
from maskwise.nn.pooling import POOLINGS, Pooling
from maskwise.nn.tokens import Features, Tokens
from maskwise.nn.transform import CROP_PCT, Transform
from maskwise.process.external_code import NoClass, external_class


class Encoder(nn.Module):
    """Images -> Features: a backbone, a pooling of its tokens, and the backbone's final norm.

    norm="after" pools raw tokens and then normalizes the vector (self-supervised SimPool), "before" normalizes the
    tokens and then pools (supervised); for the class token the two are equal. Patches are normalized in both.
    image_size (h, w), mean and std are the backbone's unless given; with crop_pct they define `transform`.
    Attributes: dim, mean, std, image_size, crop_pct, transform. Raises UserError where pooling and backbone do not fit.
    """

    def __init__(
        self,
        backbone: BackboneBase,
        pooling: nn.Module,
        norm: str = "after",
        *,
        image_size: tuple[int, int] | None = None,
        crop_pct: float = CROP_PCT,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        if norm not in ("after", "before"):
            raise UserError(f"pooling.norm={norm!r} is unknown: choose after or before")
        check_fit(backbone, pooling)
        self.backbone = backbone
        self.pooling = pooling
        self.norm = backbone.take_norm()
        self.norm_order = norm
        self.dim = backbone.dim
        self.mean = backbone.mean if mean is None else tuple(mean)
        self.std = backbone.std if std is None else tuple(std)
        self.image_size = backbone.image_size if image_size is None else tuple(image_size)
        self.crop_pct = crop_pct

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        *,
        attention: bool = True,
        keys: bool = False,
        layers: tuple[int, ...] = (),
        drop_key: Tensor | None = None,
        patches: bool = True,
    ) -> Features:
        """Normalized float images [B, C, H, W], bool mask [B, N] (True = masked) -> Features.

        `attention` False skips attention that only masking and visualization need; `patches` False says that the
        caller does not read `patches`, which then may be [B, 0, D]; see BackboneBase.forward for the other arguments.
        Raises UserError for other inputs, which `transform` makes from images.
        """
        self.check_inputs(images, mask, layers)
        cls_attention = attention and "cls_attention" in self.pooling.needs
        tokens = self.backbone(
            images,
            mask,
            attention=cls_attention,
            keys=keys,
            layers=layers,
            drop_key=drop_key,
            patches=patches or self._pooling_reads_patches,
        )
        return self._features(tokens, attention)

    def check_inputs(self, images: Tensor, mask: Tensor | None, layers: tuple[int, ...]) -> None:
        """Raise UserError for images, a mask or layers that the forward pass does not take."""
        check_images(images, len(self.mean), next(self.parameters(), None))
        if mask is not None:
            h, w = self.backbone.grid_for(tuple(images.shape[-2:]))
            if mask.dtype != torch.bool or tuple(mask.shape) != (images.shape[0], h * w):
                raise UserError(
                    f"a mask is bool [B, N], here [{images.shape[0]}, {h * w}], True where a patch is masked; "
                    f"this one is {list(mask.shape)} of {mask.dtype}"
                )
        stages = self.backbone.stage_dims
        count, first = (self.backbone.depth, "block") if stages is None else (len(stages), "stage")
        for layer in layers:
            if not -count <= layer < count:
                raise UserError(
                    f"layers={tuple(layers)}: {self.backbone.name} has {first}s 0 to {count - 1} (or -{count} to -1)"
                )

    def supports_packing(self, images: Tensor) -> bool:
        """Return whether `forward_packed` is faster for several sizes of images like these."""
        return self.backbone.supports_packing(images)

    def forward_packed(
        self, batches: list[tuple[Tensor, Tensor | None, Tensor | None]], patches: tuple[bool, ...] | None = None
    ) -> list[Features]:
        """Run batches of different image sizes, (images, mask, drop key) each, in one call; no attention.

        `patches` says for each batch whether the caller reads its patches (None: it reads all).
        """
        if self._pooling_reads_patches:
            patches = None
        return [self._features(tokens, False) for tokens in self.backbone.forward_packed(batches, patches)]

    @property
    def _pooling_reads_patches(self) -> bool:
        return getattr(self.pooling, "reads_patches", True)  # a pooling from elsewhere may not say

    def _features(self, tokens: Tokens, attention: bool) -> Features:
        if self.norm_order == "before":
            tokens.patches, tokens.prefix = self.norm(tokens.patches), self.norm(tokens.prefix)
            pooled, patches = self.pooling(tokens), tokens.patches
            vector, vectors = pooled.vector, pooled.vectors
        else:
            pooled = self.pooling(tokens)
            vector, patches = self.norm(pooled.vector), self.norm(tokens.patches)
            vectors = None if pooled.vectors is None else self.norm(pooled.vectors)
        layers = None
        if tokens.stages is not None:  # feature maps, [B, C, h, w], stay raw
            layers = tuple(stage if stage.ndim == 4 else self.norm(stage) for stage in tokens.stages)
        attention_map = pooled.attention if attention else None
        return Features(vector, patches, attention_map, tokens.grid, tokens.keys, layers, vectors)

    @property
    def transform(self) -> Transform:
        """Preprocessing of images for this encoder."""
        return Transform(tuple(self.image_size), self.crop_pct, tuple(self.mean), tuple(self.std))

    def uint8_crop(self, image) -> Tensor:
        """Resize and crop a PIL image or uint8 [C, H, W] as `transform` does, without normalization."""
        return self.transform.crop(image)

    def spec(self) -> dict:
        """Return the arguments that `encoder_from_spec` rebuilds this encoder from, without its weights; JSON-able.

        Raises UserError for an argument that JSON cannot hold.
        """
        arguments = self.pooling.arguments() if isinstance(self.pooling, Pooling) else {"dim": self.dim}
        spec = {
            "backbone": self.backbone.spec(),
            "pooling": {"name": pooling_name(self.pooling), **arguments},
            "norm": self.norm_order,
            "image_size": list(self.image_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "crop_pct": self.crop_pct,
        }
        try:
            return json.loads(json.dumps(spec))
        except TypeError as error:
            raise UserError(
                f"this encoder cannot be described in a file: {error}; give timm arguments by name"
            ) from None


def check_images(images, channels: int, weight: Tensor | None) -> None:
    """Raise UserError unless `images` is a batch [B, C, H, W] of normalized floats like the weights.

    Replicas of DataParallel have no parameters of their own.
    """
    expected = f"an encoder takes normalized floats [B, {channels}, H, W]"
    if not isinstance(images, Tensor):
        raise UserError(f"{expected}; this is a {type(images).__name__}: give encoder.transform(image)[None]")
    if not images.is_floating_point():
        raise UserError(f"{expected}; this is {images.dtype}: give encoder.transform(image)[None]")
    shape = list(images.shape)
    if images.ndim == 3 and shape[0] == channels:
        raise UserError(f"{expected}; this is {shape}: add the batch axis, images[None]")
    if images.ndim != 4:
        raise UserError(f"{expected}; this is {shape}: give torch.stack of encoder.transform(image)")
    if shape[1] != channels:
        hint = "images.permute(0, 3, 1, 2)" if shape[3] == channels else "encoder.transform(image), which converts them"
        raise UserError(f"{expected}; this is {shape}: give {hint}")
    if weight is None:
        return
    if images.device != weight.device:
        raise UserError(
            f"the images are on {images.device} and the encoder on {weight.device}: give images.to('{weight.device}')"
        )
    if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
        raise UserError(f"the images are {images.dtype} and the weights {weight.dtype}: give images.to({weight.dtype})")


def check_fit(backbone: BackboneBase, pooling: nn.Module) -> None:
    """Raise UserError where a pooling lacks the class token that it needs, or has another width."""
    if "cls_attention" in pooling.needs and not backbone.has_class_token:
        remedy = "set backbone.class_token=true, or choose pooling simpool"
        if not isinstance(backbone, TransformerBackbone):
            remedy = "choose pooling simpool"
        lacks = "has none" if backbone.cls_token is None else "keeps its own internal"  # PiT
        raise UserError(f"pooling {pooling_name(pooling)} needs a class token and {backbone.name} {lacks}: {remedy}")
    if getattr(pooling, "dim", backbone.dim) != backbone.dim:  # a pooling from elsewhere may not state its width
        raise UserError(
            f"the pooling has width {pooling.dim} and {backbone.name} {backbone.dim}: "
            "give the pooling the backbone's dim"
        )


def encoder_from_spec(spec: dict) -> Encoder:
    """Build the encoder of `Encoder.spec` with fresh weights; raises UserError for an unknown pooling."""
    pooling = present_names("pooling", spec["pooling"])
    name = pooling.pop("name")
    inputs = {key: spec[key] for key in ("image_size", "crop_pct", "mean", "std")}
    return Encoder(Backbone(**spec["backbone"]), pooling_class(name)(**pooling), norm=spec["norm"], **inputs)


def pooling_class(name: str) -> type[nn.Module]:
    """Return the class of a pooling, an entry of POOLINGS or `module:Name`; raises UserError for another name."""
    if name in POOLINGS:
        return POOLINGS[name]
    if ":" not in name:
        raise UserError(f"no pooling {name!r}; there are {', '.join(POOLINGS)}")
    try:
        return external_class(name)
    except NoClass as error:
        raise UserError(str(error)) from None


def pooling_name(pooling: nn.Module) -> str:
    """Return the name of a pooling in POOLINGS, or `module:Name` for one from elsewhere."""
    for name, cls in POOLINGS.items():
        if type(pooling) is cls:
            return name
    return f"{type(pooling).__module__}:{type(pooling).__name__}"
