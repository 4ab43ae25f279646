"""Test supervised recipes against a table written from the SimPool paper and its commands, not from the YAML."""

import pytest

from maskwise import build
from maskwise.recipe.reading import SHIPPED
from maskwise.recipe.yaml_text import header
from support.miniature import RECIPES, resolved

RAND = "rand-m9-mstd0.5-inc1"
# backbone, epochs, batch, optimizer, peak rate, first warm-up rate, decay, (mixup, cutmix), erasing, splits, average,
# drop path
VIT = ("vit_small_patch16_224", 100, 8 * 74, "adamw", 5e-4, 1e-6, 0.05, (0.2, 0.0), 0.25, 1, 0.99996, 0.1)
RESNET = ("resnet50", 100, 8 * 128, "sgd", 0.4, 1e-5, 2e-5, (0.0, 0.0), 0.6, 3, None, 0.0)
CONVNEXT = ("convnext_small", 100, 8 * 128, "adamw", 1e-3, 1e-6, 0.05, (0.8, 1.0), 0.25, 1, 0.9999, 0.4)


def row(base, pooling, **changed):
    names = (
        "backbone",
        "epochs",
        "batch",
        "optimizer",
        "peak",
        "first",
        "decay",
        "mix",
        "erasing",
        "splits",
        "average",
        "drop_path",
    )
    return {**dict(zip(names, base)), "pooling": pooling, **changed}


EIGHTEEN = {"backbone": "resnet18", "batch": 4 * 128, "peak": 0.1}
PAPER = {"peak": 4e-3, "batch": 8 * 4 * 128}
PUBLISHED = {
    "vits16_cls": (row(VIT, "cls"), 72.7),
    "vits16_gap": (row(VIT, "gap"), 73.3),
    "vits16_simpool": (row(VIT, "simpool"), 74.2),
    "vits16_simpool_nogamma": (row(VIT, "simpool"), 74.3),
    "vits16_cait": (row(VIT, "cait"), 72.6),
    "vits16_slot": (row(VIT, "slot"), 72.9),
    "vits16_ge": (row(VIT, "ge"), 72.6),
    "vits16_cls_300ep": (row(VIT, "cls", epochs=300), 77.9),
    "vits16_simpool_300ep": (row(VIT, "simpool", epochs=300), 78.7),
    "vitb16_cls": (row(VIT, "cls", backbone="vit_base_patch16_224"), 74.1),
    "vitb16_simpool": (row(VIT, "simpool", backbone="vit_base_patch16_224"), 75.1),
    "vits16_cls_depth": (row(VIT, "cls"), 74.6),
    "vits16_simpool_depth": (row(VIT, "simpool"), 72.5),
    "resnet50_gap": (row(RESNET, "gap"), 77.4),
    "resnet50_simpool": (row(RESNET, "simpool"), 78.0),
    "resnet50_cait": (row(RESNET, "cait"), 77.3),
    "resnet50_slot": (row(RESNET, "slot"), 77.3),
    "resnet50_ge": (row(RESNET, "ge"), 77.6),
    "resnet50_gap_200ep": (row(RESNET, "gap", epochs=200), 78.1),
    "resnet50_simpool_200ep": (row(RESNET, "simpool", epochs=200), 78.7),
    "convnext_gap": (row(CONVNEXT, "gap"), 81.1),
    "convnext_simpool": (row(CONVNEXT, "simpool"), 81.7),
    "convnext_cait": (row(CONVNEXT, "cait"), 81.2),
    "convnext_slot": (row(CONVNEXT, "slot"), 80.9),
    "convnext_ge": (row(CONVNEXT, "ge"), 81.3),
    "convnext_gap_300ep": (row(CONVNEXT, "gap", epochs=300), 83.1),
    "convnext_simpool_300ep": (row(CONVNEXT, "simpool", epochs=300), 83.5),
    "convnext_gap_paper": (row(CONVNEXT, "gap", **PAPER), 81.1),
    "convnext_simpool_paper": (row(CONVNEXT, "simpool", **PAPER), 81.7),
    "resnet18_20pct": (row(RESNET, "gap", **EIGHTEEN), 55.0),
    "resnet18_20pct_simpool": (row(RESNET, "simpool", **EIGHTEEN), 57.1),
    # without a published number
    "resnet18_10pct": (row(RESNET, "gap", **EIGHTEEN), None),
    "resnet18_10pct_simpool": (row(RESNET, "simpool", **EIGHTEEN), None),
    "resnet18_50pct": (row(RESNET, "gap", **EIGHTEEN), None),
    "resnet18_50pct_simpool": (row(RESNET, "simpool", **EIGHTEEN), None),
    "vits16_10pct_cls": (row(VIT, "cls"), None),
    "vits16_10pct_simpool": (row(VIT, "simpool"), None),
    "vits16_20pct_cls": (row(VIT, "cls"), None),
    "vits16_20pct_simpool": (row(VIT, "simpool"), None),
    "vits16_50pct_cls": (row(VIT, "cls"), None),
    "vits16_50pct_simpool": (row(VIT, "simpool"), None),
    "vitt16_cls": (row(VIT, "cls", backbone="vit_tiny_patch16_224"), None),
    "vitt16_simpool": (row(VIT, "simpool", backbone="vit_tiny_patch16_224"), None),
    "vitt16_simpool_nogamma": (row(VIT, "simpool", backbone="vit_tiny_patch16_224"), None),
}
SHARES = {"10pct": 130, "20pct": 260, "50pct": 650}  # of each class's images, in file order
POOLINGS = (
    "gap",
    "max",
    "gap_max",
    "gem",
    "lse",
    "how",
    "otk",
    "kmeans",
    "slot",
    "se",
    "cbam",
    "ge",
    "vit",
    "cait",
    "simpool",
)


def test_table_lists_every_recipe():
    assert {name.partition("/")[2] for name in RECIPES if name.startswith("supervised/")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_equals_the_published_row(name):
    expected, accuracy = PUBLISHED[name]
    recipe = resolved(f"supervised/{name}")
    optimizer, augment, method = recipe.optimizer, recipe.augment, recipe.method.keywords()
    settings = {
        "backbone": recipe.backbone.name,
        "epochs": recipe.train.epochs,
        "batch": recipe.train.batch_size,
        "optimizer": optimizer.name,
        "peak": optimizer.peak(recipe.train.batch_size),
        "first": optimizer.warmup_lr,
        "decay": optimizer.weight_decay,
        "mix": (augment.mixup, augment.cutmix),
        "erasing": augment.erasing,
        "splits": augment.splits,
        "average": recipe.teacher.momentum,
        "drop_path": recipe.backbone.keywords()["drop_path"],
        "pooling": recipe.pooling.name,
    }
    assert settings == expected
    assert (optimizer.warmup_epochs, optimizer.min_lr, optimizer.weight_decay_end, optimizer.clip) == (
        5,
        0.0,
        optimizer.weight_decay,
        None,
    )
    assert (augment.size, augment.scale, augment.policy, augment.smoothing, augment.erasing_mode) == (
        224,
        (0.08, 1.0),
        RAND,
        0.1,
        "pixel",
    )
    assert (recipe.data.keywords()["split"], recipe.data.test_split, recipe.evaluate.top1_every) == ("train", "val", 1)
    views = expected["splits"] > 1
    assert (method["jsd_weight"], method["split_norm"], augment.skip_first) == (
        (12.0, True, True) if views else (0.0, False, False)
    )
    assert method["dropout"] == (0.1 if "vit" in expected["backbone"] else 0.0)
    if optimizer.name == "sgd":
        assert (optimizer.keywords()["momentum"], optimizer.keywords()["nesterov"]) == (0.9, True)
    assert recipe.data.keywords()["per_class"] == next((SHARES[share] for share in SHARES if share in name), None)
    published = header((SHIPPED / f"supervised/{name}.yaml").read_text()).published
    assert f"top-1 {accuracy}" in published if accuracy else not any(mark.isdigit() for mark in published)


def test_other_columns():
    gammas = {
        name: resolved(f"supervised/{name}").pooling.keywords()["gamma"]
        for name, (expected, _) in PUBLISHED.items()
        if expected["pooling"] == "simpool"
    }
    none = {
        "vits16_simpool_nogamma",
        "vits16_simpool_300ep",
        "vits16_simpool_depth",
        "vitb16_simpool",
        "vitt16_simpool_nogamma",
    }
    assert gammas == {name: None if name in none else 1.25 if name.startswith("vit") else 2.0 for name in gammas}
    assert (
        resolved("supervised/vits16_cls_depth").backbone.keywords()["depth"],
        resolved("supervised/vits16_simpool_depth").backbone.keywords()["depth"],
    ) == (17, 9)
    assert (
        resolved("supervised/vits16_cls").pooling.norm == "before"
        and resolved("supervised/convnext_gap").pooling.norm == "after"
    )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_benchmark_recipe_accepts_every_pooling(pooling):
    from maskwise.recipe.reading import read_recipe

    assert read_recipe("supervised/resnet18_20pct", f"pooling.name={pooling}").pooling.name == pooling


@pytest.mark.parametrize(
    "name, published",
    [
        ("vits16_cls", 22_050_664),
        ("vits16_simpool", 22_345_576),
        ("vits16_cls_depth", 30_922_984),
        ("vits16_simpool_depth", 17_022_184),
        ("resnet50_gap", 25_557_032),
        ("resnet50_simpool", 33_949_736),
        ("vitt16_cls", 5_717_416),
        ("vitt16_simpool", 5_791_144),
        ("convnext_gap", 50_223_688),
        ("convnext_simpool", 51_404_872),
        ("resnet18_20pct", 11_689_512),
        ("resnet18_20pct_simpool", 12_214_824),
    ],
)
def test_network_has_the_published_size(name, published):
    """Parameters of encoder and classifier with 1000 classes (SimPool paper), without norms used in training only."""
    import torch

    from maskwise.nn import LinearClassifier

    with torch.device("meta"):
        encoder = build.encoder(resolved(f"supervised/{name}"))
        assert (
            sum(p.numel() for part in (encoder, LinearClassifier(encoder, 1000)) for p in part.parameters())
            == published
        )
