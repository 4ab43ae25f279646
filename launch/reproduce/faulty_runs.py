"""Datasets, maskings and methods with a deliberate fault, for the recipes of `health_corpus.py`.

Named in a recipe as `data.name=launch.reproduce.faulty_runs:Blank`. fault: 0 is healthy, 1 the full fault.
"""

import dataclasses

import torch
from torch import Tensor

from maskwise.data.datasets.shapes import Shapes
from maskwise.functional import keyed_random, masks
from maskwise.functional.chunked_losses import TeacherProbs
from maskwise.methods.dino import DINO
from maskwise.methods.ibot import IBOT
from maskwise.methods.masking import RandomMasking, SampledMasks


class Blank(Shapes):
    """Shapes, a share `fault` of which is replaced by one empty gray image."""

    def __init__(self, count: int = 240, size: int = 40, fault: float = 1.0, split: str = "train"):
        super().__init__(count, size, 0, split)
        self.fault = fault

    def image(self, i: int) -> Tensor:
        """Return image i, or the gray one."""
        blank = (i * 7919 % 1000) / 1000 < self.fault
        return torch.full((3, self.size, self.size), 128, dtype=torch.uint8) if blank else super().image(i)


class Gray(Shapes):
    """Shapes faded into a constant gray level per image; with fault 1 one number describes an image."""

    def __init__(self, count: int = 240, size: int = 40, fault: float = 1.0, split: str = "train"):
        super().__init__(count, size, 0, split)
        self.fault = fault

    def image(self, i: int) -> Tensor:
        """Return image i, faded."""
        level = 40 + 175 * (i * 7919 % 1000) / 1000
        return (level * self.fault + super().image(i) * (1 - self.fault)).to(torch.uint8)


class SameMask(RandomMasking):
    """Random masks, a share `fault` of whose masked patches is the same in every view."""

    def __init__(self, ratio: float = 0.4, var: float = 0.0, prob: float = 0.5, fault: float = 1.0, seed: int = 0):
        super().__init__(ratio, var, prob, "view", seed)
        self.fault = fault

    def choose_patches(self, attention, grid, keys, device) -> SampledMasks:
        """Mask the fixed patches first and sample the others."""
        patches = grid[0] * grid[1]
        noise = keyed_random.uniform(keys.of(keyed_random.MASK), patches)
        noise[:, : round(self.fault * int(self.ratio * patches))] -= 1
        mask = masks.random_mask(self.ratios(keys), grid, noise=noise)
        return SampledMasks(mask.to(device), int(mask.sum()))


class LessCentered(DINO):
    """DINO whose targets are centered by (1 - fault) times the center."""

    def __init__(self, encoder, head, *, fault: float = 1.0, **options):
        super().__init__(encoder, head, **options)
        self.fault = fault

    def teacher_probs(self, *arguments) -> TeacherProbs:
        """Return targets that are centered by less than the center."""
        probs = super().teacher_probs(*arguments)
        return dataclasses.replace(probs, center=probs.center * (1 - self.fault))


class PatchesLessCentered(IBOT):
    """iBOT whose patch targets are centered by (1 - fault) times their center."""

    def __init__(self, encoder, head, masking, *, fault: float = 1.0, **options):
        super().__init__(encoder, head, masking, **options)
        self.fault = fault

    def teacher_patch_probs(self, *arguments) -> TeacherProbs:
        """Return patch targets that are centered by less than their center."""
        probs = super().teacher_patch_probs(*arguments)
        return dataclasses.replace(probs, center=probs.center * (1 - self.fault))


class Broken(DINO):
    """DINO whose loss is NaN in a share `fault` of the steps."""

    def __init__(self, encoder, head, *, fault: float = 1.0, **options):
        super().__init__(encoder, head, **options)
        self.fault = fault

    def forward(self, *crops, step: int, **options) -> dict[str, Tensor]:
        """Return the losses, or NaN."""
        answer = super().forward(*crops, step=step, **options)
        return {**answer, "loss": answer["loss"] * float("nan")} if step % 2 < 2 * self.fault else answer
