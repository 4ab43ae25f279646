"""Fine-tuning: schedules against timm's, batches and mixing for any number of ranks, end to end, encoder unchanged."""

import dataclasses
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from maskwise.errors import UserError
from maskwise.evaluation.features import fingerprints
from maskwise.evaluation.finetune import (
    PRESETS,
    FineTuned,
    FinetuneOptions,
    finetune,
    schedule,
    settings,
    train,
    tunable,
)
from maskwise.evaluation.probes.finetune_batches import Augmentation, TransferBatches
from support.tiny_sets import Colors, sets, tiny_encoder

QUICK = dict(batch_size=16, epochs=4, warmup_epochs=1, lr=2e-2, repeats=1)


def test_deit_schedule_equals_timm():
    from timm.scheduler import CosineLRScheduler

    rate = schedule(PRESETS["deit"], 7)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=7.5e-6 * 768 / 512)
    timms = CosineLRScheduler(optimizer, t_initial=1000, lr_min=1e-5, warmup_lr_init=1e-6, warmup_t=5)
    for epoch in range(1000):
        assert rate(epoch, epoch % 7) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        timms.step(epoch)
    assert max(rate(epoch, 0) for epoch in range(1000)) == pytest.approx(
        1.125e-5, rel=1e-3
    )  # nearly constant (DeiT, transfer to CIFAR and Flowers)


def test_beit_schedule():
    chosen = PRESETS["ibot-imagenet"][384] | {"epochs": 30}
    rate = schedule(chosen, 10)
    rates = [rate(epoch, step) for epoch in range(30) for step in range(10)]
    assert rates[0] == 0 and rates[199] == rates[200] == 4e-3 and rates[100] == pytest.approx(4e-3 * 100 / 199)
    assert rates[250] == pytest.approx(1e-6 + 0.5 * (4e-3 - 1e-6) * (1 + math.cos(math.pi / 2)))


def test_presets_equal_the_papers():
    encoder = tiny_encoder()
    for name, batch, epochs, every in (
        ("deit", 768, 1000, 1),
        ("ibot", 768, 1000, 1),
        ("simpool", 768, 1000, 1),
        ("attmask", 900, 500, 50),
    ):
        chosen, _ = settings(encoder, name, {})
        assert (
            chosen["batch_size"],
            chosen["epochs"],
            chosen["evaluate_every"],
            chosen["lr"],
            chosen["layer_decay"],
        ) == (batch, epochs, every, 7.5e-6, 1.0)
    for width, decay, epochs, drop, warm in (
        (384, 0.75, 200, 0.1, 20),
        (768, 0.65, 100, 0.2, 20),
        (1024, 0.75, 50, 0.4, 5),
    ):
        encoder.dim = width
        chosen, _ = settings(encoder, "ibot-imagenet", {})
        assert (
            chosen["layer_decay"],
            chosen["epochs"],
            chosen["drop_path"],
            chosen["warmup_epochs"],
            chosen["lr"],
            chosen["lr_per"],
        ) == (decay, epochs, drop, warm, 4e-3, None)


def make(rank=0, size=1, **options):
    defaults = dict(
        batch_size=8, classes=3, mixup=0.8, cutmix=1.0, smoothing=0.1, rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25
    )
    data, settings = options.pop("data", Colors(20)), {**defaults, **options}
    names = {field.name for field in dataclasses.fields(Augmentation)} & set(settings)
    augmentation = Augmentation(**{name: settings.pop(name) for name in names})
    return TransferBatches(data, tiny_encoder(), augmentation, world=SimpleNamespace(rank=rank, size=size), **settings)


def test_ranks_mix_the_same_pairs():
    whole = list(make().epoch(1, torch.device("cpu")))
    halves = [list(make(rank, 2).epoch(1, torch.device("cpu"))) for rank in (0, 1)]
    assert len(whole) == len(halves[0]) == 2
    for step, (images, targets, places) in enumerate(whole):
        order, all_places = torch.cat([half[step][2] for half in halves]).argsort(), places.argsort()
        assert torch.equal(places[all_places], torch.cat([half[step][2] for half in halves])[order])
        assert (places.view(-1, 2).sum(dim=1) == places.min() + places.max()).all(), "timm's pairs"
        assert torch.equal(torch.cat([half[step][0] for half in halves])[order], images[all_places])
        assert torch.allclose(
            torch.cat([half[step][1] for half in halves])[order], targets[all_places]
        ) and torch.allclose(targets.sum(1), torch.ones(8))


def test_batches_are_keyed_and_leave_random_state_unchanged():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first, again, later = (list(make().epoch(epoch, torch.device("cpu"))) for epoch in (0, 0, 1))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again)) and not torch.equal(first[0][0], later[0][0])


def test_repeats_and_the_length_of_an_epoch():
    order = make(data=Colors(600), repeats=3, batch_size=32).order(0)
    assert (
        len(order) == 512
        and torch.equal(order.view(-1)[:3], order[:1].expand(3))
        and len(order.unique()) == -(-512 // 3)
    )
    assert len(make(data=Colors(20), repeats=3, batch_size=4).order(0)) == 20
    with pytest.raises(UserError, match="batch_size 32 is larger than an epoch of 20 images; give batch_size=20"):
        make(batch_size=32)


def test_smoothing_alone():
    _, targets, places = next(make(mixup=0.0, cutmix=0.0).epoch(0, torch.device("cpu")))
    labels = Colors(20).labels[make().order(0)[places]]
    assert torch.allclose(targets, torch.nn.functional.one_hot(labels, 3) * 0.9 + 0.1 / 3)


def test_end_to_end_with_the_encoder_unchanged():
    encoder, data = tiny_encoder(mask_token=True), sets(48, 30, broken=(5,))
    encoder.requires_grad_(False)
    before = fingerprints.weights_fingerprint(encoder)
    report = finetune(
        encoder,
        data,
        preset="deit",
        mixup=0.0,
        cutmix=0.0,
        rand_augment="none",
        erasing=0.0,
        drop_path=0.0,
        **{**QUICK, "epochs": 12},
    )
    assert (
        fingerprints.weights_fingerprint(encoder) == before
        and not any(p.requires_grad for p in encoder.parameters())
        and encoder.backbone.has_mask_token
    )
    assert (
        report.numbers["top1"] > 60
        and report.numbers["top5"] == 100
        and report.numbers["top1"] >= report.numbers["top1_last"]
        and list(report.corrupt) == ["5.png"]
    )
    differences = "\n".join(report.protocol["differences"])
    for words in (
        "lr 0.02 instead of 7.5e-06",
        "repeats 1 instead of 3",
        "mixup 0.0 instead of 0.8",
        "16x16 pixels",
        "rand_augment none instead of",
    ):
        assert words in differences


def test_with_all_augmentation_of_the_paper():
    report = finetune(tiny_encoder(), sets(24, 12), preset="ibot-imagenet", batch_size=8, epochs=2, warmup_epochs=1)
    assert (
        report.protocol["layer_decay"] == 0.75
        and math.isfinite(report.numbers["loss_last_step"])
        and 0 <= report.numbers["top1"] <= 100
    )
    assert any("width 24" in line for line in report.protocol["differences"])


def test_images_that_timms_augmentation_cannot_take_are_refused():
    data = Colors(20)
    image = data.image
    data.image = lambda i: image(i)[:1]
    with pytest.raises(UserError, match="RGB images of 8 bits, and .*png has 1 channels"):
        next(make(data=data).epoch(0, torch.device("cpu")))


def test_the_head_starts_small():
    large, small = FineTuned(tiny_encoder(), 3), FineTuned(tiny_encoder(), 3, head_scale=0.001)
    assert (
        torch.allclose(large.head.weight * 0.001, small.head.weight)
        and 0.01 < large.head.weight.std() < 0.03
        and not large.head.bias.any()
    )


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"preset": "mae"}, "no preset 'mae'"),
        ({"batch_size": 9}, "must divide by 2"),
        ({"epochs": 3, "warmup_epochs": 3}, "not shorter than the run"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"epochs": 0}, "epochs is 0"),
    ],
)
def test_mistakes_are_refused_before_any_image_is_read(options, reason):
    data = sets()
    with pytest.raises(UserError, match=reason):
        finetune(tiny_encoder(), data, **options)
    assert data["train"].reads == data["test"].reads == 0


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_the_first_step_of_each_layer_is_its_learning_rate(decay):
    """AdamW's first step moves an entry by its rate: lr decay^(depth + 1 - layer), that is lr for the head."""
    encoder, data = tiny_encoder(depth=2), sets(8, 4)
    options = {"lr": 1e-3, "lr_per": None, "epochs": 1, "batch_size": 8, "warmup_epochs": 0, "schedule": "epoch"}
    chosen = PRESETS["deit"] | options | {"weight_decay": 0.0, "drop_path": 0.0, "layer_decay": decay}
    model = tunable(encoder, 3, chosen, seed=0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    plain = Augmentation(mixup=0.0, cutmix=0.0, smoothing=0.0, rand_augment="none", erasing=0.0, repeats=1)
    batches = TransferBatches(data["train"], encoder, plain, batch_size=8, classes=3)
    train(model, batches, data["test"], None, chosen, FinetuneOptions(), {})
    moved = {name: float((value.detach() - before[name]).abs().max()) for name, value in model.named_parameters()}
    for name, power in (
        ("backbone.patch_embed.proj", 3),
        ("backbone.blocks.0.mlp.fc1", 2),
        ("backbone.blocks.1.mlp.fc2", 1),
    ):
        assert moved[f"encoder.{name}.weight"] == pytest.approx(1e-3 * decay**power, rel=1e-2), name
    assert moved["head.weight"] == pytest.approx(1e-3, rel=1e-2)
