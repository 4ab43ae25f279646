import math

import numpy as np
import pytest
import torch

from maskwise.errors import UserError
from maskwise.functional import keyed_random, mask_ratios, masks

GRID = (14, 14)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def golden_attention(views=2, patches=16):
    b, n = torch.arange(views, dtype=torch.float64)[:, None], torch.arange(patches, dtype=torch.float64)
    return ((37 * n + 11 * b) % 101) / 101


def hidden(mask):
    return [set(row.nonzero()[:, 0].tolist()) for row in mask]


# random


@pytest.mark.parametrize("grid", [(1, 1), (6, 6), (3, 5), (5, 7), (14, 14)])
def test_random_hides_exactly_int_r_n(grid):
    ratios = [0.0, 0.1, 0.29, 0.3, 0.5, 0.7, 0.75, 1.0]
    mask = masks.random_mask(ratios, grid, generator=generator())
    assert mask.dtype == torch.bool and mask.shape == (8, grid[0] * grid[1])
    assert mask.sum(1).tolist() == [int(r * grid[0] * grid[1]) for r in ratios]


def test_counts_are_taken_in_double_precision():
    """int(.7 * 10) is 7 and int(.29 * 100) is 28, also where the ratio arrives as float32."""
    for ratios in (
        [0.7],
        torch.tensor([0.7], dtype=torch.float64),
        torch.tensor([0.7]),
        np.array([0.7], dtype=np.float32),
    ):
        assert masks.random_mask(ratios, (2, 5)).sum() == 7
    assert masks.attention_mask(torch.rand(1, 10), 0.7).sum() == 7
    assert masks.attention_mask(torch.rand(1, 100), 0.29).sum() == 28


def test_random_is_even_over_patches():
    mask = masks.random_mask([0.25] * 8000, (4, 4), generator=generator())
    expected = 8000 * 0.25
    assert ((mask.sum(0) - expected) ** 2 / expected).sum() < 37.7  # chi-square, 15 degrees of freedom, p = .001


def test_random_takes_the_lowest_noise_and_ties_by_lowest_index():
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.1], [0.0, 0.0, 0.0, 0.0]])
    assert hidden(masks.random_mask([0.5, 0.5], (2, 2), noise=noise)) == [{1, 3}, {0, 1}]


# block-wise


def blockwise_by_sets(target, grid, tries):
    """A second derivation, with a set of patches."""
    height, width = grid
    low, taken, failed = (min(height, width) // 3) ** 2, set(), 0
    for u in tries.tolist():
        if len(taken) >= target or failed == 10:
            break
        area = low + u[0] * (target - len(taken) - low)
        aspect = math.exp(math.log(0.3) + u[1] * (math.log(1 / 0.3) - math.log(0.3)))
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        block = set()
        if h < height and w < width:
            top, left = int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1))
            block = {row * width + column for row in range(top, top + h) for column in range(left, left + w)}
        if 0 < len(block - taken) <= target - len(taken):
            taken, failed = taken | block, 0
        else:
            failed += 1
    return taken


@pytest.mark.parametrize("grid", [(14, 14), (6, 6), (3, 5), (5, 3), (5, 7), (20, 3), (1, 1)])
def test_blockwise_against_the_words_of_the_reference(grid):
    ratios = [0.0, 0.1, 0.3, 0.5, 0.75, 1.0] * 5
    noise = keyed_random.uniform(
        keyed_random.make_key(keyed_random.MASK, torch.arange(30)), masks.BLOCK_TRIES * 4
    ).view(30, -1, 4)
    mask = masks.blockwise_mask(ratios, grid, noise=noise)
    assert hidden(mask) == [blockwise_by_sets(r * grid[0] * grid[1], grid, tries) for r, tries in zip(ratios, noise)]


@pytest.mark.parametrize("ratio, mean", [(0.1, 17.58), (0.2, 38.18), (0.3, 57.25), (0.4, 77.45), (0.5, 97.52)])
def test_blockwise_counts_match_the_measured_table(ratio, mean):
    """1,000 draws, standard error of the mean below .05."""
    counts = masks.blockwise_mask([ratio] * 1000, GRID, generator=generator(1)).sum(1)
    assert counts.max() <= ratio * 196
    assert counts.double().mean().item() == pytest.approx(mean, abs=0.15)
    floor = {0.1: 0.29, 0.2: 0.58, 0.3: 0.59, 0.4: 0.66, 0.5: 0.70}[ratio]
    assert (counts == int(ratio * 196)).double().mean().item() == pytest.approx(floor, abs=0.07)


def test_published_mixture_leaves_half_the_views_whole():
    """[0, .3] +- [0, .2] is empty half the time, else U(.1, .5); 14.7 % of patches on average."""
    u = keyed_random.uniform(keyed_random.make_key(keyed_random.RATIO, 0, torch.arange(4000)), 1)[:, 0].tolist()
    ratios = [mask_ratios.draw_ratio(v, [0.0, 0.3], [0.0, 0.2]) for v in u]
    drawn = np.array([r for r in ratios if r])
    assert len(drawn) / 4000 == pytest.approx(0.5, abs=0.03)
    assert drawn.min() >= 0.1 and drawn.max() <= 0.5 and drawn.mean() == pytest.approx(0.3, abs=0.01)
    mask = masks.blockwise_mask(ratios, GRID, generator=generator())
    assert mask.double().mean().item() == pytest.approx(0.147, abs=0.006)


def test_first_block_is_strictly_smaller_than_the_grid_and_no_longer_than_its_aspect():
    noise = keyed_random.uniform(keyed_random.make_key(keyed_random.MASK, 5, torch.arange(400)), 40).view(400, 10, 4)
    for row in masks.blockwise_mask([1.0] * 400, GRID, noise=noise[:, :1]):  # one try: at most one block
        if row.any():
            square = row.view(GRID)
            h, w = int(square.any(1).sum()), int(square.any(0).sum())
            assert square.sum() == h * w and h < 14 and w < 14
            assert (h + 0.5) / (w - 0.5) >= 0.3 and (w + 0.5) / (h - 0.5) >= 0.3


def test_blockwise_stops_for_good_after_ten_failures():
    wide = torch.full((1, 11, 4), 0.0, dtype=torch.float64)
    wide[0, :10, 0], wide[0, :10, 1] = 1.0, 1.0  # area 196 at aspect 3.3 is higher than the grid
    wide[0, 10, 0] = 0.0
    wide[0, 10, 1] = 0.5
    assert masks.blockwise_mask([1.0], GRID, noise=wide).sum() == 0
    assert masks.blockwise_mask([1.0], GRID, noise=wide[:, 1:]).sum() == 16


def test_the_default_number_of_tries_is_never_used_up():
    for grid in ((6, 6), (14, 14), (32, 32)):
        noise = torch.rand(150, masks.BLOCK_TRIES, 4, generator=generator(), dtype=torch.float64)
        assert torch.equal(
            masks.blockwise_mask([0.75] * 150, grid, noise=noise),
            masks.blockwise_mask([0.75] * 150, grid, noise=noise[:, :-64]),
        )


# attention


def test_golden_index_sets():
    assert hidden(masks.attention_mask(golden_attention(), 0.3, "high")) == [{2, 5, 8, 13}, {2, 5, 10, 13}]
    assert hidden(masks.attention_mask(golden_attention(), 0.3, "low")) == [{0, 3, 11, 14}, {0, 3, 8, 11}]


@pytest.mark.parametrize(
    "ratio, count", [(0.0, 0), (0.1, 19), (0.3, 58), (0.5, 98), (0.7, 137), (0.75, 147), (1.0, 196)]
)
def test_high_and_low_take_exactly_the_extremes(ratio, count):
    """Against sorting in NumPy."""
    attention = torch.rand(7, 196, generator=generator())
    high, low = (masks.attention_mask(attention, ratio, mode) for mode in ("high", "low"))
    ascending = np.argsort(attention.numpy(), axis=1)
    assert hidden(high) == [set(row[196 - count :].tolist()) for row in ascending]
    assert hidden(low) == [set(row[:count].tolist()) for row in ascending]
    assert ratio > 0.5 or not (high & low).any()


def test_ties_go_to_the_lowest_index():
    flat = torch.full((2, 10), 0.1)
    flat[1, 4] = 0.2
    assert hidden(masks.attention_mask(flat, 0.3, "high")) == [{0, 1, 2}, {0, 1, 4}]
    assert hidden(masks.attention_mask(flat, 0.3, "low")) == [{0, 1, 2}, {0, 1, 2}]


def test_masks_ignore_the_scale_of_attention_but_not_that_of_one_head():
    heads = torch.rand(50, 3, 196, generator=generator(), dtype=torch.float64)
    mask = masks.attention_mask(heads.mean(1), 0.3)
    assert torch.equal(mask, masks.attention_mask(8 * heads.mean(1), 0.3))
    assert not torch.equal(mask, masks.attention_mask((heads * torch.tensor([[1.0], [4.0], [1.0]])).mean(1), 0.3))


@pytest.mark.parametrize("ratio, drawn, count", [(0.3, 0.3, 53), (0.1, 0.5, 10), (0.5, 0.1, 97)])
def test_hint_counts(ratio, drawn, count):
    """Masked = int(196 r) - int(19.6 r')."""
    attention = torch.rand(20, 196, generator=generator())
    high = masks.attention_mask(attention, ratio, "high")
    hint = masks.attention_mask(attention, ratio, "hint", show_ratio=0.1 * drawn, generator=generator())
    assert hint.sum(1).tolist() == [count] * 20
    assert not (hint & ~high).any()
    top = masks.attention_mask(attention, 0.1, "high")
    assert top.sum(1).tolist() == [19] * 20 and not (high & ~hint & ~top).any()


def test_hint_reveals_evenly_from_its_pool():
    attention = torch.arange(196.0).flip(0).expand(6000, 196)
    shown = ~masks.attention_mask(attention, 0.3, "hint", show_ratio=0.03, generator=generator())[:, :58]
    assert shown[:, 19:].sum() == 0 and shown.sum(1).unique().tolist() == [5]
    expected = 6000 * 5 / 19
    assert ((shown.sum(0)[:19] - expected) ** 2 / expected).sum() < 42.3  # chi-square, 18 degrees of freedom, p = .001


@pytest.mark.parametrize("patches", [1, 9, 10, 36, 64])
def test_hint_on_small_grids_may_reveal_nothing(patches):
    attention = torch.rand(4, patches, generator=generator())
    for show in (0.0, 0.01, 0.05, 1.0):
        mask = masks.attention_mask(attention, 0.5, "hint", show_ratio=show, generator=generator())
        assert mask.sum(1).tolist() == [int(patches * 0.5) - min(int(patches * show), int(patches * 0.1))] * 4


def test_hint_leaves_whole_views_whole_and_takes_the_lowest_noise():
    attention = torch.arange(40.0).flip(0).expand(3, 40)
    noise = torch.ones(3, 40)
    noise[:, 2], noise[:, 30] = 0.0, -1.0  # 30 is outside the pool of four
    mask = masks.attention_mask(attention, [0.5, 0.0, 0.5], "hint", show_ratio=[0.05, 0.05, 0.0], noise=noise)
    assert hidden(mask) == [set(range(20)) - {0, 2}, set(), set(range(20))]


def masked_by_loop(mode, ratio, attention, noise, show_ratio, show_max):
    """Choose the patches of one view by repeated search, in Python numbers."""
    patches = len(attention)
    scores = [-value for value in attention] if mode == "low" else list(attention)
    order = []
    for _ in range(patches):
        best = next(i for i in range(patches) if i not in order)
        for i in range(patches):
            if i not in order and scores[i] > scores[best]:
                best = i
        order.append(best)
    masked = set(order[: int(ratio * patches)])
    if mode == "hint":
        pool = order[: int(patches * show_max)]
        for _ in range(min(int(patches * show_ratio), len(pool))):
            lowest = min(pool, key=lambda i: (noise[i], i))
            pool.remove(lowest)
            masked.discard(lowest)
    return masked


@pytest.mark.parametrize("mode", ["random", "high", "low", "hint"])
def test_masks_of_a_3x5_grid_equal_a_loop(mode):
    ratios = [0.0, 0.2, 0.34, 0.5, 0.75, 1.0] * 3
    attention = torch.rand(18, 15, generator=generator(4), dtype=torch.float64)
    noise = torch.rand(18, 15, generator=generator(5), dtype=torch.float64)
    if mode == "random":
        mask = masks.random_mask(ratios, (3, 5), noise=noise)
        expected = [masked_by_loop("low", *row, None, 0, 0) for row in zip(ratios, noise.tolist())]
    else:
        mask = masks.attention_mask(attention, ratios, mode, 0.2, 0.4, noise=noise)
        rows = zip(ratios, attention.tolist(), noise.tolist())
        expected = [masked_by_loop(mode, *row, 0.2, 0.4) for row in rows]
    assert mask.shape == (18, 15) and hidden(mask) == expected


# the contract of every row


def rows_of(name, ratios, grid, attention, noise, block):
    if name == "random":
        return masks.random_mask(ratios, grid, noise=noise)
    if name == "block":
        return masks.blockwise_mask(ratios, grid, noise=block)
    return masks.attention_mask(attention, ratios, name, show_ratio=0.05, noise=noise)


@pytest.mark.parametrize("name", ["random", "block", "high", "low", "hint"])
def test_rows_do_not_know_of_each_other(name):
    ratios, grid = [0.0, 0.1, 0.5, 1.0, 0.3, 0.37], (6, 6)
    attention, noise = (
        torch.rand(6, 36, generator=generator(1)),
        torch.rand(6, 36, generator=generator(2), dtype=torch.float64),
    )
    block = torch.rand(6, 64, 4, generator=generator(3), dtype=torch.float64)
    together = rows_of(name, ratios, grid, attention, noise, block)
    parts = [
        rows_of(name, ratios[a:b], grid, attention[a:b], noise[a:b], block[a:b]) for a, b in ((0, 1), (1, 4), (4, 6))
    ]
    assert torch.equal(together, torch.cat(parts))
    assert not together[0].any()
    assert name in ("block", "hint") or together[3].all()
    assert rows_of(name, [], grid, attention[:0], noise[:0], block[:0]).shape == (0, 36)


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: masks.random_mask([1.2], (4, 4)), "outside 0..1"),
        (lambda: masks.random_mask([float("nan")], (4, 4)), "outside 0..1"),
        (lambda: masks.blockwise_mask([-0.1], (4, 4)), "outside 0..1"),
        (lambda: masks.attention_mask(torch.rand(2, 4), 0.5, "middle"), "high, low or hint"),
        (lambda: masks.attention_mask(torch.rand(2, 3, 4), 0.5), "average the heads"),
        (lambda: masks.attention_mask(torch.rand(2, 4), [0.1, 0.2, 0.3]), "3 mask ratios for 2 views"),
        (lambda: masks.random_mask([0.5], (4, 4), noise=torch.rand(1, 9)), "noise has shape"),
        (lambda: mask_ratios.draw_ratio(0.5, 0.3, 0.4), "goes outside 0..1"),
        (lambda: mask_ratios.draw_ratio(0.5, [0.3, 0.1], [0.1]), "one var per ratio"),
    ],
)
def test_mistakes_end_in_one_line(call, word):
    with pytest.raises(UserError, match=word) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_are_equal_on_the_gpu_and_wait_for_nothing():
    attention, noise = torch.rand(64, 196), torch.rand(64, 196, dtype=torch.float64)
    moved, moved_noise = attention.cuda(), noise.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = [
            masks.attention_mask(moved, 0.3, mode, show_ratio=0.03, noise=moved_noise)
            for mode in ("high", "low", "hint")
        ]
        on_gpu.append(masks.random_mask([0.3] * 64, GRID, noise=moved_noise))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = [
        masks.attention_mask(attention, 0.3, mode, show_ratio=0.03, noise=noise) for mode in ("high", "low", "hint")
    ]
    expected.append(masks.random_mask([0.3] * 64, GRID, noise=noise))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu, expected))
