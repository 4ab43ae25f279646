"""Batches on their way from the loader to the device: crops, color parameters, labels and sample indices."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

JITTER_OPS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class ColorPlan:
    """List the rows that each color operation changes, computed on the host to avoid a device synchronization.

    steps: (operation, first, last) into `rows`, in order of application; rows: int64 [sum]; reach: half width in pixels
    of the widest blur box.
    """

    steps: tuple
    rows: torch.Tensor
    reach: int = 0


@dataclass(frozen=True)
class ColorParams:
    """Color parameters of n crops (DINO, sec. 3.1; BYOL, app. B).

    jitter bool [n]; factors float32 [n, 4] of brightness, contrast, saturation (1 = unchanged) and hue (turns); order
    int64 [n, 4]: the operation at place k; gray bool [n]; sigma float32 [n] in pixels, 0 = no blur; solarize bool [n].
    """

    jitter: torch.Tensor
    factors: torch.Tensor
    order: torch.Tensor
    gray: torch.Tensor
    sigma: torch.Tensor
    solarize: torch.Tensor
    plan: ColorPlan | None = None

    def __len__(self) -> int:
        return len(self.jitter)

    def __getitem__(self, rows) -> "ColorParams":
        """Select rows by a slice or an index tensor; the plan is dropped."""
        return ColorParams(
            self.jitter[rows],
            self.factors[rows],
            self.order[rows],
            self.gray[rows],
            self.sigma[rows],
            self.solarize[rows],
        )

    def with_plan(self) -> "ColorParams":
        """Add the plan; call it on the host, before the parameters move to a device."""
        if self.plan is not None:
            return self
        groups = [
            (op, self.jitter & (self.order[:, place] == k)) for place in range(4) for k, op in enumerate(JITTER_OPS)
        ]
        groups += [("gray", self.gray), ("blur", self.sigma > 0), ("solarize", self.solarize)]
        steps, rows, first = [], [], 0
        for op, chosen in groups:
            indices = chosen.nonzero().flatten()
            if len(indices):
                steps.append((op, first, first + len(indices)))
                rows.append(indices)
                first += len(indices)
        flat = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        widest = float(self.sigma.max()) if len(self) else 0.0
        return replace(self, plan=ColorPlan(tuple(steps), flat, box_reach(widest)))

    def map_tensors(self, function: Callable) -> "ColorParams":
        """Apply `function` to every tensor, those of the plan included."""
        plan = None if self.plan is None else replace(self.plan, rows=function(self.plan.rows))
        return ColorParams(
            function(self.jitter),
            function(self.factors),
            function(self.order),
            function(self.gray),
            function(self.sigma),
            function(self.solarize),
            plan,
        )


def box_reach(sigma: float) -> int:
    """Compute how many pixels one pass of a three-pass extended box blur reaches to each side."""
    return int(((4 * sigma * sigma + 1) ** 0.5 - 1) / 2) + 1


@dataclass(frozen=True)
class Erased:
    """List the rectangles of random erasing.

    rows int64 [m] of the crops, boxes int64 [m, 4] (top, left, height, width), keys int64 [m] of the fill values.
    """

    rows: torch.Tensor
    boxes: torch.Tensor
    keys: torch.Tensor

    def map_tensors(self, function: Callable) -> "Erased":
        """Apply `function` to every tensor."""
        return Erased(function(self.rows), function(self.boxes), function(self.keys))


@dataclass(frozen=True)
class Params:
    """Color parameters of global and local crops, one row per crop, and the erased boxes of global crops."""

    global_: ColorParams
    local_: ColorParams
    erased: Erased | None = None

    def map_tensors(self, function: Callable) -> "Params":
        """Apply `function` to every tensor."""
        erased = None if self.erased is None else self.erased.map_tensors(function)
        return Params(
            self.global_.with_plan().map_tensors(function), self.local_.with_plan().map_tensors(function), erased
        )


@dataclass(frozen=True)
class Batch:
    """Crops of B images, crop-major: rows 0..B-1 are view 0 of every image.

    global_crops uint8 [2B, 3, S, S]; local_crops uint8 [L*B, 3, s, s]; labels int64 [B] or None; index int64 [B]:
    sample ids, the keys of all randomness; corrupt: name -> reason of each unreadable file; replaced: how many of the B
    images are replacements of unreadable ones; step: step of the run.
    """

    global_crops: torch.Tensor
    local_crops: torch.Tensor
    params: Params
    labels: torch.Tensor | None
    index: torch.Tensor
    corrupt: dict = field(default_factory=dict)
    replaced: int = 0
    step: int = 0

    def __len__(self) -> int:
        return len(self.index)

    def map_tensors(self, function: Callable) -> "Batch":
        """Apply `function` to every tensor."""
        labels = None if self.labels is None else function(self.labels)
        return replace(
            self,
            global_crops=function(self.global_crops),
            local_crops=function(self.local_crops),
            params=self.params.map_tensors(function),
            labels=labels,
            index=function(self.index),
        )

    def to(self, device) -> "Batch":
        """Copy the batch to a device; copies from pinned memory do not block."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copy the batch to page-locked memory."""
        return self.map_tensors(lambda tensor: tensor.pin_memory())
