"""Crop images for supervised training: random resized crop, then a timm policy or color jitter, then random erasing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskwise.data.augmentation import random_erasing
from maskwise.data.augmentation.timm_policies import make_policy
from maskwise.data.batch import ColorParams, Erased, Params
from maskwise.data.multicrop import (
    MultiCrop,
    ScaledImage,
    channels_last,
    chunk_by_bytes,
    pixels_of,
    resized_crop,
    size_of,
)
from maskwise.data.options import SupervisedCropOptions
from maskwise.errors import UserError
from maskwise.functional import keyed_random

STREAM = 49  # distinct from the streams of functional.keyed_random
IMAGENET_MEAN = (0.485, 0.456, 0.406)
FILTERS = ("bicubic", "bilinear", "random")


class SupervisedCrop:
    """Crop an image once and copy it to `splits` views, the first without policy; keyed by (seed, epoch, sample, view).

    options: SupervisedCropOptions, or its fields as keyword arguments (`changes`). Without a policy the color jitter
    (brightness, contrast, saturation) runs on the device, as random erasing does. mean: per channel, in 0..1; the fill
    color of the policy. Has the interface of a MultiCrop without local crops. Raises UserError for values out of range.
    """

    local_number, local_size = 0, (1, 1)

    def __init__(
        self,
        options: SupervisedCropOptions | None = None,
        *,
        mean: Iterable[float] | None = None,
        seed: int = 0,
        **changes,
    ):
        options = replace(options or SupervisedCropOptions(), **changes)
        if options.interpolation not in FILTERS:
            raise UserError(
                f"augment.interpolation={options.interpolation!r} is unknown: choose one of {', '.join(FILTERS)}"
            )
        if options.splits < 1:
            raise UserError(f"augment.splits={options.splits} leaves no view of an image: choose 1 or more")
        jitter = options.jitter
        self.sampler = MultiCrop(
            global_size=options.size,
            local_number=0,
            global_scale=options.scale,
            ratio=options.ratio,
            flip=options.flip,
            jitter=(jitter, jitter, jitter, 0.0),
            jitter_prob=1.0 if jitter and options.policy is None else 0.0,
            gray_prob=0.0,
            blur_prob=(0.0, 0.0, 0.0),
            solarize_prob=0.0,
            seed=seed,
            global_number=1,
        )
        self.global_size, self.global_number, self.seed = self.sampler.global_size, options.splits, seed
        self.splits, self.erasing, self.skip_first = options.splits, options.erasing, options.skip_first
        self.interpolation, self.policy = options.interpolation, None
        self.boxes, self.sample_uniforms = self.sampler.boxes, self.sampler.sample_uniforms
        self.shrink_factor = self.sampler.shrink_factor
        if options.policy is not None:
            self.policy = make_policy(
                options.policy, min(self.global_size), tuple(mean or IMAGENET_MEAN), options.interpolation
            )

    @property
    def pixels(self) -> int:
        """Count the pixels of all views of one image."""
        return self.splits * math.prod(self.global_size)

    def batch(self, images: Iterable, samples, epoch: int, empty=torch.empty) -> tuple[Tensor, Tensor, Params]:
        """Crop n images (consumed one by one) -> uint8 [splits * n, C, h, w], no local crops, Params.

        Arguments as in `MultiCrop.batch`.
        """
        samples = torch.as_tensor(samples, dtype=torch.int64)
        count, size = len(samples), self.global_size
        uniforms = self.sample_uniforms(samples, epoch)
        keys = keyed_random.make_key(STREAM, self.seed, epoch, samples[:, None], torch.arange(self.splits))
        filters = self._filters(keys[:, 0])
        crops = None
        for first, chunk in chunk_by_bytes(images):
            if crops is None:
                like = pixels_of(chunk[0])
                crops = empty(self.splits * count, *size, len(like), dtype=like.dtype).permute(0, 3, 1, 2)
            boxes, flips = self.boxes(uniforms[first : first + len(chunk)], [size_of(image) for image in chunk])
            for i, (image, box, flip) in enumerate(zip(chunk, boxes, flips[:, 0].tolist()), first):
                if isinstance(image, ScaledImage):
                    image, box = image.pixels, image.scale_boxes(box)
                resized_crop(channels_last(image), box[0].tolist(), flip, crops[i : i + 1], filters[i])
                self._fill_views(crops[i::count], keys[i].tolist())
        params = Params(self._colors(samples, epoch), self._colors(samples[:0], epoch), self._erased(samples, epoch))
        return crops, crops[:0], params

    def _fill_views(self, views: Tensor, keys: list[int]) -> None:
        """Copy the first view [C, h, w] to the others and apply the policy, except to the first of several views."""
        for view in views[1:]:
            view.copy_(views[0])
        if self.policy is None:
            return
        if views.dtype != torch.uint8 or views.shape[1] != 3:
            raise UserError(
                f"augment.policy takes RGB images of 8 bits, and these have {views.shape[1]} channels of "
                f"{views.dtype}; give augment.policy=null"
            )
        for view, key in list(zip(views, keys))[1 if self.splits > 1 else 0 :]:
            with keyed_random.seed_scope(key):
                changed = self.policy(Image.fromarray(view.permute(1, 2, 0).contiguous().numpy()))
            view.copy_(torch.from_numpy(np.array(changed)).permute(2, 0, 1))

    def _filters(self, keys: Tensor) -> list[str]:
        if self.interpolation != "random":
            return [self.interpolation] * len(keys)
        return [("bilinear", "bicubic")[int(u)] for u in (2 * keyed_random.uniform(keys, 1)[:, 0]).tolist()]

    def _colors(self, samples: Tensor, epoch: int) -> ColorParams:
        colors = self.sampler.colors(samples, epoch)[torch.arange(len(samples)).repeat(self.splits)]
        if self.splits > 1:
            colors.jitter[: len(samples)] = False
        colors = colors.with_plan()
        # Hue is never shifted here, and even a shift of zero would round gray levels.
        steps = tuple(step for step in colors.plan.steps if step[0] != "hue")
        return replace(colors, plan=replace(colors.plan, steps=steps))

    def _erased(self, samples: Tensor, epoch: int) -> Erased | None:
        skip = int(self.skip_first)
        return random_erasing.sample(
            samples, epoch, self.splits, self.global_size, self.erasing, skip=skip, seed=self.seed
        )
