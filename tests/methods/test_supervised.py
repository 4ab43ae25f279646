"""Supervised training as a method: its average against a loop, its views, its norms, two ranks against one."""

import copy

import pytest
import torch
from torch import nn

from maskwise.distributed.world import World
from maskwise.engine.optim import make_optimizer, parameter_groups
from maskwise.engine.trainer import Schedules, Trainer
from maskwise.errors import UserError
from maskwise.functional.classification import jsd, smooth_labels, softmax_loss
from maskwise.methods import Supervised
from maskwise.nn import Backbone, Encoder, LinearClassifier, SimPool
from maskwise.nn.tokens import Features

CLASSES, SIZE = 5, 16


def method(dropout=0.0, drop_path=0.0, **options):
    torch.manual_seed(0)
    backbone = Backbone(
        "vit_tiny_patch16_224",
        image_size=SIZE,
        patch_size=4,
        embed_dim=12,
        depth=2,
        num_heads=3,
        drop_path=drop_path,
        class_token=False,
    )
    encoder = Encoder(backbone, SimPool(12), norm="before")
    return Supervised(encoder, LinearClassifier(encoder, CLASSES, dropout=dropout), **options).double()


class Convolutional(nn.Module):
    """A few convolutions with batch norms, which looks like an encoder."""

    mean, std, image_size, dim = (0.5,) * 3, (0.25,) * 3, (SIZE, SIZE), 6

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.pooling, self.backbone = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Identity(), None

    def forward(self, images, *, attention=False, layers=(), drop_key=None):
        x = self.norm(self.conv(images)).relu()
        return Features(x.mean(dim=(2, 3)), x.flatten(2).transpose(1, 2), None, x.shape[2:])


def convolutional(**options):
    torch.manual_seed(0)
    encoder = Convolutional()
    return Supervised(encoder, LinearClassifier(encoder, CLASSES), **options).double()


def batch(samples=8, views=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(views * samples, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    return images, smooth_labels(labels, CLASSES, 0.1), torch.arange(samples) * 3 + 1


def train(built, steps, accumulate=1, name="adamw", momentum=0.5, samples=8, **options):
    trainer = Trainer(
        built,
        optimizer=make_optimizer(name, parameter_groups(built), **options),
        world=World(),
        schedules=Schedules(
            lr=lambda step: 1e-2,
            weight_decay=lambda step: 0.05,
            momentum=lambda step: momentum,
            steps_per_epoch=4,
            total_steps=steps,
        ),
        accumulate=accumulate,
        freeze_last_layer=0,
        clip=1.0,
        clip_mode="global",
    )
    return trainer, [trainer.step(*batch(samples, built.views, seed)) for seed in range(steps)]


def test_its_loss_is_the_cross_entropy_of_its_logits():
    built, (images, targets, ids) = method(), batch()
    features = built.student.encoder(images, attention=False)
    expected = softmax_loss(built.student.head(features), targets)
    assert torch.allclose(built(images, targets, step=0, epoch=0, sample_ids=ids)["loss"], expected)


@pytest.mark.parametrize("make", [method, convolutional])
def test_the_average_is_a_loop_over_weights_and_statistics(make):
    built = make(average=True)
    expected = copy.deepcopy(built.student).state_dict()
    trainer, _ = train(built, 0)
    for seed in range(3):
        trainer.step(*batch(8, 1, seed))
        for name, value in built.student.state_dict().items():
            expected[name] = 0.5 * expected[name] + 0.5 * value if value.is_floating_point() else value.clone()
    averaged = built.teacher.state_dict()
    assert averaged.keys() == expected.keys() and not any(p.requires_grad for p in built.teacher.parameters())
    for name in averaged:
        torch.testing.assert_close(averaged[name], expected[name], rtol=1e-12, atol=1e-12)


def test_without_an_average_the_student_is_the_teacher():
    built = method()
    assert built.teacher is built.student
    assert {name.partition(".")[0] for name in built.state_dict()} == {
        "student",
        "teacher",
    }  # so that every reader of checkpoints finds a teacher
    train(built, 2)
    for name, value in built.student.state_dict().items():
        assert torch.equal(built.state_dict()[f"teacher.{name}"], value)


def test_a_bad_step_moves_nothing():
    built = convolutional(average=True)
    trainer, _ = train(built, 2)
    before = copy.deepcopy(built.state_dict())
    images, targets, ids = batch()
    images[0, 0, 0, 0] = float("nan")
    assert not trainer.step(images, targets, ids)["ok"]
    assert (
        all(torch.equal(value, before[name]) for name, value in built.state_dict().items())
        and int(trainer.skipped) == 1
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb"])
def test_micro_batches_are_the_batch(optimizer):
    """Drop path and the classifier's dropout are drawn, so that the draws must not depend on the split."""
    options = {"nesterov": True} if optimizer == "sgd" else {}
    (one, seen), (two, again) = (
        train(method(dropout=0.3, drop_path=0.3, average=True), 4, parts, optimizer, **options) for parts in (1, 2)
    )
    for first, second in zip(seen, again):
        assert torch.allclose(first["loss"], second["loss"], rtol=1e-9)
    for name, value in one.method.state_dict().items():
        torch.testing.assert_close(two.method.state_dict()[name], value, rtol=0, atol=1e-9)


def test_dropout_is_keyed_by_the_sample():
    built, (images, targets, ids) = method(dropout=0.5), batch()
    first, again, later = (built(images, targets, step=step, epoch=0, sample_ids=ids)["loss"] for step in (3, 3, 4))
    turned = built(images.flip(0), targets.flip(0), step=3, epoch=0, sample_ids=ids.flip(0))["loss"]
    assert torch.equal(first, again) and torch.allclose(first, turned) and not torch.allclose(first, later)


def test_a_transformers_dropout_is_timms_and_seeded_by_the_step():
    """On tokens, after each projection and twice in each MLP; off in eval mode; the same whatever was drawn before."""
    built, (images, targets, ids) = method(dropout=0.0), batch()
    options = {"step": 3, "epoch": 0, "sample_ids": ids}
    plain = built(images, targets, **options)["loss"]
    built = dropping(0.1)
    places = [
        part for part in built.student.encoder.backbone.modules() if isinstance(part, nn.Dropout) and part.p == 0.1
    ]
    assert len(places) == 1 + 2 * 3
    one = built(images, targets, **options)["loss"]
    torch.rand(5)
    assert torch.equal(one, built(images, targets, **options)["loss"]) and not torch.allclose(one, plain)
    built.student.encoder.backbone.set_execution(
        checkpointing="elementwise"
    )  # nothing is computed again with other draws
    assert torch.equal(one, built(images, targets, **options)["loss"])
    assert not torch.equal(one, built(images, targets, **{**options, "step": 4})["loss"])
    assert torch.allclose(built.eval()(images, targets, **options)["loss"], plain)
    with pytest.raises(UserError, match="method.dropout=0.1 is for Vision Transformers"):
        convolutional(dropout=0.1)


def dropping(rate):
    built = method()
    return Supervised(built.student.encoder, built.student.head, dropout=rate).double()


def test_views_share_labels_and_their_divergence_is_added():
    built = method(splits=3, jsd_weight=12.0)
    images, targets, ids = batch(4, 3)
    logits = built.student.head(built.student.encoder(images, attention=False))
    expected = softmax_loss(logits[:4], targets) + 12 * jsd(logits, 3)
    assert torch.allclose(built(images, targets, step=0, epoch=0, sample_ids=ids)["loss"], expected)


def test_further_views_have_norms_of_their_own():
    """The first view passes the encoder's norms, the others their own, each with the statistics of its view alone."""
    built = convolutional(splits=3, jsd_weight=1.0, split_norm=True)
    images, targets, ids = batch(4, 3)
    with torch.no_grad():
        built.further_norms[1][0].weight.fill_(2.0)
    built(images, targets, step=0, epoch=0, sample_ids=ids)["loss"].backward()
    seen = [built.student.encoder.norm, built.further_norms[0][0], built.further_norms[1][0]]
    for norm, part in zip(seen, images.chunk(3)):
        maps = built.student.encoder.conv(part)
        torch.testing.assert_close(norm.running_mean, 0.1 * maps.mean(dim=(0, 2, 3)))
        assert norm.weight.grad is not None and int(norm.num_batches_tracked) == 1
    single = convolutional()
    features = built.train().student_features(images, torch.zeros(12, dtype=torch.int64))
    torch.testing.assert_close(
        features.pooled[:4], single.student_features(images[:4], torch.zeros(4, dtype=torch.int64)).pooled
    )
    assert not built.eval().student.encoder(images[:1]).pooled.isnan().any() and all(
        p.grad is not None for p in built.parameters()
    )


def test_tokens_and_tables_are_not_decayed():
    decayed, plain = parameter_groups(method())
    assert "student.encoder.backbone.pos_embed" in plain["names"] and "student.head.linear.weight" in decayed["names"]


def test_it_learns():
    images, targets, ids = batch(8, 1, 7)
    trainer, _ = train(method(), 0)
    first = trainer.step(images, targets, ids)["loss"]
    for _ in range(30):
        last = trainer.step(images, targets, ids)["loss"]
    assert last < 0.6 * first


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"jsd_weight": 1.0}, "compares views of an image, and there is only one"),
        ({"split_norm": True}, "there is only one view"),
        ({"loss": "hinge"}, "method.loss='hinge' is unknown"),
        ({"split_norm": True, "splits": 3}, "no batch norm"),
    ],
)
def test_mistakes_are_told(options, reason):
    with pytest.raises(UserError, match=reason):
        method(**options)
