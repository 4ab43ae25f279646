"""Parts that make a run ill on purpose, for recipes of `health_corpus.py`: `data.name=benchmarks.sick:Blank` and so on.

Each takes the strength of its fault: 1 is the fault whole, 0.5 half of it, 0 a healthy part.
"""

import torch
from torch import Tensor

from maskwise.data.shapes import Shapes
from maskwise.functional import draws, masks
from maskwise.methods.dino import DINO
from maskwise.methods.ibot import IBOT
from maskwise.methods.masking import Hidden, RandomMasking


class Blank(Shapes):
    """Shapes of which that share are one and the same empty grey picture."""

    def __init__(self, count: int = 240, size: int = 40, fault: float = 1.0, split: str = "train"):
        super().__init__(count, size, 0, split)
        self.fault = fault

    def image(self, i: int) -> Tensor:
        """Image i, or the grey one."""
        blank = (i * 7919 % 1000) / 1000 < self.fault
        return torch.full((3, self.size, self.size), 128, dtype=torch.uint8) if blank else super().image(i)


class Grey(Shapes):
    """Shapes that fade into their brightness: at 1 each is one grey of its own, and one number tells all about it."""

    def __init__(self, count: int = 240, size: int = 40, fault: float = 1.0, split: str = "train"):
        super().__init__(count, size, 0, split)
        self.fault = fault

    def image(self, i: int) -> Tensor:
        """Image i, faded."""
        level = 40 + 175 * (i * 7919 % 1000) / 1000
        return (level * self.fault + super().image(i) * (1 - self.fault)).to(torch.uint8)


class SameMask(RandomMasking):
    """Random masks of which that share of the hidden patches is the same in every view."""

    def __init__(self, ratio: float = 0.4, var: float = 0.0, prob: float = 0.5, fault: float = 1.0, seed: int = 0):
        super().__init__(ratio, var, prob, "view", seed)
        self.fault = fault

    def hide(self, attention, grid, keys, device) -> Hidden:
        """Hide the fixed patches first and draw the others."""
        patches = grid[0] * grid[1]
        noise = draws.uniform(keys.of(draws.MASK), patches)
        noise[:, : round(self.fault * int(self.ratio * patches))] -= 1
        mask = masks.random_mask(self.ratios(keys), grid, noise=noise)
        return Hidden(mask.to(device), int(mask.sum()))


class LessCentred(DINO):
    """DINO whose targets are centred by only what the fault leaves of the centers."""

    def __init__(self, encoder, head, *, fault: float = 1.0, **options):
        super().__init__(encoder, head, **options)
        self.fault = fault

    def aim(self, logits: Tensor, center: Tensor, temp: float) -> Tensor:
        """Targets by less than the center."""
        return super().aim(logits, center * (1 - self.fault), temp)


class PatchesLessCentred(IBOT):
    """iBOT whose patch targets are centred by only what the fault leaves of their center."""

    def __init__(self, encoder, head, masking, *, fault: float = 1.0, **options):
        super().__init__(encoder, head, masking, **options)
        self.fault = fault

    def aim(self, logits: Tensor, center: Tensor, temp: float) -> Tensor:
        """Targets, those of patches by less than their center."""
        return super().aim(logits, center * (1 - self.fault) if center is self.patch_center else center, temp)


class Broken(DINO):
    """DINO whose loss is no number in that share of the steps."""

    def __init__(self, encoder, head, *, fault: float = 1.0, **options):
        super().__init__(encoder, head, **options)
        self.fault = fault

    def forward(self, *crops, step: int, **options) -> dict[str, Tensor]:
        """The losses, or none."""
        answer = super().forward(*crops, step=step, **options)
        return {**answer, "loss": answer["loss"] * float("nan")} if step % 2 < 2 * self.fault else answer
