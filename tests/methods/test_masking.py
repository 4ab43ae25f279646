"""Maskings: which patches, how many, how often, for any split into ranks."""

import pytest
import torch

from maskwise.errors import UserError
from maskwise.methods.masking import (
    MASKINGS,
    AttMaskHigh,
    AttMaskHint,
    AttMaskLow,
    BlockMasking,
    NoMasking,
    RandomMasking,
)

GRIDS = [(1, 1), (2, 3), (6, 6), (5, 7), (14, 14)]


def looks(views, patches, heads=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(views, heads, patches, generator=generator, dtype=torch.float64) / patches


def sizes(hidden):
    return hidden.mask.sum(dim=1).tolist()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", MASKINGS)
def test_every_row_of_the_table_obeys_its_contract(name, grid):
    patches = grid[0] * grid[1]
    attention = looks(10, patches)
    options = (
        {} if name == "none" else {"ratio": [0.0, 0.1, 0.5, 1.0], "var": [0.0] * 4, "prob": 0.8, "ratio_per": "view"}
    )
    masking = MASKINGS[name](**options)
    ids = torch.tensor([7, 1, 123456789, 3, 4])
    hidden = masking.sample(attention, grid, step=5, sample_ids=ids)
    assert hidden.mask.dtype == torch.bool and hidden.mask.shape == (10, patches)
    assert hidden.num_masked == int(hidden.mask.sum())
    assert torch.equal(hidden.mask, masking(attention, grid, step=5, sample_ids=ids))
    for rows in ([0, 1], [2, 3, 4]):  # as two ranks would see them
        both = rows + [row + 5 for row in rows]
        part = masking.sample(attention[both], grid, step=5, sample_ids=ids[rows])
        assert torch.equal(part.mask, hidden.mask[both])


@pytest.mark.parametrize("name", [name for name in MASKINGS if name != "none"])
def test_masks_change_with_step_and_seed(name):
    attention, ids = looks(16, 196), torch.arange(8)
    drawn = [
        MASKINGS[name](seed=seed).sample(attention, (14, 14), step=step, sample_ids=ids).mask
        for seed, step in [(0, 0), (0, 1), (1, 0)]
    ]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("ratio, hidden", [(0.1, 19), (0.3, 58), (0.5, 98), (0.7, 137), (0.75, 147)])
def test_attmask_hides_exactly_the_most_and_the_least_attended(ratio, hidden):
    attention = looks(4, 196)
    order = attention.mean(dim=1).argsort(dim=1, descending=True)
    for kind, expected in ((AttMaskHigh, order[:, :hidden]), (AttMaskLow, order[:, 196 - hidden :])):
        drawn = kind(ratio=ratio, var=0.0, prob=1.0).sample(attention, (14, 14), step=0, sample_ids=torch.arange(2))
        assert sizes(drawn) == [hidden] * 4
        assert drawn.mask.gather(1, expected).all()


def test_attmask_golden_sets():
    n, b = torch.arange(16), torch.arange(2)[:, None]
    attention = ((37 * n + 11 * b) % 101 / 101).double()[:, None].expand(2, 2, 16)
    sets = {AttMaskHigh: [[2, 5, 8, 13], [2, 5, 10, 13]], AttMaskLow: [[0, 3, 11, 14], [0, 3, 8, 11]]}
    for kind, expected in sets.items():
        mask = kind(ratio=0.3, var=0.0, prob=1.0)(attention, (4, 4), step=0, sample_ids=torch.tensor([9]))
        assert [row.nonzero()[:, 0].tolist() for row in mask] == expected


def test_counts_are_cut_in_double_precision():
    attention = looks(2, 100).float()
    assert sizes(
        AttMaskHigh(ratio=0.29, var=0.0, prob=1.0).sample(attention, (10, 10), step=0, sample_ids=torch.tensor([0]))
    ) == [28, 28]
    assert sizes(
        RandomMasking(ratio=0.7, var=0.0, prob=1.0).sample(None, (2, 5), step=0, sample_ids=torch.tensor([0]))
    ) == [7, 7]


def test_hint_shows_some_of_the_most_attended_again():
    attention, ids = looks(40, 196), torch.arange(20)
    top = attention.mean(dim=1).argsort(dim=1, descending=True)[:, :19]
    shown = set()
    for step in range(40):
        high = AttMaskHigh(prob=1.0).sample(attention, (14, 14), step=step, sample_ids=ids)
        hint = AttMaskHint(prob=1.0).sample(attention, (14, 14), step=step, sample_ids=ids)
        revealed = high.mask & ~hint.mask
        assert not (hint.mask & ~high.mask).any()
        assert len(set(revealed.sum(dim=1).tolist())) == 1
        assert torch.equal(revealed.gather(1, top).sum(dim=1), revealed.sum(dim=1))
        assert len({tuple(row.nonzero()[:, 0].tolist()) for row in revealed}) > 1
        shown.add(int(revealed[0].sum()))
    assert min(shown) >= 1 and max(shown) <= 9 and len(shown) > 5


def test_hint_draws_a_second_ratio_of_its_own():
    pairs = set()
    for step in range(20):
        attention, ids = looks(2, 196), torch.tensor([0])
        high, hint = (
            kind(prob=1.0).sample(attention, (14, 14), step=step, sample_ids=ids) for kind in (AttMaskHigh, AttMaskHint)
        )
        pairs.add((high.num_masked // 2 / 196, (high.num_masked - hint.num_masked) // 2 / 19.6))
    ratios, shown = torch.tensor(sorted(pairs)).T
    assert abs(torch.corrcoef(torch.stack([ratios, shown]))[0, 1]) < 0.6
    assert (ratios - shown).abs().max() > 0.15


def test_hint_counts_for_given_ratios(monkeypatch):
    masking, attention = AttMaskHint(prob=1.0), looks(2, 196)
    for first, second, hidden in [(0.3, 0.3, 53), (0.1, 0.5, 10), (0.5, 0.1, 97)]:
        monkeypatch.setattr(masking, "ratios", lambda keys, draw=0, pair=(first, second): [pair[draw]] * 2)
        drawn = masking.sample(attention, (14, 14), step=0, sample_ids=torch.tensor([0]))
        assert sizes(drawn) == [hidden] * 2 and drawn.num_masked == 2 * hidden


@pytest.mark.parametrize("grid", [(6, 6), (8, 8), (2, 2)])
def test_hint_works_on_small_grids_where_nothing_may_be_shown(grid):
    drawn = AttMaskHint(prob=1.0).sample(looks(6, grid[0] * grid[1]), grid, step=3, sample_ids=torch.arange(3))
    assert drawn.num_masked == int(drawn.mask.sum())


def test_a_pool_wider_than_what_is_hidden_keeps_the_count_right():
    masking = AttMaskHint(ratio=0.15, var=0.1, prob=0.7, ratio_per="view", show_max=0.5)
    for step in range(5):
        drawn = masking.sample(looks(20, 64), (8, 8), step=step, sample_ids=torch.arange(10))
        assert drawn.num_masked == int(drawn.mask.sum())


def test_one_ratio_for_the_step_gives_all_masked_views_one_count():
    masking = AttMaskHigh()
    counts = []
    for step in range(30):
        present = {
            n for n in sizes(masking.sample(looks(32, 196), (14, 14), step=step, sample_ids=torch.arange(16))) if n
        }
        assert len(present) == 1
        counts += present
    assert min(counts) >= 19 and max(counts) <= 98 and len(set(counts)) > 15
    drawn = AttMaskHigh(ratio_per="view").sample(looks(32, 196), (14, 14), step=0, sample_ids=torch.arange(16))
    assert len(set(sizes(drawn))) > 5


def test_half_of_the_views_stay_whole_and_the_coins_of_an_image_are_independent():
    ids = torch.arange(2000)
    masked = torch.tensor(sizes(RandomMasking().sample(None, (6, 6), step=1, sample_ids=ids))).view(2, -1) > 0
    assert abs(masked.double().mean() - 0.5) < 3 * 0.5 / 4000**0.5
    assert abs(torch.corrcoef(masked.double())[0, 1]) < 3 / 2000**0.5


@pytest.mark.parametrize(
    "kind, mean, slack", [(AttMaskHigh, 0.149, 0.012), (BlockMasking, 0.147, 0.012), (AttMaskHint, 0.135, 0.012)]
)
def test_mean_share_of_hidden_patches(kind, mean, slack):
    options = {"ratio": [0.0, 0.3], "var": [0.0, 0.2], "prob": 1.0} if kind is BlockMasking else {"ratio_per": "view"}
    drawn = kind(**options).sample(looks(2000, 196, heads=1), (14, 14), step=0, sample_ids=torch.arange(1000))
    assert drawn.num_masked / drawn.mask.numel() == pytest.approx(mean, abs=slack)


def test_a_list_of_ratios_picks_one_evenly_then_draws_in_its_interval():
    masking = RandomMasking(ratio=[0.0, 0.3], var=[0.0, 0.2], prob=1.0)
    share = torch.tensor(sizes(masking.sample(None, (10, 10), step=0, sample_ids=torch.arange(2000)))) / 100
    assert abs((share == 0).double().mean() - 0.5) < 0.025
    drawn = share[share > 0]
    assert drawn.min() >= 0.099 and drawn.max() <= 0.5
    quarters = torch.histc(drawn, 4, 0.0999, 0.5)
    assert (quarters / len(drawn) - 0.25).abs().max() < 0.04


def test_a_mask_follows_the_attention_of_its_own_view():
    attention, ids, masking = looks(8, 36), torch.arange(4), AttMaskHigh(prob=1.0)
    swapped = attention.roll(4, dims=0)
    here, there = (masking(a, (6, 6), step=0, sample_ids=ids) for a in (attention, swapped))
    assert torch.equal(here.roll(4, dims=0), there)


def test_masks_ignore_the_scale_of_attention_but_not_the_weight_of_a_head():
    attention, ids, masking = looks(8, 64), torch.arange(4), AttMaskHigh(prob=1.0)
    attention[:, 0] *= 5
    mask = masking(attention, (8, 8), step=0, sample_ids=ids)
    assert torch.equal(mask, masking(attention * 4, (8, 8), step=0, sample_ids=ids))
    assert not torch.equal(
        mask, masking(attention / attention.sum(dim=-1, keepdim=True), (8, 8), step=0, sample_ids=ids)
    )


def test_half_precision_attention_is_averaged_in_float32():
    heads = torch.tensor([256.0, 1.0, 1.0]).view(1, 3, 1).expand(2, 3, 4).clone()
    heads[:, 1, 2] = 2.0
    mask = AttMaskHigh(ratio=0.25, var=0.0, prob=1.0)(heads.bfloat16(), (2, 2), step=0, sample_ids=torch.tensor([0]))
    assert mask[0].tolist() == [False, False, True, False]


def test_nothing_is_hidden_without_a_masking():
    assert NoMasking(seed=3).sample(None, (4, 4), step=0, sample_ids=torch.arange(3)).num_masked == 0


@pytest.mark.parametrize(
    "options, text",
    [
        ({"ratio": 0.1, "var": 0.2}, "0..1"),
        ({"ratio": [0.1, 0.2], "var": [0.0, 0.0, 0.0]}, "var"),
        ({"prob": 1.5}, "probability"),
        ({"ratio_per": "batch"}, "step or view"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(options, text):
    with pytest.raises(UserError, match=text) as caught:
        AttMaskHigh(**options)
    assert "\n" not in str(caught.value)


def test_attention_masking_without_attention_is_refused():
    with pytest.raises(UserError, match="pooling"):
        AttMaskHigh()(None, (4, 4), step=0, sample_ids=torch.arange(2))
