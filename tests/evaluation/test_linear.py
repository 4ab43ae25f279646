"""Linear probing: steps against torch optimizers in float64, sweep against separate runs, presets against papers."""

import math
import random

import numpy as np
import pytest
import torch

from maskwise.data.augmentation.probe_crop import CropAndFlip
from maskwise.engine.optim import LARS
from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.evaluation.linear import PRESETS, SWEEP, grid, linear, settings
from maskwise.evaluation.probes.batches import ProbeBatches
from maskwise.evaluation.probes.linear_heads import HeadSpec, LinearHeads
from maskwise.evaluation.scoring.classifier import Classifier, load_classifier
from support.tiny_sets import Colors, sets, tiny_encoder


def some(n=40, width=6, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=g, dtype=torch.float64), torch.randint(0, classes, (n,), generator=g)


@pytest.mark.parametrize(
    "spec", [HeadSpec(0.5), HeadSpec(0.5, 1e-2), HeadSpec(2.0, 1e-2, "lars"), HeadSpec(2.0, 0.0, "lars")], ids=str
)
def test_steps_equal_those_of_torch(spec):
    """Against autograd and torch's own SGD (or the LARS that training uses, itself tested against literal values)."""
    x, y = some()
    heads = LinearHeads([spec], 6, 5, seed=3, dtype=torch.float64)
    layer = heads.head(0).double()
    with torch.no_grad():
        layer.weight.copy_(heads.weight[0])
    if spec.optimizer == "lars":
        optimizer = LARS(layer.parameters(), lr=spec.lr, weight_decay=spec.weight_decay)
    else:
        optimizer = torch.optim.SGD(layer.parameters(), lr=spec.lr, momentum=0.9, weight_decay=spec.weight_decay)
    for step in range(12):
        factor = 0.5 * (1 + math.cos(math.pi * step / 12))
        optimizer.param_groups[0]["lr"] = spec.lr * factor
        loss = torch.nn.functional.cross_entropy(layer(x[step:]), y[step:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.allclose(heads.step(x[step:], y[step:], factor), loss.detach()[None], atol=1e-12)
    assert torch.allclose(heads.weight[0], layer.weight, atol=1e-11) and torch.allclose(
        heads.bias[0], layer.bias, atol=1e-11
    )


def test_sweep_equals_separate_runs():
    """45 learning rates, and 180 heads with weight decay and LARS (iBOT, linear probe)."""
    chosen = {"batch_size": 256, **{key: PRESETS["ibot-sweep-180"][key] for key in ("lr", "weight_decay", "optimizer")}}
    names, specs = grid(chosen)
    assert len(SWEEP) == 45 and min(SWEEP) == 1e-4 and max(SWEEP) == 9 and len(specs) == 180 == len(set(names))
    x, y = some()
    together = LinearHeads(specs, 6, 5, dtype=torch.float64)
    alone = [LinearHeads([spec], 6, 5, dtype=torch.float64) for spec in specs]
    for step in range(4):
        losses = together.step(x, y, 1 - step / 8)
        assert torch.allclose(losses, torch.cat([one.step(x, y, 1 - step / 8) for one in alone]), rtol=1e-9)
    assert torch.allclose(together.weight, torch.cat([one.weight for one in alone]), rtol=1e-9, atol=1e-12)
    assert torch.equal(together.accuracy(x, y), torch.cat([one.accuracy(x, y) for one in alone]))


def test_chunks_do_not_change_the_step(monkeypatch):
    x, y = some(101)
    whole, pieces = (LinearHeads([HeadSpec(0.1), HeadSpec(1.0)], 6, 5, dtype=torch.float64) for _ in range(2))
    whole.step(x, y)
    monkeypatch.setattr("maskwise.evaluation.probes.linear_heads._CELLS", 100)
    pieces.step(x, y)
    assert torch.allclose(whole.weight, pieces.weight, atol=1e-13) and torch.equal(
        whole.accuracy(x, y), pieces.accuracy(x, y)
    )


def test_accuracy_is_nan_for_a_diverged_head():
    heads = LinearHeads([HeadSpec(1.0), HeadSpec(1.0)], 3, 7)
    heads.weight.zero_(), heads.bias.copy_(torch.arange(7.0).flip(0))  # ranks class 0 first, 6 last
    heads.weight[1, 2, 1] = float("nan")
    scores = heads.accuracy(torch.zeros(4, 3), torch.tensor([0, 1, 4, 5]))
    assert scores[0].tolist() == [25.0, 75.0] and scores[1].isnan().all()


def test_presets_equal_the_papers():
    """Settings of DINO, AttMask, SimPool and iBOT, by the width of the encoder."""
    encoder = tiny_encoder()
    for name, feature, lr, batch in (
        ("dino", "cls4", 0.001, 1024),
        ("attmask", "cls4", 0.005, 2048),
        ("simpool", "pooled", 0.001, 1024),
        ("ibot-sweep", "cls4", SWEEP, 1024),
    ):
        chosen, paper, _ = settings(encoder, name, {})
        assert (
            chosen
            == paper
            == {
                "epochs": 100,
                "augment": True,
                "weight_decay": 0.0,
                "optimizer": "sgd",
                "feature": feature,
                "lr": lr,
                "batch_size": batch,
            }
        )
    encoder.dim = 768
    assert (
        settings(encoder, "dino", {})[0]["feature"] == "cls~patch_mean"
        and settings(encoder, "ibot-sweep", {})[0]["feature"] == "cls+patch_mean"
    )
    assert (
        settings(tiny_encoder("simpool", class_token=False), None, {})[2] == "simpool"
        and settings(tiny_encoder(), None, {})[2] == "dino"
    )
    assert grid(settings(encoder, "attmask", {})[0])[1] == [HeadSpec(0.005 * 2048 / 256)]


def test_learning_rate_of_every_epoch(monkeypatch):
    seen = []
    monkeypatch.setattr(LinearHeads, "step", lambda self, x, y, factor: seen.append(self.lr[0].item() * factor))
    linear(tiny_encoder(), sets(), augment=False, epochs=5, batch_size=32, lr=0.1)
    expected = [
        0.5 * 0.1 * 32 / 256 * (1 + math.cos(math.pi * epoch / 5)) for epoch in range(5) for _ in range(2)
    ]  # 48 images: two batches, the second short
    assert seen == pytest.approx(expected)


def test_end_to_end_with_frozen_features(tmp_path):
    encoder, data = tiny_encoder(), sets()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    report = linear(
        encoder,
        data,
        augment=False,
        epochs=30,
        batch_size=16,
        lr=[0.5, 5.0, 1e9],
        cache=tmp_path / "cache",
        save=tmp_path / "probe.safetensors",
    )
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    numbers = report.numbers
    assert (
        numbers["top1"] > 60 > 100 / 3
        and numbers["top5"] == 100
        and 1 <= numbers["best_epoch"] <= 30
        and numbers["top1"] >= numbers["top1_last"]
    )
    assert numbers["top1"] == max(numbers["top1_lr0.5"], numbers["top1_lr5"]) and numbers["best_lr"] in (0.5, 5.0)
    differences = "\n".join(report.protocol["differences"])
    for words in (
        "epochs 30 instead of 100",
        "batch_size 16 instead of 1024",
        "frozen features",
        "16x16 pixels",
        "48 training images of 3 classes",
    ):
        assert words in differences
    again = linear(encoder, data, augment=False, epochs=30, batch_size=16, lr=[0.5, 5.0, 1e9], cache=tmp_path / "cache")
    assert again.numbers == pytest.approx(numbers, nan_ok=True) and again.cost["features"] == {
        "train": "cached",
        "test": "cached",
    }
    classifier = load_classifier(encoder, tmp_path / "probe.safetensors")
    assert classifier.feature == "cls4" and isinstance(classifier, Classifier)
    encoder.eval()
    with torch.no_grad():
        logits = classifier(torch.stack([encoder.transform(data["test"].image(i)) for i in range(30)]))
    assert 100 * (logits.argmax(1) == data["test"].labels).double().mean() == pytest.approx(numbers["top1"])


def test_new_crops_take_one_pass_of_the_encoder_per_epoch():
    encoder, data = tiny_encoder(), sets(24, 12, broken=(5,))
    report = linear(encoder, data, epochs=3, batch_size=8, lr=1.0, feature_batch=8)
    assert data["train"].reads == 3 * 24 and data["test"].reads == 12
    assert (
        set(report.corrupt) == {"5.png"}
        and report.protocol["augment"]
        and not any("frozen" in line for line in report.protocol["differences"])
    )
    batches = ProbeBatches(encoder, data["train"], "cls4", batch_size=8, augment=True, feature_batch=8)
    one, two, again = ([torch.cat(part) for part in zip(*batches.epoch(epoch))] for epoch in (0, 1, 0))
    assert (
        len(one[0]) == 23
        and torch.equal(one[0], again[0])
        and not torch.equal(one[0].sort(0).values, two[0].sort(0).values)
    )


def test_features_of_crops_match_their_images():
    encoder, data = tiny_encoder(), Colors(13)
    batches = ProbeBatches(encoder, data, "pooled", batch_size=4, augment=True, feature_batch=4, seed=2)
    x, y = (torch.cat(part) for part in zip(*batches.epoch(1)))
    from maskwise.functional import keyed_random

    view, order = CropAndFlip((16, 16), seed=2, epoch=1), keyed_random.order(2, 1, 13)
    images = torch.stack([view(data.image(i), i) for i in order.tolist()]).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    with torch.no_grad():
        assert torch.allclose(x, encoder.eval()((images - mean) / std).pooled, atol=1e-5) and torch.equal(
            y, data.labels[order]
        )


def test_windows_do_not_change_the_batches(monkeypatch):
    encoder, data = tiny_encoder(), Colors(21)

    def make():
        return list(ProbeBatches(encoder, data, "pooled", batch_size=4, augment=True, feature_batch=4).epoch(0))

    whole = make()
    monkeypatch.setattr("maskwise.evaluation.probes.batches.WINDOW", 8)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole, make(), strict=True))


def test_published_linear_weights(tmp_path):
    """Files of DINO: a state dict of `module.linear`, with interleaved features for ViT-B."""
    encoder, data = tiny_encoder(), Colors(4)
    for width, feature in ((96, None), (24, None), (48, "cls~patch_mean")):
        weight, bias = torch.randn(7, width), torch.randn(7)
        torch.save(
            {
                "epoch": 100,
                "state_dict": {"module.linear.weight": weight, "module.linear.bias": bias},
                "best_acc": 77.0,
            },
            tmp_path / "probe.pth",
        )
        classifier = load_classifier(encoder, tmp_path / "probe.pth", feature)
        images = torch.stack([encoder.transform(data.image(i)) for i in range(4)])
        bank = extract.extract(encoder, data, classifier.feature)
        with torch.no_grad():
            assert torch.allclose(classifier.eval()(images), bank[classifier.feature] @ weight.T + bias, atol=1e-4)
    with pytest.raises(UserError, match="give feature=cls~patch_mean"):
        load_classifier(encoder, tmp_path / "probe.pth")
    with pytest.raises(UserError, match="which pooled of this encoder does not have"):
        load_classifier(encoder, tmp_path / "probe.pth", "pooled")
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no linear classifier"):
        load_classifier(encoder, tmp_path / "other.pth")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"preset": "mocov3"}, "no preset 'mocov3'; choose from dino"),
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"optimizer": "adam"}, "choose sgd or lars"),
        ({"epochs": 0}, "epochs is 0"),
        ({"evaluate_every": 0}, "evaluate_every is 0"),
        ({"feature": "cls9"}, "needs 9 blocks"),
    ],
)
def test_mistakes_are_refused_before_any_image_is_read(options, reason):
    data = sets()
    with pytest.raises(UserError, match=reason):
        linear(tiny_encoder(), data, **options)
    assert data["train"].reads == data["test"].reads == 0
