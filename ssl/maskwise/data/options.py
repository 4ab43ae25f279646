"""Options of the crops and of the loader, as frozen dataclasses; the recipe sections reuse them."""

from dataclasses import dataclass
from typing import Literal, Optional

from maskwise.bounds import Count, Fraction, NonNegative, NonNegativeInt, Probability, Size


@dataclass(frozen=True)
class CropOptions:
    """Set multi-crop and its color augmentation (DINO, sec. 3.1; defaults of AttMask).

    Sizes in pixels, one side or (height, width), scales as shares of the image area, `jitter` the strengths of
    brightness, contrast, saturation and hue, `blur_prob` for the first global, the second global and the local crops,
    `blur_sigma` in pixels, solarization of the second global crop only.
    """

    global_size: Size = 224
    local_size: Size = 96
    local_number: NonNegativeInt = 10
    global_scale: tuple[Fraction, Fraction] = (0.25, 1.0)
    local_scale: tuple[Fraction, Fraction] = (0.05, 0.25)
    flip: Probability = 0.5
    jitter: tuple[NonNegative, NonNegative, NonNegative, NonNegative] = (0.4, 0.4, 0.2, 0.1)
    jitter_prob: Probability = 0.8
    gray_prob: Probability = 0.2
    blur_prob: tuple[Probability, Probability, Probability] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[NonNegative, NonNegative] = (0.1, 2.0)
    solarize_prob: Probability = 0.2


@dataclass(frozen=True)
class SupervisedCropOptions:
    """Set the crop of supervised training, with timm's arithmetic.

    size in pixels, one side or (height, width); scale as a share of the image area, ratio width over height. policy:
    RandAugment, AutoAugment or AugMix as timm spells it, such as rand-m9-mstd0.5-inc1 (null: color jitter). splits:
    views of an image; the first gets no policy, and with skip_first no random erasing. erasing: its probability.
    """

    size: Size = 224
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Probability = 0.5
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    policy: Optional[str] = None
    jitter: NonNegative = 0.4
    splits: Count = 1
    erasing: Probability = 0.0
    skip_first: bool = False


@dataclass(frozen=True)
class ReadOptions:
    """Set how the loader reads images.

    cache: "auto" keeps decoded images in memory where all processes together need less than 1 GiB, "none" never.
    corrupt_share: accepted share of unreadable images, checked by engine/unreadable_images.py. decoder: of JPEGs, one
    of `jpeg.NAMES`. jpeg_scaling: decode a JPEG at 1/2, 1/4 or 1/8 of its size where every crop still shrinks it
    further; disables the cache.
    """

    cache: Literal["auto", "none"] = "auto"
    corrupt_share: Probability = 0.01
    decoder: str = "auto"
    jpeg_scaling: bool = False
