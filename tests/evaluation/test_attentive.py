"""Attentive probing: steps against plain autograd, several rates against separate runs, images in their own step."""

import pytest
import torch

from maskwise.errors import UserError
from maskwise.evaluation.attentive import AttentiveOptions, Probe, attentive, batches, warm_cosine
from maskwise.evaluation.features import extract, fingerprints
from maskwise.functional import keyed_random
from support.tiny_sets import Colors, sets, tiny_encoder


class Rank:
    size = 3

    def __init__(self, rank):
        self.rank = rank


def test_tokens_reach_their_step_also_where_images_are_unreadable():
    encoder, data = tiny_encoder(), Colors(23, broken=(2, 3, 4, 5, 6))
    order, bank = keyed_random.order(0, 1, 23), extract.extract(encoder, data, "patches")
    tokens = dict(zip(bank.index.tolist(), bank["patches"]))
    for world in (None, *map(Rank, range(3))):
        steps = list(batches(encoder, data, 1, world, AttentiveOptions(batch_size=6, augment=False), {}))
        assert len(steps) == 4
        for chunk, (rows, truth) in zip(order.split(6), steps):
            mine = [int(i) for i in (chunk if world is None else chunk.tensor_split(3)[world.rank]) if int(i) in tokens]
            assert truth.tolist() == [int(data.labels[i]) for i in mine]
            assert not mine or torch.allclose(rows, torch.stack([tokens[i] for i in mine]), atol=1e-5)


def test_against_a_plain_loop():
    encoder, data = tiny_encoder("simpool"), sets(20, 9)
    options = dict(augment=False, epochs=3, batch_size=8, warmup_epochs=1, weight_decay=0.01)
    report = attentive(encoder, data, lr=[0.05, 0.2], **options)
    bank, test = (extract.extract(encoder, data[role], "patches") for role in ("train", "test"))
    for lr in (0.05, 0.2):
        probe, best = Probe("simpool", 24, 3), 0.0
        optimizer = torch.optim.AdamW(probe.parameters(), lr=0.0, weight_decay=0.01)
        for epoch in range(3):
            for step, rows in enumerate(keyed_random.order(0, epoch, 20).split(8)):
                loss = torch.nn.functional.cross_entropy(probe(bank["patches"][rows]), bank.labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.param_groups[0]["lr"] = lr * 8 / 256 * warm_cosine(3 * epoch + step, 9, 3)
                optimizer.step()
            with torch.no_grad():
                best = max(best, 100 * (probe(test["patches"]).argmax(1) == test.labels).double().mean().item())
        assert report.numbers[f"top1_lr{lr:g}"] == pytest.approx(best)
        assert attentive(encoder, data, lr=lr, **options).numbers["top1"] == pytest.approx(best)
    assert report.numbers["pooling_parameters"] == 2 * 24**2 + 2 * 24 and any(
        "epochs 3 instead of 90" in line for line in report.protocol["differences"]
    )


def test_learns_with_crops_and_encoder_unchanged():
    encoder, data = tiny_encoder("simpool"), sets()
    before, state = fingerprints.weights_fingerprint(encoder), torch.get_rng_state()
    report = attentive(encoder, data, lr=0.2, epochs=8, batch_size=16, warmup_epochs=1, evaluate_every=3)
    assert (
        report.numbers["top1"] > 60
        and fingerprints.weights_fingerprint(encoder) == before
        and torch.equal(state, torch.get_rng_state())
    )
    assert data["train"].reads == 8 * 48 and data["test"].reads == 3 * 30


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"pooling": "cls"}, "pooling cls needs cls_attention"),
        ({"pooling": "gem9"}, "no pooling 'gem9'"),
        ({"lr": -1.0}, "lr is -1.0; it must be above 0"),
        ({"epochs": 5, "warmup_epochs": 10}, "warmup_epochs 10 is not shorter"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_mistakes_are_refused_before_any_image_is_read(options, reason):
    data = sets()
    with pytest.raises(UserError, match=reason):
        attentive(tiny_encoder(), data, **options)
    assert data["train"].reads == data["test"].reads == 0
