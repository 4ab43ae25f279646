"""Which patches of the student's global crops are hidden: the table of maskings.

A masking draws everything by key (seed, step, sample, view), so its masks do not depend on how a batch is split into
ranks. It also says on the host how many patches are hidden, so that nobody has to ask the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maskwise.functional import draws, masks
from maskwise.functional.attention import mean_heads
from maskwise.functional.errors import UserError
from maskwise.nn.pooling import with_attention


class Hidden(NamedTuple):
    """A mask [V, N], True = hidden, and the number of its True entries, known to the host."""

    mask: Tensor
    count: int


class Keys(NamedTuple):
    """What identifies the views of one step: the seed, the step, and for each view its sample and its number, [V]."""

    seed: int
    step: int
    samples: Tensor
    views: Tensor

    def of(self, stream: int) -> Tensor:
        """Return the views' keys in a stream, int64 [V]."""
        return draws.mix(stream, self.seed, self.step, self.samples, self.views)


class Masking:
    """Draws a ratio and a coin for each view; what is hidden at that ratio, nothing here, is for the subclasses to say.

    `ratio` and `var` give a ratio uniform in [ratio - var, ratio + var]; as lists of equal length, one of those
    intervals picked evenly (attmask.md 2.1). A view is masked with probability `prob`, one coin per view.
    `ratio_per` is "step" (all views share one ratio) or "view". Raises UserError for values outside [0, 1].
    """

    needs_attention = False

    def __init__(
        self,
        ratio: float | Sequence[float] = 0.3,
        var: float | Sequence[float] = 0.2,
        prob: float = 0.5,
        ratio_per: str = "view",
        seed: int = 0,
    ):
        masks.draw_ratio(0.0, ratio, var)
        if not 0.0 <= prob <= 1.0:
            raise UserError(f"masking.prob={prob} is not a probability: give a number from 0 to 1")
        if ratio_per not in ("step", "view"):
            raise UserError(f"masking.ratio_per={ratio_per!r} is unknown: choose step or view")
        self.ratio = ratio
        self.var = var
        self.prob = prob
        self.ratio_per = ratio_per
        self.seed = seed

    def __call__(
        self, attention: Tensor | None, grid: tuple[int, int], *, step: int, sample_ids: Tensor, device="cpu", views: int = 2
    ) -> Tensor:
        """Return the mask alone, bool [V, N]; arguments as in `draw`."""
        return self.draw(attention, grid, step=step, sample_ids=sample_ids, device=device, views=views).mask

    def draw(
        self, attention: Tensor | None, grid: tuple[int, int], *, step: int, sample_ids: Tensor, device="cpu", views: int = 2
    ) -> Hidden:
        """Return the mask of V = views * B views of B samples, crop-major, and its count.

        attention [V, H, N] as the teacher's pooling gave it, or None where it is not needed; grid (h, w) with
        h * w = N; sample_ids int64 [B], best on the CPU (reading them from a GPU waits for it); device of the mask.
        """
        samples = sample_ids.to("cpu", torch.int64)
        keys = Keys(self.seed, step, samples.repeat(views), torch.arange(views).repeat_interleave(len(samples)))
        return self.hide(attention, grid, keys, torch.device(device))

    def hide(self, attention: Tensor | None, grid: tuple[int, int], keys: Keys, device: torch.device) -> Hidden:
        """Return what is hidden of the views that the keys identify."""
        return Hidden(torch.zeros(len(keys.samples), grid[0] * grid[1], dtype=torch.bool, device=device), 0)

    def masked(self, keys: Keys) -> list[bool]:
        """Return for each view whether its coin says to mask it, [V]."""
        return (draws.uniform(keys.of(draws.COIN), 1)[:, 0] < self.prob).tolist()

    def ratios(self, keys: Keys, draw: int = 0) -> list[float]:
        """Return each view's first (or second) draw of the ratio, 0 for views that are not masked, [V] Python floats."""
        if self.ratio_per == "step":
            uniforms = draws.uniform(draws.mix(draws.RATIO, keys.seed, keys.step), draw + 1)[draw].expand(len(keys.samples))
        else:
            uniforms = draws.uniform(keys.of(draws.RATIO), draw + 1)[:, draw]
        return [masks.draw_ratio(u, self.ratio, self.var) * masked for u, masked in zip(uniforms.tolist(), self.masked(keys))]


class NoMasking(Masking):
    """Hides nothing."""

    def __init__(self, seed: int = 0):
        super().__init__(ratio=0.0, var=0.0, prob=0.0, seed=seed)


class RandomMasking(Masking):
    """Hides int(r N) patches of a view, chosen evenly (attmask.md 2.3)."""

    def hide(self, attention, grid, keys, device) -> Hidden:
        noise = draws.uniform(keys.of(draws.MASK), grid[0] * grid[1])
        return _from_host(masks.random_mask(self.ratios(keys), grid, noise=noise), device)


class BlockMasking(Masking):
    """Hides rectangles of patches, at most r N of them in all (BEiT's way; attmask.md 2.2)."""

    def hide(self, attention, grid, keys, device) -> Hidden:
        noise = draws.uniform(keys.of(draws.MASK), masks.BLOCK_TRIES * 4).unflatten(1, (masks.BLOCK_TRIES, 4))
        return _from_host(masks.blockwise_mask(self.ratios(keys), grid, noise=noise), device)


class AttMaskHigh(Masking):
    """Hides the int(r N) patches that the teacher attends most, averaged over heads (attmask.md 2.4)."""

    needs_attention = True
    mode = "high"

    def __init__(
        self,
        ratio: float | Sequence[float] = 0.3,
        var: float | Sequence[float] = 0.2,
        prob: float = 0.5,
        ratio_per: str = "step",
        seed: int = 0,
    ):
        super().__init__(ratio, var, prob, ratio_per, seed)

    def hide(self, attention, grid, keys, device) -> Hidden:
        if attention is None:
            raise UserError(
                f"{type(self).__name__} follows the teacher's attention and the pooling gives none: choose a pooling that does "
                f"({with_attention()}), or masking random or block"
            )
        return self.rank(mean_heads(attention.detach()), self.ratios(keys), keys)

    def rank(self, attention: Tensor, ratios: list[float], keys: Keys) -> Hidden:
        """Return what is hidden, given the attention averaged over heads, [V, N], and each view's ratio."""
        return Hidden(masks.attention_mask(attention, ratios, self.mode), sum(int(attention.shape[1] * r) for r in ratios))


class AttMaskLow(AttMaskHigh):
    """Hides the int(r N) patches that the teacher attends least."""

    mode = "low"


class AttMaskHint(AttMaskHigh):
    """Hides as AttMaskHigh, then shows int(N show_max r') of the int(N show_max) most attended again, r' a second draw."""

    mode = "hint"

    def __init__(
        self,
        ratio: float | Sequence[float] = 0.3,
        var: float | Sequence[float] = 0.2,
        prob: float = 0.5,
        ratio_per: str = "step",
        show_max: float = 0.1,
        seed: int = 0,
    ):
        super().__init__(ratio, var, prob, ratio_per, seed)
        if not 0.0 <= show_max <= 1.0:
            raise UserError(f"masking.show_max={show_max} is not a share of the patches: give a number from 0 to 1")
        self.show_max = show_max

    def rank(self, attention: Tensor, ratios: list[float], keys: Keys) -> Hidden:
        """Return what is hidden, given the attention averaged over heads, [V, N], and each view's ratio."""
        shown = [self.show_max * second for second in self.ratios(keys, draw=1)]
        noise = draws.uniform(keys.of(draws.HINT).to(attention.device, non_blocking=True), attention.shape[1])
        mask = masks.attention_mask(attention, ratios, self.mode, shown, self.show_max, noise=noise)
        hidden = [int(attention.shape[1] * r) for r in ratios]
        pool = int(attention.shape[1] * self.show_max)
        if any(0 < count < pool for count in hidden):
            return Hidden(mask, int(mask.sum()))  # the pool is wider than what is hidden: only the draw knows the count
        return Hidden(mask, sum(count - min(int(attention.shape[1] * show), pool) for count, show in zip(hidden, shown) if count))


def _from_host(mask: Tensor, device: torch.device) -> Hidden:
    return Hidden(mask.to(device, non_blocking=True), int(mask.sum()))


MASKINGS = {
    "none": NoMasking,
    "random": RandomMasking,
    "block": BlockMasking,
    "attmask_high": AttMaskHigh,
    "attmask_low": AttMaskLow,
    "attmask_hint": AttMaskHint,
}
