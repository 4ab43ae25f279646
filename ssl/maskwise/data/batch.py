"""The value that travels from the loader to the device: crops, colour parameters, labels and indices."""

from dataclasses import dataclass, field, replace

import torch

JITTER_OPS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class Plan:
    """Which rows each colour operation touches, known on the host, so that the device is never asked.

    steps: (operation, first, last) into `rows`, in the order in which they are applied; rows: int64 [sum];
    reach: half width in pixels of the widest box of the blur.
    """

    steps: tuple
    rows: torch.Tensor
    reach: int = 0


@dataclass(frozen=True)
class Colours:
    """Colour parameters of n crops (attmask.md 3).

    jitter bool [n]; factors float32 [n, 4] of brightness, contrast, saturation (1 = unchanged) and hue (turns);
    order int64 [n, 4]: which of the four comes at place k; grey bool [n]; sigma float32 [n] in pixels, 0 = no
    blur; solarize bool [n].
    """

    jitter: torch.Tensor
    factors: torch.Tensor
    order: torch.Tensor
    grey: torch.Tensor
    sigma: torch.Tensor
    solarize: torch.Tensor
    plan: Plan | None = None

    def __len__(self) -> int:
        return len(self.jitter)

    def __getitem__(self, rows) -> "Colours":
        """Parameters of some rows (a slice or an index tensor)."""
        return Colours(self.jitter[rows], self.factors[rows], self.order[rows], self.grey[rows],
                       self.sigma[rows], self.solarize[rows])

    def planned(self) -> "Colours":
        """The same with its plan; on the host, before it is moved."""
        if self.plan is not None:
            return self
        groups = [(op, self.jitter & (self.order[:, place] == k))
                  for place in range(4) for k, op in enumerate(JITTER_OPS)]
        groups += [("grey", self.grey), ("blur", self.sigma > 0), ("solarize", self.solarize)]
        steps, rows, first = [], [], 0
        for op, chosen in groups:
            found = chosen.nonzero().flatten()
            if len(found):
                steps.append((op, first, first + len(found)))
                rows.append(found)
                first += len(found)
        flat = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        widest = float(self.sigma.max()) if len(self) else 0.0
        return replace(self, plan=Plan(tuple(steps), flat, box_reach(widest)))

    def each(self, move) -> "Colours":
        """Apply `move` to every tensor, the plan's included."""
        plan = None if self.plan is None else replace(self.plan, rows=move(self.plan.rows))
        return Colours(move(self.jitter), move(self.factors), move(self.order), move(self.grey),
                       move(self.sigma), move(self.solarize), plan)


def box_reach(sigma: float) -> int:
    """Pixels that one pass of a three-pass extended box blur of this sigma reaches to each side."""
    return int(((4 * sigma * sigma + 1) ** 0.5 - 1) / 2) + 1


@dataclass(frozen=True)
class Erased:
    """Rectangles to be erased: rows int64 [m] of the crops, boxes int64 [m, 4] (top, left, height, width), keys int64 [m] of what is put there."""

    rows: torch.Tensor
    boxes: torch.Tensor
    keys: torch.Tensor

    def each(self, move) -> "Erased":
        """Apply `move` to every tensor."""
        return Erased(move(self.rows), move(self.boxes), move(self.keys))


@dataclass(frozen=True)
class Params:
    """Colour parameters of the global and of the local crops of a batch, rows as the crops; what is erased of the global ones."""

    global_: Colours
    local_: Colours
    erased: Erased | None = None

    def each(self, move) -> "Params":
        """Apply `move` to every tensor."""
        erased = None if self.erased is None else self.erased.each(move)
        return Params(self.global_.planned().each(move), self.local_.planned().each(move), erased)


@dataclass(frozen=True)
class Batch:
    """Crops of B images, crop-major: rows 0..B-1 are view 0 of every image.

    global_crops uint8 [2B, 3, S, S]; local_crops uint8 [L*B, 3, s, s]; params: Params; labels int64 [B] or None;
    index int64 [B]: the samples drawn, which key all randomness; step: the step of the run that it is for; corrupt: name -> reason of the files among them
    that could not be read; replaced: how many of the B show the next readable image instead.
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

    def each(self, move) -> "Batch":
        """Apply `move` to every tensor."""
        labels = None if self.labels is None else move(self.labels)
        return replace(self, global_crops=move(self.global_crops), local_crops=move(self.local_crops), params=self.params.each(move),
                       labels=labels, index=move(self.index))

    def to(self, device) -> "Batch":
        """The batch on a device; copies from pinned memory do not block."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory."""
        return self.each(lambda tensor: tensor.pin_memory())
