"""Multi-crop: sample boxes and color parameters, crop and resize on uint8; colors are applied on the device."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F

from maskwise.data.batch import ColorParams, Params
from maskwise.data.options import CropOptions
from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.imaging.resize import is_vertical_first, pair

TRIES = 10
ORDERS = torch.tensor(list(permutations(range(4))))


class ScaledImage:
    """An image decoded at a fraction of its size: `.pixels` uint8 [3, h, w], `.size` the full (height, width)."""

    def __init__(self, pixels: torch.Tensor, size: tuple[int, int]):
        self.pixels, self.size = pixels, size

    def scale_boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Convert boxes int64 [V, 4] of the full image to boxes of `pixels`, edges rounded to whole pixels."""
        factor = np.array(self.pixels.shape[1:]) / self.size
        start = np.rint(boxes[:, :2] * factor).astype(np.int64)
        end = np.rint((boxes[:, :2] + boxes[:, 2:]) * factor).astype(np.int64)
        return np.concatenate([start, np.maximum(end - start, 1)], 1)


def check_crop_options(options: CropOptions, ratio: tuple[float, float]) -> None:
    """Raise UserError for sizes, scales, probabilities or strengths out of range."""
    for name in ("global_size", "local_size"):
        size = getattr(options, name)
        sides = [size] if isinstance(size, int) else list(size)
        if len(sides) > 2 or min(sides, default=0) < 1:
            raise UserError(f"crops.{name} is {size}; give one side or [height, width], each at least 1 pixel")
    if options.local_number < 0:
        raise UserError(f"crops.local_number is {options.local_number}; it must be 0 or more")
    values = {**asdict(options), "ratio": ratio}
    for name in ("global_scale", "local_scale", "ratio", "blur_sigma"):
        low, high = values[name]
        is_share = name.endswith("scale")
        if not 0 < low <= high <= (1 if is_share else float("inf")):
            limits = "two rising shares of the area in (0, 1]" if is_share else "two rising positive numbers"
            raise UserError(f"crops.{name} is [{low}, {high}]; it must be {limits}")
    for name in ("flip", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob"):
        probabilities = np.atleast_1d(values[name]).tolist()
        if not all(0 <= probability <= 1 for probability in probabilities):
            raise UserError(f"crops.{name} is {probabilities}; probabilities lie in [0, 1]")
    jitter, blur_prob = options.jitter, options.blur_prob
    if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
        raise UserError(
            f"crops.jitter is {list(jitter)}; it takes brightness, contrast, saturation >= 0 and hue in [0, 0.5]"
        )
    if len(blur_prob) != 3:
        raise UserError(f"crops.blur_prob is {list(blur_prob)}; it takes three: first global, second global, local")


class MultiCrop:
    """Sample two global and L local crops of an image, keyed by (seed, epoch, sample, view) (DINO, sec. 3.1).

    options: CropOptions, or its fields as keyword arguments (`changes`); ratio: width over height of the boxes;
    global_number: 1 or 2.
    Raises UserError for values out of range.
    """

    def __init__(
        self,
        options: CropOptions | None = None,
        *,
        seed: int = 0,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        global_number: int = 2,
        **changes,
    ):
        options = replace(options or CropOptions(), **changes)
        check_crop_options(options, ratio)
        self.seed, self.ratio, self.global_number = seed, ratio, global_number
        self.global_size, self.local_size = pair(options.global_size), pair(options.local_size)
        self.local_number = options.local_number
        self.views = global_number + options.local_number
        self.flip, self.jitter_prob, self.gray_prob = options.flip, options.jitter_prob, options.gray_prob
        self.blur_sigma = options.blur_sigma
        self.scale = np.array([options.global_scale] * global_number + [options.local_scale] * options.local_number)
        self.blur_prob = torch.tensor(
            [*options.blur_prob[:global_number]] + [options.blur_prob[2]] * options.local_number
        )
        self.solarize_prob = torch.tensor([0.0, options.solarize_prob][:global_number] + [0.0] * options.local_number)
        strength = torch.tensor(options.jitter, dtype=torch.float64)
        middle = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        floor = torch.tensor([0.0, 0.0, 0.0, -1.0], dtype=torch.float64)
        self.factor_low = torch.maximum(middle - strength, floor)
        self.factor_span = middle + strength - self.factor_low

    def sample_uniforms(self, samples, epoch: int) -> np.ndarray:
        """Draw the uniforms of the boxes -> float64 [n, V, 23]: 10 tries of area and aspect, top, left, flip."""
        return keyed_random.uniform(self._keys(keyed_random.CROP, samples, epoch), 2 * TRIES + 3).numpy()

    def boxes(self, uniforms: np.ndarray, sizes) -> tuple[np.ndarray, np.ndarray]:
        """Compute boxes int64 [n, V, 4] (top, left, height, width) and flips bool [n, V].

        uniforms: [n, V, 23] from `sample_uniforms`; sizes: [n, 2] height and width of the images. Area uniform, aspect
        log-uniform, the first of ten tries that fits, else the largest centered box of an allowed aspect, as in
        torchvision's RandomResizedCrop.
        """
        height, width = np.asarray(sizes, dtype=np.int64).reshape(-1, 2, 1, 1).transpose(1, 0, 2, 3)
        low, high = self.scale[:, :1], self.scale[:, 1:]
        area = height * width * (low + (high - low) * uniforms[..., 0 : 2 * TRIES : 2])
        ends = np.log(self.ratio)
        aspect = np.exp(ends[0] + (ends[1] - ends[0]) * uniforms[..., 1 : 2 * TRIES : 2])
        heights, widths = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
        fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
        first = fits.argmax(-1)[..., None]
        any_fits = np.take_along_axis(fits, first, -1)[..., 0]
        h = np.take_along_axis(heights, first, -1)[..., 0].astype(np.int64)
        w = np.take_along_axis(widths, first, -1)[..., 0].astype(np.int64)
        height, width = height[..., 0], width[..., 0]
        top = (uniforms[..., 2 * TRIES] * (height - h + 1)).astype(np.int64)
        left = (uniforms[..., 2 * TRIES + 1] * (width - w + 1)).astype(np.int64)
        if not any_fits.all():
            max_h = np.minimum(height, np.maximum(1, np.rint(width / self.ratio[0]))).astype(np.int64)
            max_w = np.minimum(width, np.maximum(1, np.rint(height * self.ratio[1]))).astype(np.int64)
            h, w = np.where(any_fits, h, max_h), np.where(any_fits, w, max_w)
            top, left = np.where(any_fits, top, (height - h) // 2), np.where(any_fits, left, (width - w) // 2)
        return np.stack([top, left, h, w], -1), uniforms[..., 2 * TRIES + 2] < self.flip

    @property
    def pixels(self) -> int:
        """Count the pixels of all crops of one image."""
        return self.global_number * math.prod(self.global_size) + self.local_number * math.prod(self.local_size)

    def shrink_factor(self, boxes: np.ndarray) -> int:
        """Return the largest shrink factor (1, 2, 4, 8) in decoding that enlarges no crop; boxes int64 [V, 4]."""
        sizes = np.array([self.global_size] * self.global_number + [self.local_size] * self.local_number)
        limit = (boxes[:, 2:] // sizes).min()
        return max(factor for factor in (1, 2, 4, 8) if factor <= max(limit, 1))

    def colors(self, samples, epoch: int) -> ColorParams:
        """Sample the color parameters of n samples, view-major: row v * n + i is view v of sample i."""
        u = keyed_random.uniform(self._keys(keyed_random.COLOR, samples, epoch), 10).transpose(0, 1)
        factors = self.factor_low + self.factor_span * u[..., 1:5]
        low, high = self.blur_sigma
        blurred = u[..., 7] < self.blur_prob[:, None]
        sigma = torch.where(blurred, low + (high - low) * u[..., 8], 0.0)
        return ColorParams(
            jitter=(u[..., 0] < self.jitter_prob).flatten(),
            factors=factors.float().flatten(0, 1),
            order=ORDERS[(u[..., 5] * len(ORDERS)).long()].flatten(0, 1),
            gray=(u[..., 6] < self.gray_prob).flatten(),
            sigma=sigma.float().flatten(),
            solarize=(u[..., 9] < self.solarize_prob[:, None]).flatten(),
        )

    def batch(
        self, images: Iterable, samples, epoch: int, empty=torch.empty
    ) -> tuple[torch.Tensor, torch.Tensor, Params]:
        """Crop n images (consumed one by one) -> [2n, C, H, W], [L*n, C, h, w] and Params, all crop-major.

        Channels and dtype (uint8 or uint16) are those of the images. Crops are channels-last in memory. empty(*shape,
        dtype=) allocates them: the loader passes shared memory.
        """
        samples = torch.as_tensor(samples, dtype=torch.int64)
        count = len(samples)
        uniforms = self.sample_uniforms(samples, epoch)
        targets = None
        for first, chunk in chunk_by_bytes(images):
            if targets is None:
                like = pixels_of(chunk[0])
                global_crops, local_crops = (
                    empty(number * count, *size, len(like), dtype=like.dtype).permute(0, 3, 1, 2)
                    for number, size in ((self.global_number, self.global_size), (self.local_number, self.local_size))
                )
                targets = [*global_crops.split(1), *local_crops.split(1)]
            boxes, flips = self.boxes(uniforms[first : first + len(chunk)], [size_of(image) for image in chunk])
            for i, (image, image_boxes, image_flips) in enumerate(zip(chunk, boxes, flips.tolist()), first):
                if isinstance(image, ScaledImage):
                    image, image_boxes = image.pixels, image.scale_boxes(image_boxes)
                pixels = channels_last(image)
                for target, box, flip in zip(targets[i::count], image_boxes.tolist(), image_flips):
                    resized_crop(pixels, box, flip, target)
        colors = self.colors(samples, epoch)
        num_global = self.global_number * count
        params = Params(colors[:num_global].with_plan(), colors[num_global:].with_plan())
        return global_crops, local_crops, params

    def __call__(self, image: torch.Tensor, *, sample: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor, Params]:
        """Crop one uint8 image [3, H, W] -> globals [2, 3, H, W], locals [L, 3, h, w], color parameters."""
        return self.batch([image], [sample], epoch)

    def _keys(self, stream: int, samples, epoch: int) -> torch.Tensor:
        samples = torch.as_tensor(samples, dtype=torch.int64)
        return keyed_random.make_key(stream, self.seed, epoch, samples[:, None], torch.arange(self.views))


def pixels_of(image: torch.Tensor | ScaledImage) -> torch.Tensor:
    """Return the decoded pixels [C, h, w] of a full or scaled image."""
    return image.pixels if isinstance(image, ScaledImage) else image


def size_of(image: torch.Tensor | ScaledImage) -> tuple[int, int]:
    """Return the full (height, width) of a full or scaled image."""
    return image.size if isinstance(image, ScaledImage) else image.shape[1:]


def chunk_by_bytes(images: Iterable, limit: int = 1 << 25) -> Iterator[tuple[int, list]]:
    """Yield (first index, images) in chunks of about `limit` bytes, which bounds the memory of large photographs."""
    chunk, size, first = [], 0, 0
    for image in images:
        chunk.append(image)
        size += pixels_of(image).numel()
        if size >= limit:
            yield first, chunk
            first, chunk, size = first + len(chunk), [], 0
    if chunk:
        yield first, chunk


def channels_last(image: torch.Tensor) -> torch.Tensor:
    """Convert uint8 [3, H, W] to [1, 3, H, W] in channels-last memory, the layout of torch's uint8 resize kernel."""
    # In this order the stride of the batch axis is H * W * 3.
    return image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)


def resized_crop(
    pixels: torch.Tensor, box: Sequence[int], flip: bool, out: torch.Tensor, mode: str = "bicubic"
) -> torch.Tensor:
    """Resize the box (top, left, height, width) of uint8 [1, 3, H, W], antialiased, into out [1, 3, h, w].

    Rows or columns first as Pillow chooses (`imaging.resize.is_vertical_first`).
    """
    top, left, height, width = box
    size = tuple(out.shape[2:])
    view = pixels[:, :, top : top + height, left : left + width]
    if pixels.dtype == torch.uint16:  # torch cannot resize uint16
        view = F.interpolate(view.float(), size=size, mode=mode, antialias=True).round_().clamp_(0, 65535)
        return out.copy_(view.flip(-1) if flip else view)
    if is_vertical_first((height, width), size):
        view = F.interpolate(view, size=(size[0], width), mode=mode, antialias=True)
    view = F.interpolate(view, size=size, mode=mode, antialias=True)
    return out.copy_(view.flip(-1) if flip else view)
