"""The view of supervised training: one random resized crop, then timm's RandAugment, AutoAugment or AugMix, or colour jitter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from maskwise.data import erasing
from maskwise.data.batch import Colours, Params
from maskwise.data.multicrop import MultiCrop, Shrunk, channels_last, portions, resized_crop
from maskwise.data.policy import make_policy
from maskwise.functional import draws
from maskwise.functional.errors import UserError

STREAM = 49  # beside the streams of functional.draws
IMAGENET_MEAN = (0.485, 0.456, 0.406)
FILTERS = ("bicubic", "bilinear", "random")


class TrainCrop:
    """One crop of an image, or `splits` copies of it of which the first stays as it is, every choice keyed by (seed, epoch, sample, view).

    size in pixels; `scale` is the share of the image's area, `ratio` width over height. policy: what timm reads, such as
    rand-m9-mstd0.5-inc1, augmix-m3-w3 or original; None leaves colour `jitter` (brightness, contrast, saturation), which is done on the device as
    erasing is. interpolation: bicubic, bilinear or one of both by chance. erasing: its probability; `spare_first` keeps the first
    split from it. Has the shape of a MultiCrop with no local views. Raises UserError for values that cannot be.
    """

    local_number, local_size = 0, 1

    def __init__(
        self, *, size: int = 224, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip: float = 0.5, jitter: float = 0.4, policy: str | None = None,
        interpolation: str = "bicubic", splits: int = 1, erasing: float = 0.0, spare_first: bool = False, mean=None, seed: int = 0,
    ):  # fmt: skip
        if interpolation not in FILTERS:
            raise UserError(f"augment.interpolation={interpolation!r} is unknown: choose one of {', '.join(FILTERS)}")
        if splits < 1:
            raise UserError(f"augment.splits={splits} leaves no view of an image: choose 1 or more")
        plain = {"jitter_prob": 1.0 if jitter and policy is None else 0.0, "grey_prob": 0.0, "blur_prob": (0.0, 0.0, 0.0), "solarize_prob": 0.0}
        self.rule = MultiCrop(
            global_size=size, local_number=0, global_scale=scale, ratio=ratio, flip=flip, jitter=(jitter, jitter, jitter, 0.0), **plain, seed=seed, global_number=1
        )
        self.global_size, self.global_number, self.splits, self.seed = size, splits, splits, seed
        self.interpolation, self.erasing, self.spared = interpolation, erasing, int(spare_first)
        self.boxes, self.geometry, self.shrink = self.rule.boxes, self.rule.geometry, self.rule.shrink
        self.policy = None if policy is None else make_policy(policy, size, tuple(mean or IMAGENET_MEAN), interpolation)

    @property
    def pixels(self) -> int:
        """Pixels of all views of one image."""
        return self.splits * self.global_size**2

    def batch(self, images, samples, epoch: int, empty=torch.empty) -> tuple[torch.Tensor, torch.Tensor, Params]:
        """Crops of n images (an iterable, consumed one by one): uint8 [splits * n, C, S, S], no local ones, Params; as MultiCrop.batch."""
        samples = torch.as_tensor(samples, dtype=torch.int64)
        count, size = len(samples), self.global_size
        uniforms, keys = self.geometry(samples, epoch), draws.mix(STREAM, self.seed, epoch, samples[:, None], torch.arange(self.splits))
        filters = self._filters(keys[:, 0])
        crops = None
        for first, held in portions(images):
            if crops is None:
                like = held[0].pixels if isinstance(held[0], Shrunk) else held[0]
                crops = empty(self.splits * count, size, size, len(like), dtype=like.dtype).permute(0, 3, 1, 2)
            boxes, flips = self.boxes(uniforms[first : first + len(held)], [image.size if isinstance(image, Shrunk) else image.shape[1:] for image in held])
            for i, (image, box, flip) in enumerate(zip(held, boxes, flips[:, 0].tolist()), first):
                if isinstance(image, Shrunk):
                    image, box = image.pixels, image.boxes(box)
                resized_crop(channels_last(image), box[0].tolist(), flip, crops[i : i + 1], filters[i])
                self._copies(crops[i::count], keys[i].tolist())
        return crops, crops[:0], Params(self._colours(samples, epoch), self._colours(samples[:0], epoch), self._erased(samples, epoch))

    def _copies(self, views: torch.Tensor, keys: list[int]) -> None:
        """Fill the further views [splits, C, S, S] from the first, and change those that the policy is for."""
        for view in views[1:]:
            view.copy_(views[0])
        if self.policy is None:
            return
        if views.dtype != torch.uint8 or views.shape[1] != 3:
            raise UserError(f"augment.policy takes RGB images of 8 bits, and these have {views.shape[1]} channels of {views.dtype}; give augment.policy=null")
        for view, key in list(zip(views, keys))[1 if self.splits > 1 else 0 :]:
            with draws.seeded(key):
                changed = self.policy(Image.fromarray(view.permute(1, 2, 0).contiguous().numpy()))
            view.copy_(torch.from_numpy(np.array(changed)).permute(2, 0, 1))

    def _filters(self, keys: torch.Tensor) -> list[str]:
        if self.interpolation != "random":
            return [self.interpolation] * len(keys)
        return [("bilinear", "bicubic")[int(u)] for u in (2 * draws.uniform(keys, 1)[:, 0]).tolist()]

    def _colours(self, samples: torch.Tensor, epoch: int) -> Colours:
        colours = self.rule.colours(samples, epoch)[torch.arange(len(samples)).repeat(self.splits)]
        if self.splits > 1:
            colours.jitter[: len(samples)] = False
        colours = colours.planned()
        # without a hue to shift even the way there and back would cost grey levels
        return replace(colours, plan=replace(colours.plan, steps=tuple(step for step in colours.plan.steps if step[0] != "hue")))

    def _erased(self, samples: torch.Tensor, epoch: int):
        return erasing.draw(samples, epoch, self.splits, self.global_size, self.erasing, spared=self.spared, seed=self.seed)
