"""Build timm's augmentation policies by name, and keep them working with newer Pillow."""

from __future__ import annotations

from PIL import Image, ImageOps

from maskwise.compat import ready_torchvision
from maskwise.errors import UserError


def make_policy(name: str, size: int, mean: tuple[float, ...], interpolation: str):
    """Build timm's PIL transform for a policy name, as timm's training does; size: short side of the crops.

    Raises UserError for a bad name.
    """
    ready_torchvision()
    from timm.data import auto_augment
    from timm.data.transforms import str_to_pil_interp

    hints = {"translate_const": int(size * 0.45), "img_mean": tuple(min(255, round(255 * value)) for value in mean)}
    if interpolation != "random":
        hints["interpolation"] = str_to_pil_interp(interpolation)
    kind = name.partition("-")[0]
    try:
        if kind == "rand":
            policy = auto_augment.rand_augment_transform(name, hints)
        elif kind == "augmix":
            policy = auto_augment.augment_and_mix_transform(name, {**hints, "translate_pct": 0.3})
        else:
            policy = auto_augment.auto_augment_transform(name, hints)
    except (AssertionError, ValueError, KeyError, AttributeError):
        raise UserError(
            f"augment.policy={name!r} is not a timm policy: "
            "give rand-m9-mstd0.5-inc1, augmix-m3-w3, original, or null for none"
        ) from None
    return patch_posterize(policy)


def patch_posterize(transform):
    """Make a timm transform's posterization accept 0 bits, drawn at full magnitude; other transforms pass unchanged."""
    from timm.data import auto_augment

    operations = getattr(transform, "ops", None)
    if not operations:
        operations = [operation for sub_policy in getattr(transform, "policy", ()) for operation in sub_policy]
    for operation in operations:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """Keep `bits` bits of each channel; 0 bits give black, which newer Pillow refuses to compute."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)
