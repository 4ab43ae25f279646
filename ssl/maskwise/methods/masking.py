"""Maskings: choose the patches of the student's global crops to mask.

Everything is drawn by key (seed, step, sample, view), so masks do not depend on the split of a batch into ranks. The
number of masked patches is counted on the host, without a sync.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from maskwise.bounds import Probability
from maskwise.errors import UserError
from maskwise.functional import keyed_random, masks
from maskwise.functional.attention import mean_heads
from maskwise.functional.mask_ratios import draw_ratio

Grid = tuple[int, int]
Ratio = Probability | Sequence[Probability]
PerStepOrView = Literal["step", "view"]


class SampledMasks(NamedTuple):
    """Masks bool [V, N], True = masked, and the number of their True entries as a Python int."""

    mask: Tensor
    num_masked: int


class ViewKeys(NamedTuple):
    """Keys of the views of one step: seed, step, and the sample and number of each view, [V]."""

    seed: int
    step: int
    samples: Tensor
    views: Tensor

    def of(self, stream: int) -> Tensor:
        """Return the views' keys in a stream of keyed_random, int64 [V]."""
        return keyed_random.make_key(stream, self.seed, self.step, self.samples, self.views)


class Masking:
    """Samples whether and how much to mask each view; subclasses choose the patches, the base class masks none.

    `ratio` and `var` give a mask ratio uniform in [ratio - var, ratio + var]; of lists, one such interval is picked
    evenly (iBOT). A view is masked with probability `prob`. `ratio_per` is "step", one ratio for all views,
    or "view". Raises UserError for values outside [0, 1].
    """

    needs_attention = False

    def __init__(
        self,
        ratio: Ratio = 0.3,
        var: Ratio = 0.2,
        prob: Probability = 0.5,
        ratio_per: PerStepOrView = "view",
        seed: int = 0,
    ):
        draw_ratio(0.0, ratio, var)  # raises UserError for a ratio outside [0, 1]
        if not 0.0 <= prob <= 1.0:
            raise UserError(f"masking.prob={prob} is not a probability: give a number from 0 to 1")
        if ratio_per not in ("step", "view"):
            raise UserError(f"masking.ratio_per={ratio_per!r} is unknown: choose step or view")
        self.ratio = ratio
        self.var = var
        self.prob = prob
        self.ratio_per = ratio_per
        self.seed = seed

    def __call__(self, attention: Tensor | None, grid: Grid, **options) -> Tensor:
        """Return the mask alone, bool [V, N]; arguments as in `sample`."""
        return self.sample(attention, grid, **options).mask

    def sample(
        self,
        attention: Tensor | None,
        grid: Grid,
        *,
        step: int,
        sample_ids: Tensor,
        device: torch.device | str = "cpu",
        views: int = 2,
    ) -> SampledMasks:
        """Return the masks of V = views * B views of B samples, crop-major.

        attention [V, H, N] of the teacher's pooling, or None if not needed; grid (h, w) with h * w = N; sample_ids
        int64 [B], preferably on the CPU (on a GPU, reading them is a sync); `device` is that of the masks.
        """
        samples = sample_ids.to("cpu", torch.int64)
        keys = ViewKeys(self.seed, step, samples.repeat(views), torch.arange(views).repeat_interleave(len(samples)))
        return self.choose_patches(attention, grid, keys, torch.device(device))

    def choose_patches(
        self, attention: Tensor | None, grid: Grid, keys: ViewKeys, device: torch.device
    ) -> SampledMasks:
        """Return the masks of the views with these keys."""
        return SampledMasks(torch.zeros(len(keys.samples), grid[0] * grid[1], dtype=torch.bool, device=device), 0)

    def coin_flips(self, keys: ViewKeys) -> list[bool]:
        """Return for each view whether to mask it, [V]."""
        return (keyed_random.uniform(keys.of(keyed_random.COIN), 1)[:, 0] < self.prob).tolist()

    def ratios(self, keys: ViewKeys, draw: int = 0) -> list[float]:
        """Return each view's first or second draw of the mask ratio, 0 for unmasked views, [V] Python floats."""
        if self.ratio_per == "step":
            key = keyed_random.make_key(keyed_random.RATIO, keys.seed, keys.step)
            uniforms = keyed_random.uniform(key, draw + 1)[draw].expand(len(keys.samples))
        else:
            uniforms = keyed_random.uniform(keys.of(keyed_random.RATIO), draw + 1)[:, draw]
        flips = self.coin_flips(keys)
        return [draw_ratio(u, self.ratio, self.var) * flip for u, flip in zip(uniforms.tolist(), flips)]


class NoMasking(Masking):
    """Masks nothing."""

    def __init__(self, seed: int = 0):
        super().__init__(ratio=0.0, var=0.0, prob=0.0, seed=seed)


class RandomMasking(Masking):
    """Masks int(r N) random patches of a view (AttMask, sec. 3.2)."""

    def choose_patches(
        self, attention: Tensor | None, grid: Grid, keys: ViewKeys, device: torch.device
    ) -> SampledMasks:
        """Return the masks of the views with these keys."""
        noise = keyed_random.uniform(keys.of(keyed_random.MASK), grid[0] * grid[1])
        return from_host(masks.random_mask(self.ratios(keys), grid, noise=noise), device)


class BlockMasking(Masking):
    """Masks rectangles of patches, at most r N in all (BEiT, sec. 2.3)."""

    def choose_patches(
        self, attention: Tensor | None, grid: Grid, keys: ViewKeys, device: torch.device
    ) -> SampledMasks:
        """Return the masks of the views with these keys."""
        noise = keyed_random.uniform(keys.of(keyed_random.MASK), masks.BLOCK_TRIES * 4)
        noise = noise.unflatten(1, (masks.BLOCK_TRIES, 4))
        return from_host(masks.blockwise_mask(self.ratios(keys), grid, noise=noise), device)


class AttMaskHigh(Masking):
    """Masks the int(r N) patches with the highest teacher attention, averaged over heads (AttMask, sec. 3.2)."""

    needs_attention = True
    mode = "high"

    def __init__(
        self,
        ratio: Ratio = 0.3,
        var: Ratio = 0.2,
        prob: Probability = 0.5,
        ratio_per: PerStepOrView = "step",
        seed: int = 0,
    ):
        super().__init__(ratio, var, prob, ratio_per, seed)

    def choose_patches(
        self, attention: Tensor | None, grid: Grid, keys: ViewKeys, device: torch.device
    ) -> SampledMasks:
        """Return the masks of the views with these keys."""
        if attention is None:
            raise UserError(f"masking {masking_name(self)} needs the attention [V, H, N] of the teacher's pooling")
        return self.mask_from_attention(mean_heads(attention.detach()), self.ratios(keys), keys)

    def mask_from_attention(self, attention: Tensor, ratios: list[float], keys: ViewKeys) -> SampledMasks:
        """Return the masks for attention averaged over heads, [V, N], and each view's mask ratio."""
        num_masked = sum(int(attention.shape[1] * ratio) for ratio in ratios)
        return SampledMasks(masks.attention_mask(attention, ratios, self.mode), num_masked)


class AttMaskLow(AttMaskHigh):
    """Masks the int(r N) patches with the lowest teacher attention (AttMask, sec. 3.2)."""

    mode = "low"


class AttMaskHint(AttMaskHigh):
    """Masks as attmask_high, then reveals some of the most attended patches as hints (AttMask, sec. 3.2).

    It reveals int(N show_max r') of the int(N show_max) most attended patches, r' being a second draw of the ratio.
    """

    mode = "hint"

    def __init__(
        self,
        ratio: Ratio = 0.3,
        var: Ratio = 0.2,
        prob: Probability = 0.5,
        ratio_per: PerStepOrView = "step",
        show_max: Probability = 0.1,
        seed: int = 0,
    ):
        super().__init__(ratio, var, prob, ratio_per, seed)
        if not 0.0 <= show_max <= 1.0:
            raise UserError(f"masking.show_max={show_max} is not a share of the patches: give a number from 0 to 1")
        self.show_max = show_max

    def mask_from_attention(self, attention: Tensor, ratios: list[float], keys: ViewKeys) -> SampledMasks:
        """Return the masks for attention averaged over heads, [V, N], and each view's mask ratio."""
        patches = attention.shape[1]
        show_ratios = [self.show_max * second for second in self.ratios(keys, draw=1)]
        hint_keys = keys.of(keyed_random.HINT).to(attention.device, non_blocking=True)
        noise = keyed_random.uniform(hint_keys, patches)
        mask = masks.attention_mask(attention, ratios, self.mode, show_ratios, self.show_max, noise=noise)
        counts = [int(patches * ratio) for ratio in ratios]
        pool = int(patches * self.show_max)
        if any(0 < count < pool for count in counts):
            return SampledMasks(mask, int(mask.sum()))  # more candidates for hints than masked patches: count them
        hints = [min(int(patches * show), pool) for show in show_ratios]
        return SampledMasks(mask, sum(count - hint for count, hint in zip(counts, hints) if count))


def from_host(mask: Tensor, device: torch.device) -> SampledMasks:
    """Return masks made on the CPU, counted there and copied to the device."""
    return SampledMasks(mask.to(device, non_blocking=True), int(mask.sum()))


MASKINGS: dict[str, type[Masking]] = {
    "none": NoMasking,
    "random": RandomMasking,
    "block": BlockMasking,
    "attmask_high": AttMaskHigh,
    "attmask_low": AttMaskLow,
    "attmask_hint": AttMaskHint,
}


def masking_name(masking: Masking) -> str:
    """Return the name of a masking in MASKINGS, or `module:Name` for one from elsewhere."""
    names = (name for name, row in MASKINGS.items() if type(masking) is row)
    return next(names, f"{type(masking).__module__}:{type(masking).__name__}")
