"""Multi-crop: which box of an image becomes which view, cut and resized on uint8; colour is drawn here, applied later."""

from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F

from maskwise.data.batch import Colours, Params
from maskwise.functional import draws
from maskwise.functional.errors import UserError

TRIES = 10
ORDERS = torch.tensor(list(permutations(range(4))))


class Shrunk:
    """An image decoded at a fraction of its size: `.pixels` uint8 [3, h, w], and `.size`, the height and width it has in full."""

    def __init__(self, pixels: torch.Tensor, size: tuple[int, int]):
        self.pixels, self.size = pixels, size

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes int64 [V, 4] of the image in full as boxes of the pixels there are, edges rounded to whole ones."""
        share = np.array(self.pixels.shape[1:]) / self.size
        start = np.rint(boxes[:, :2] * share).astype(np.int64)
        end = np.rint((boxes[:, :2] + boxes[:, 2:]) * share).astype(np.int64)
        return np.concatenate([start, np.maximum(end - start, 1)], 1)


class MultiCrop:
    """Two global (or `global_number`, 1 or 2) and L local views of an image, every choice keyed by (seed, epoch, sample, view) (attmask.md 3).

    Sizes in pixels; `scale` is the share of the image's area, `ratio` width over height; `jitter` the strengths of
    brightness, contrast, saturation, hue; blur_prob for the first global, the second global and the local views;
    solarisation only on the second global view. Raises UserError for values that cannot be.
    """

    def __init__(self, *, global_size=224, local_size=96, local_number=10, global_scale=(0.25, 1.0),
                 local_scale=(0.05, 0.25), ratio=(3 / 4, 4 / 3), flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1),
                 jitter_prob=0.8, grey_prob=0.2, blur_prob=(1.0, 0.1, 0.5), blur_sigma=(0.1, 2.0),
                 solarize_prob=0.2, seed=0, global_number=2):
        for name, size in (("global_size", global_size), ("local_size", local_size)):
            if size < 1:
                raise UserError(f"crops.{name} is {size}; it must be at least 1 pixel")
        if local_number < 0:
            raise UserError(f"crops.local_number is {local_number}; it must be 0 or more")
        for name, (low, high), top in (("global_scale", global_scale, 1), ("local_scale", local_scale, 1),
                                       ("ratio", ratio, float("inf")), ("blur_sigma", blur_sigma, float("inf"))):
            if not 0 < low <= high <= top:
                limits = "two rising shares of the area in (0, 1]" if top == 1 else "two rising positive numbers"
                raise UserError(f"crops.{name} is [{low}, {high}]; it must be {limits}")
        for name, values in (("flip", [flip]), ("jitter_prob", [jitter_prob]), ("grey_prob", [grey_prob]),
                             ("blur_prob", blur_prob), ("solarize_prob", [solarize_prob])):
            if not all(0 <= value <= 1 for value in values):
                raise UserError(f"crops.{name} is {list(values)}; probabilities lie in [0, 1]")
        if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
            raise UserError(f"crops.jitter is {list(jitter)}; it takes brightness, contrast, saturation >= 0 and hue in [0, 0.5]")
        if len(blur_prob) != 3:
            raise UserError(f"crops.blur_prob is {list(blur_prob)}; it takes three: first global, second global, local")
        self.global_size, self.local_size, self.local_number = global_size, local_size, local_number
        self.global_number = global_number
        self.views = global_number + local_number
        self.seed = seed
        self.flip, self.jitter_prob, self.grey_prob = flip, jitter_prob, grey_prob
        self.blur_sigma = blur_sigma
        self.scale = np.array([global_scale] * global_number + [local_scale] * local_number)
        self.ratio = ratio
        self.blur_prob = torch.tensor([*blur_prob[:global_number]] + [blur_prob[2]] * local_number)
        self.solarize_prob = torch.tensor([0.0, solarize_prob][:global_number] + [0.0] * local_number)
        strength = torch.tensor(jitter, dtype=torch.float64)
        middle = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        floor = torch.tensor([0.0, 0.0, 0.0, -1.0], dtype=torch.float64)
        self.factor_low = torch.maximum(middle - strength, floor)
        self.factor_span = middle + strength - self.factor_low

    def geometry(self, samples, epoch: int) -> np.ndarray:
        """Uniforms float64 [n, V, 23] of the samples' boxes: 10 tries of area and aspect, top, left, flip."""
        return draws.uniform(self._keys(draws.CROP, samples, epoch), 2 * TRIES + 3).numpy()

    def boxes(self, uniforms: np.ndarray, sizes) -> tuple[np.ndarray, np.ndarray]:
        """Boxes int64 [n, V, 4] (top, left, height, width) and flips bool [n, V].

        uniforms: [n, V, 23] from `geometry`; sizes: [n, 2] height and width of the images. Area uniform, aspect
        log-uniform, the first of ten tries that fits, else the largest centred box of an allowed aspect: the rule
        of torchvision's RandomResizedCrop.
        """
        height, width = np.asarray(sizes, dtype=np.int64).reshape(-1, 2, 1, 1).transpose(1, 0, 2, 3)
        low, high = self.scale[:, :1], self.scale[:, 1:]
        area = height * width * (low + (high - low) * uniforms[..., 0:2 * TRIES:2])
        ends = np.log(self.ratio)
        aspect = np.exp(ends[0] + (ends[1] - ends[0]) * uniforms[..., 1:2 * TRIES:2])
        tall, wide = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
        fits = (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)
        first = fits.argmax(-1)[..., None]
        found = np.take_along_axis(fits, first, -1)[..., 0]
        h = np.take_along_axis(tall, first, -1)[..., 0].astype(np.int64)
        w = np.take_along_axis(wide, first, -1)[..., 0].astype(np.int64)
        height, width = height[..., 0], width[..., 0]
        top = (uniforms[..., 2 * TRIES] * (height - h + 1)).astype(np.int64)
        left = (uniforms[..., 2 * TRIES + 1] * (width - w + 1)).astype(np.int64)
        if not found.all():
            whole_h = np.minimum(height, np.maximum(1, np.rint(width / self.ratio[0]))).astype(np.int64)
            whole_w = np.minimum(width, np.maximum(1, np.rint(height * self.ratio[1]))).astype(np.int64)
            h, w = np.where(found, h, whole_h), np.where(found, w, whole_w)
            top, left = np.where(found, top, (height - h) // 2), np.where(found, left, (width - w) // 2)
        return np.stack([top, left, h, w], -1), uniforms[..., 2 * TRIES + 2] < self.flip

    @property
    def pixels(self) -> int:
        """Pixels of all views of one image."""
        return self.global_number * self.global_size**2 + self.local_number * self.local_size**2

    def shrink(self, boxes: np.ndarray) -> int:
        """The largest of 1, 2, 4, 8 by which an image may be shrunk while decoded, so that no view of it is enlarged by that.

        boxes: int64 [V, 4] in whole pixels of the image.
        """
        sizes = np.array([self.global_size] * self.global_number + [self.local_size] * self.local_number)
        room = (boxes[:, 2:].min(1) // sizes).min()
        return max(k for k in (1, 2, 4, 8) if k <= max(room, 1))

    def colours(self, samples, epoch: int) -> Colours:
        """Colour parameters of all views of n samples, view-major: row v * n + i is view v of sample i."""
        u = draws.uniform(self._keys(draws.COLOR, samples, epoch), 10).transpose(0, 1)
        factors = self.factor_low + self.factor_span * u[..., 1:5]
        low, high = self.blur_sigma
        blurred = u[..., 7] < self.blur_prob[:, None]
        sigma = torch.where(blurred, low + (high - low) * u[..., 8], 0.0)
        return Colours(
            jitter=(u[..., 0] < self.jitter_prob).flatten(),
            factors=factors.float().flatten(0, 1),
            order=ORDERS[(u[..., 5] * len(ORDERS)).long()].flatten(0, 1),
            grey=(u[..., 6] < self.grey_prob).flatten(),
            sigma=sigma.float().flatten(),
            solarize=(u[..., 9] < self.solarize_prob[:, None]).flatten(),
        )

    def batch(self, images, samples, epoch: int, empty=torch.empty) -> tuple[torch.Tensor, torch.Tensor, Params]:
        """Views of n images (an iterable, consumed one by one): uint8 [2n, C, S, S], [L*n, C, s, s], Params; crop-major.

        Channels and type (uint8, uint16) are those of the images. Crops are channels-last in memory. empty(*shape, dtype=) makes their storage: the loader hands in shared memory.
        """
        samples = torch.as_tensor(samples, dtype=torch.int64)
        count = len(samples)
        uniforms = self.geometry(samples, epoch)
        targets = None
        for first, held in portions(images):
            if targets is None:
                like = held[0].pixels if isinstance(held[0], Shrunk) else held[0]
                global_crops, local_crops = (
                    empty(number * count, size, size, len(like), dtype=like.dtype).permute(0, 3, 1, 2)
                    for number, size in ((self.global_number, self.global_size), (self.local_number, self.local_size))
                )
                targets = [*global_crops.split(1), *local_crops.split(1)]
            sizes = [image.size if isinstance(image, Shrunk) else image.shape[1:] for image in held]
            boxes, flips = self.boxes(uniforms[first:first + len(held)], sizes)
            for i, (image, own, flipped) in enumerate(zip(held, boxes, flips.tolist()), first):
                if isinstance(image, Shrunk):
                    image, own = image.pixels, image.boxes(own)
                pixels = channels_last(image)
                for target, box, flip in zip(targets[i::count], own.tolist(), flipped):
                    resized_crop(pixels, box, flip, target)
        colours = self.colours(samples, epoch)
        first = self.global_number * count
        params = Params(colours[:first].planned(), colours[first:].planned())
        return global_crops, local_crops, params

    def __call__(self, image: torch.Tensor, *, sample: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor, Params]:
        """Views of one uint8 image [3, H, W]: globals [2, 3, S, S], locals [L, 3, s, s], colour parameters."""
        return self.batch([image], [sample], epoch)

    def _keys(self, stream: int, samples, epoch: int) -> torch.Tensor:
        samples = torch.as_tensor(samples, dtype=torch.int64)
        return draws.mix(stream, self.seed, epoch, samples[:, None], torch.arange(self.views))


def portions(images, limit: int = 1 << 25):
    """Runs of (first index, images) of at most about `limit` bytes, so that large photographs do not pile up."""
    held, size, first = [], 0, 0
    for image in images:
        held.append(image)
        size += (image.pixels if isinstance(image, Shrunk) else image).numel()
        if size >= limit:
            yield first, held
            first, held, size = first + len(held), [], 0
    if held:
        yield first, held


def channels_last(image: torch.Tensor) -> torch.Tensor:
    """uint8 [3, H, W] as [1, 3, H, W] in channels-last memory, which torch's uint8 kernel reads without repacking; a view where it can be."""
    return image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)  # this order, so that the stride of the batch is H * W * 3


def resized_crop(pixels: torch.Tensor, box, flip: bool, out: torch.Tensor, mode: str = "bicubic") -> torch.Tensor:
    """Write the box (top, left, height, width) of uint8 [1, 3, H, W], resized by antialiased bicubic (or bilinear), into uint8 [1, 3, S, S].

    Rows first or columns first as Pillow 13 chooses (measured): the value in between is rounded and clipped, so at
    sharp edges the order is worth up to a dozen grey levels. Earlier Pillow always took rows first, as torch does.
    """
    top, left, height, width = box
    size = out.shape[2]
    view = pixels[:, :, top:top + height, left:left + width]
    if pixels.dtype == torch.uint16:  # torch resizes no uint16
        view = F.interpolate(view.float(), size=(size, size), mode=mode, antialias=True).round_().clamp_(0, 65535)
        return out.copy_(view.flip(-1) if flip else view)
    if height > size and 2 * width < height + size:
        view = F.interpolate(view, size=(size, width), mode=mode, antialias=True)
    view = F.interpolate(view, size=(size, size), mode=mode, antialias=True)
    return out.copy_(view.flip(-1) if flip else view)
