"""timm's augmentation policies by name, with what a newer Pillow no longer takes mended."""

from __future__ import annotations

from PIL import Image, ImageOps

from maskwise.functional.errors import UserError
from maskwise.functional.torchvision_ready import ready_torchvision


def make_policy(name: str, size: int, mean: tuple[float, ...], interpolation: str):
    """timm's transform of a PIL image for a policy's name, with the settings that timm's own training has; raises UserError for one it cannot read."""
    ready_torchvision()
    from timm.data import auto_augment
    from timm.data.transforms import str_to_pil_interp

    hints = {"translate_const": int(size * 0.45), "img_mean": tuple(min(255, round(255 * value)) for value in mean)}
    if interpolation != "random":
        hints["interpolation"] = str_to_pil_interp(interpolation)
    kind = name.partition("-")[0]
    try:
        if kind == "rand":
            made = auto_augment.rand_augment_transform(name, hints)
        elif kind == "augmix":
            made = auto_augment.augment_and_mix_transform(name, {**hints, "translate_pct": 0.3})
        else:
            made = auto_augment.auto_augment_transform(name, hints)
    except (AssertionError, ValueError, KeyError, AttributeError):
        raise UserError(f"augment.policy={name!r} is nothing that timm reads: give rand-m9-mstd0.5-inc1, augmix-m3-w3, original, or null for none") from None
    return mended(made)


def mended(transform):
    """A transform of timm's whose posterisation also takes no bits, which it draws at full strength; what has no such operation is handed through."""
    from timm.data import auto_augment

    for operation in getattr(transform, "ops", None) or [each for row in getattr(transform, "policy", ()) for each in row]:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """Keep so many bits of each channel; none leaves black, as it did before Pillow refused it."""
    return image if bits >= 8 else ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)
