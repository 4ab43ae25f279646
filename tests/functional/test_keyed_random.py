import random

import numpy as np
import pytest
import torch

from maskwise.functional import keyed_random


def plain_mix(*parts):
    """A second derivation on Python integers."""
    bits = (1 << 64) - 1
    state = 0
    for part in parts:
        state = (state * 0xD1342543DE82EF95 + part + 0x9E3779B97F4A7C15) & bits
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = ((state ^ (state >> shift)) * factor) & bits
        state ^= state >> 31
    return state - (1 << 64) if state >> 63 else state


@pytest.mark.parametrize(
    "parts", [(0,), (1, 2, 3), (keyed_random.CROP, -5, 2**63 - 1), (keyed_random.MASK, 2**64 - 1, 7, 0)]
)
def test_mix_of_ints_and_of_tensors_agree_with_plain_integers(parts):
    as_tensors = [torch.tensor(part - (1 << 64) if part >= 1 << 63 else part) for part in parts]
    assert (
        int(keyed_random.make_key(*parts))
        == int(keyed_random.make_key(*as_tensors))
        == int(keyed_random.make_key(parts[0], *as_tensors[1:]))
        == plain_mix(*parts)
    )
    assert keyed_random.make_key(*parts).dtype == torch.int64


def test_pinned_values():
    """The stream must never change: runs of old versions are continued by new ones."""
    assert int(keyed_random.make_key(1, 2, 3)) == -7916092918711100008
    assert keyed_random.order(0, 0, 8).tolist() == [3, 1, 0, 6, 7, 2, 4, 5]
    assert keyed_random.uniform(keyed_random.make_key(keyed_random.MASK, 0, 0, 0, 0), 2).tolist() == [
        0.038199576225635856,
        0.6713657102225862,
    ]


def test_splitmix_reference_vector():
    """First outputs of SplitMix64 from state 0 and 1234567, as published with the generator."""
    bits = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert keyed_random.uniform(0, 3).tolist() == [(b >> 11) * 2.0**-53 for b in bits]
    assert keyed_random.uniform(1234567, 2).tolist() == [
        (b >> 11) * 2.0**-53 for b in (6457827717110365317, 3203168211198807973)
    ]


def test_mix_depends_on_order_and_on_every_part():
    keys = {int(keyed_random.make_key(a, b, c)) for a in range(6) for b in range(6) for c in range(6)}
    assert len(keys) == 6**3
    streams = [
        keyed_random.CROP,
        keyed_random.COLOR,
        keyed_random.RATIO,
        keyed_random.COIN,
        keyed_random.HINT,
        keyed_random.MASK,
        keyed_random.DROP_PATH,
        keyed_random.ORDER,
        keyed_random.SHAPES,
    ]
    assert len(set(streams)) == len(streams)


def test_a_batch_of_keys_is_its_samples_one_by_one():
    samples = torch.arange(50)
    together = keyed_random.uniform(
        keyed_random.make_key(keyed_random.CROP, 3, 1, samples[:, None], torch.arange(12)), 5
    )
    assert together.shape == (50, 12, 5)
    for sample in (0, 17, 49):
        for view in (0, 11):
            assert torch.equal(
                together[sample, view],
                keyed_random.uniform(keyed_random.make_key(keyed_random.CROP, 3, 1, sample, view), 5),
            )
    assert torch.equal(
        together[10:20],
        keyed_random.uniform(keyed_random.make_key(keyed_random.CROP, 3, 1, samples[10:20, None], torch.arange(12)), 5),
    )


def test_an_entry_does_not_depend_on_how_many_are_drawn():
    key = keyed_random.make_key(keyed_random.RATIO, 0, torch.arange(9))
    assert torch.equal(keyed_random.uniform(key, 7)[:, :2], keyed_random.uniform(key, 2))


def ks(values):
    values = np.sort(np.asarray(values).ravel())
    n = len(values)
    steps = np.arange(n + 1) / n
    return max(np.max(steps[1:] - values), np.max(values - steps[:-1])) * np.sqrt(n)


@pytest.mark.parametrize("axis", ["samples", "steps", "views", "entries", "epochs"])
def test_uniform_along_every_axis_of_a_key(axis):
    n = 20000
    line = torch.arange(n)
    values = {
        "samples": lambda: keyed_random.uniform(keyed_random.make_key(keyed_random.CROP, 0, 0, line, 0), 1),
        "steps": lambda: keyed_random.uniform(keyed_random.make_key(keyed_random.RATIO, 0, line), 1),
        "views": lambda: keyed_random.uniform(keyed_random.make_key(keyed_random.CROP, 0, 0, 0, line), 1),
        "entries": lambda: keyed_random.uniform(keyed_random.make_key(keyed_random.CROP, 0, 0, 0, 0), n),
        "epochs": lambda: keyed_random.uniform(keyed_random.make_key(keyed_random.CROP, 0, line, 5, 1), 1),
    }[axis]()
    assert values.dtype == torch.float64 and values.min() >= 0 and values.max() < 1
    assert ks(values.numpy()) < 1.95  # Kolmogorov: p = .001
    flat = values.ravel()
    assert abs(torch.corrcoef(torch.stack([flat[:-1], flat[1:]]))[0, 1]) < 4 / n**0.5


def test_neighboring_streams_are_uncorrelated():
    n = 20000
    u = keyed_random.uniform(
        keyed_random.make_key(torch.tensor([keyed_random.COIN, keyed_random.HINT])[:, None], 0, torch.arange(n)), 1
    )[..., 0]
    assert abs(torch.corrcoef(u)[0, 1]) < 4 / n**0.5


def test_order_is_a_permutation_that_changes_with_seed_and_epoch():
    orders = [keyed_random.order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for one in orders:
        assert torch.equal(one.sort().values, torch.arange(1000))
    assert len({tuple(one.tolist()) for one in orders}) == 4
    places = torch.stack([keyed_random.order(0, epoch, 10) for epoch in range(3000)])
    counts = (places[:, 0, None] == torch.arange(10)).sum(0)
    assert ((counts - 300) ** 2 / 300).sum() < 27.9  # chi-square, 9 degrees of freedom, p = .001
    assert keyed_random.order(0, 0, 0).tolist() == []


def test_a_seed_scope_gives_equal_draws_and_restores_every_generator():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(3).tolist()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    inside = []
    for _ in range(2):
        with keyed_random.seed_scope(int(keyed_random.make_key(1, 2))):
            inside.append((random.random(), np.random.rand(), torch.rand(3).tolist()))
    with pytest.raises(ZeroDivisionError), keyed_random.seed_scope(9):
        random.random(), torch.rand(5), 1 / 0
    assert inside[0] == inside[1]
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_equal_on_cpu_and_gpu():
    samples = torch.arange(1000) - 500
    cpu, gpu = (
        keyed_random.make_key(keyed_random.MASK, 7, 3, samples.to(device), torch.arange(2, device=device)[:, None])
        for device in ("cpu", "cuda")
    )
    assert torch.equal(cpu, gpu.cpu())
    assert torch.equal(keyed_random.uniform(cpu, 11), keyed_random.uniform(gpu, 11).cpu())
