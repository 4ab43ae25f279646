"""Test resolved recipes against a table written from the papers and their repositories, not from the YAML."""

from dataclasses import dataclass, replace

import pytest

from support.miniature import RECIPES, resolved

IMAGENET = 1_281_167


@dataclass(frozen=True)
class Row:
    """Published settings of a run; ranks x per_rank is the batch, images the length of the training set."""

    epochs: int
    ranks: int
    per_rank: int
    peak: float
    per_epoch: int
    momentum: float
    temps: tuple  # warm, final, epochs
    prototypes: int
    norm_last: bool
    crops: tuple  # global scale, number and scale of the local ones
    mask: dict
    images: int = IMAGENET
    per_class: object = None
    method: str = "ibot"
    backbone: str = "vit_small_patch16_224"
    pooling: str = "cls"
    optimizer: tuple = ("adamw", 1e-6, 0.04, 0.4, 3.0, 1)  # name, last rate, weight decay from and to, clip, freeze
    start_epoch: int = 0
    drop_path: float = 0.1


WARM, COLD = (0.04, 0.07, 30), (0.04, 0.04, 0)
TEN, WIDE, SIX = (((0.25, 1.0), 10, (0.05, 0.25))), (((0.32, 1.0), 10, (0.05, 0.32))), (((0.25, 1.0), 6, (0.05, 0.25)))
VANILLA, RESNET = (((0.4, 1.0), 8, (0.05, 0.4))), (((0.14, 1.0), 8, (0.05, 0.14)))
BLOCK = {"name": "block", "ratio": (0.0, 0.3), "var": (0.0, 0.2), "prob": 1.0, "ratio_per": "view"}
RANDOM = {**BLOCK, "name": "random"}
ALL75 = {"name": "random", "ratio": 0.75, "var": 0.0, "prob": 1.0, "ratio_per": "view"}
COIN75 = {"name": "random", "ratio": (0.0, 0.75), "var": (0.0, 0.0), "prob": 1.0, "ratio_per": "view"}
HIGH = {"name": "attmask_high", "ratio": 0.3, "var": 0.2, "prob": 0.5, "ratio_per": "step"}
LOW = {**HIGH, "name": "attmask_low"}
HINT = {**HIGH, "name": "attmask_hint", "show_max": 0.1}
NONE = {"name": "none"}

A1 = Row(100, 4, 60, 4.6875e-4, 5338, 0.996, WARM, 8192, False, TEN, HINT)
A5 = replace(A1, per_epoch=1083, momentum=0.99, crops=SIX, mask=HIGH, images=260_000, per_class=260)
D1 = Row(100, 8, 64, 1e-3, 2502, 0.996, COLD, 65536, True, VANILLA, NONE, method="dino")
I1 = Row(800, 16, 64, 2e-3, 1251, 0.996, WARM, 8192, False, TEN, BLOCK)
SWIN = replace(I1, epochs=300, backbone="swin_tiny_patch4_window7_224", start_epoch=50, pooling="gap")
S1 = Row(
    100,
    8,
    100,
    1.5625e-3,
    1601,
    0.996,
    WARM,
    65536,
    False,
    SIX,
    NONE,
    method="dino",
    optimizer=("adamw", 1e-5, 0.04, 0.4, None, 1),
)
LONG = (0.04, 0.07, 50)
D8 = replace(  # the released models; their arguments are linked by the official repository
    D1,
    epochs=800,
    ranks=16,
    peak=2e-3,
    per_epoch=1251,
    temps=WARM,
    norm_last=False,
    crops=TEN,
    optimizer=("adamw", 1e-5, 0.04, 0.4, None, 1),
)
BASE = {"temps": LONG, "norm_last": True, "backbone": "vit_base_patch16_224", "peak": 3e-3, "epochs": 400}
DB = replace(D8, ranks=32, per_rank=32, optimizer=("adamw", 2e-6, 0.04, 0.4, 0.3, 3), **BASE)
IB = replace(I1, crops=WIDE, optimizer=("adamw", 2e-6, 0.04, 0.4, 0.3, 3), **BASE)
R50 = replace(
    S1,
    per_rank=160,
    peak=1.5,
    per_epoch=1000,
    temps=LONG,
    prototypes=60000,
    norm_last=True,
    crops=((0.14, 1.0), 6, (0.05, 0.14)),
    backbone="resnet50",
    pooling="simpool",
    drop_path=0.0,
    optimizer=("lars", 4.8e-3, 1e-6, 1e-6, None, 1),
)
CNX = replace(
    S1,
    per_rank=60,
    peak=1.875e-3,
    per_epoch=2669,
    temps=LONG,
    norm_last=True,
    crops=((0.14, 1.0), 6, (0.05, 0.14)),
    backbone="convnext_small",
    pooling="simpool",
    drop_path=0.4,
    optimizer=("adamw", 2e-6, 0.04, 0.4, 0.3, 3),
)

PUBLISHED = {
    "attmask/100pct_hint": A1,
    "attmask/100pct_high": replace(A1, mask=HIGH),
    "attmask/100pct_high_300ep": replace(
        A1, epochs=300, ranks=8, per_rank=100, peak=1.5625e-3, per_epoch=1601, crops=WIDE, mask=HIGH
    ),
    "attmask/100pct_block": replace(A1, mask=BLOCK),
    "attmask/100pct_hint_simpool": replace(A1, pooling="simpool"),
    "attmask/100pct_high_simpool": replace(A1, mask=HIGH, pooling="simpool"),
    "attmask/100pct_dino": replace(A1, mask=NONE, method="dino"),
    "attmask/20pct_hint": replace(A5, mask=HINT),
    "attmask/20pct_high": A5,
    "attmask/20pct_block": replace(A5, mask=BLOCK),
    "attmask/20pct_random": replace(A5, mask=RANDOM),
    "attmask/20pct_random75": replace(A5, mask=ALL75),
    "attmask/20pct_random75_coin": replace(A5, mask=COIN75),
    "attmask/20pct_low": replace(A5, mask=LOW),
    "attmask/20pct_dino": replace(A5, mask=NONE, method="dino"),
    "attmask/20pct_dino_block": replace(A5, mask=BLOCK, method="dino"),
    "attmask/20pct_dino_random": replace(A5, mask=RANDOM, method="dino"),
    "attmask/20pct_dino_random75": replace(A5, mask=ALL75, method="dino"),
    "attmask/20pct_dino_hint": replace(A5, mask=HINT, method="dino"),
    "attmask/20pct_dino_high": replace(A5, method="dino"),
    "attmask/20pct_dino_low": replace(A5, mask=LOW, method="dino"),
    "attmask/10pct_block": replace(A5, mask=BLOCK, images=130_000, per_class=130, per_epoch=541),
    "attmask/10pct_high": replace(A5, images=130_000, per_class=130, per_epoch=541),
    "attmask/5pct_block": replace(A5, mask=BLOCK, images=65_000, per_class=65, per_epoch=270),
    "attmask/5pct_high": replace(A5, images=65_000, per_class=65, per_epoch=270),
    "ibot/vits16_800ep": I1,
    "ibot/swint14_300ep": replace(SWIN, ranks=40, per_rank=26, peak=2.03125e-3, per_epoch=1231),
    "ibot/swint7_300ep": SWIN,  # its batch is not published; 16 x 64 as in the other row with 16 GPUs
    "ibot/vitb16_400ep": IB,
    "ibot/vitb16_rand_400ep": replace(IB, mask={**RANDOM, "ratio": (0.0, 0.7), "var": (0.0, 0.05)}),
    "ibot/vitl16_250ep": replace(
        I1,
        epochs=250,
        temps=LONG,
        norm_last=True,
        backbone="vit_large_patch16_224",
        drop_path=0.2,
        optimizer=("adamw", 2e-4, 0.04, 0.48, 0.3, 3),
    ),
    "dino/vits16_100ep": D1,
    "dino/vits16_300ep": replace(D1, epochs=300, ranks=16, peak=2e-3, per_epoch=1251, temps=WARM, norm_last=False),
    "dino/vits16_800ep": D8,
    "dino/vits8_800ep": replace(
        D8,
        ranks=64,
        per_rank=16,
        crops=((0.4, 1.0), 10, (0.05, 0.4)),
        backbone="vit_small_patch8_224",
        optimizer=("adamw", 1e-6, 0.04, 0.4, 3.0, 1),
    ),
    "dino/vitb16_400ep": DB,
    "dino/vitb8_300ep": replace(
        DB,
        epochs=300,
        ranks=176,
        per_rank=6,
        peak=2.0625e-3,
        per_epoch=1213,
        temps=(0.03, 0.07, 50),
        backbone="vit_base_patch8_224",
        optimizer=("adamw", 2e-6, 0.04, 0.4, 3.0, 3),
    ),
    "dino/resnet50_800ep": replace(R50, epochs=800, ranks=80, per_rank=51, peak=4.78125, per_epoch=314, pooling="gap"),
    "dino/resnet50_100ep": replace(
        D1,
        peak=0.06,
        crops=RESNET,
        backbone="resnet50",
        pooling="gap",
        drop_path=0.0,
        optimizer=("sgd", 1e-6, 1e-4, 1e-4, 3.0, 1),
    ),
    "mst/vits16_100ep": replace(
        A1, mask={**LOW, "ratio": 0.125, "var": 0.0, "prob": 1.0}, method="mst"
    ),  # the mask is our reading
    "simpool/vits16_dino_cls": S1,
    "simpool/vits16_dino_cls_300ep": replace(S1, epochs=300),
    "simpool/vits16_dino": replace(S1, pooling="simpool"),
    "simpool/vits16_dino_nogamma": replace(S1, pooling="simpool"),
    "simpool/vits16_dino_300ep": replace(S1, epochs=300, pooling="simpool"),
    "simpool/vits16_dino_cls_20pct": replace(S1, per_epoch=325, images=260_000, per_class=260),
    "simpool/vits16_dino_20pct": replace(S1, pooling="simpool", per_epoch=325, images=260_000, per_class=260),
    "simpool/resnet50_dino": R50,
    "simpool/resnet50_dino_gap": replace(R50, pooling="gap"),
    "simpool/resnet50_dino_nogamma": R50,
    "simpool/convnext_small_dino": CNX,
    "simpool/convnext_small_dino_gap": replace(CNX, pooling="gap"),
    "simpool/convnext_small_dino_nogamma": CNX,
    "pretrain/attmask_hint_vits16": A1,
    "pretrain/ibot_vits16": I1,
    "pretrain/dino_vits16": D1,
}
OURS = {
    "debug/tiny",
    "pretrain/cifar10_small",
    "pretrain/cifar10_small_dino",
    "pretrain/imagenette224_core",
    "pretrain/quickstart_shapes",
}


def test_table_lists_every_recipe_of_a_paper():
    papers = {name for name in RECIPES if name.partition("/")[0] in ("attmask", "dino", "ibot", "mst", "simpool")}
    assert papers <= set(PUBLISHED) and set(PUBLISHED) <= set(RECIPES)
    assert set(RECIPES) - set(PUBLISHED) >= OURS


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_equals_the_published_row(name):
    row, recipe = PUBLISHED[name], resolved(name)
    options, optimizer = recipe.optimizer, recipe.optimizer.keywords()
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.steps) == (
        row.epochs,
        row.ranks * row.per_rank,
        None,
    )
    assert options.lr * recipe.train.batch_size / 256 == pytest.approx(row.peak, rel=1e-9)
    # the references' count: each rank takes ceil(N / ranks) images and drops its last, short batch
    assert -(-row.images // row.ranks) // row.per_rank == row.per_epoch == row.images // recipe.train.batch_size
    assert (recipe.data.keywords()["per_class"], recipe.data.keywords()["split"], recipe.data.test_split) == (
        row.per_class,
        "train",
        "val",
    )
    assert (recipe.teacher.momentum, recipe.teacher.momentum_end) == (row.momentum, 1.0)
    assert (recipe.teacher.warmup_temp, recipe.teacher.temp, recipe.teacher.warmup_temp_epochs) == row.temps
    if row.method == "ibot":
        assert (recipe.teacher.warmup_patch_temp, recipe.teacher.patch_temp) == (0.04, 0.07)
        method = recipe.method.keywords()
        assert (method["lambda1"], method["lambda2"], method["patch_loss"], method["start_epoch"]) == (
            1.0,
            1.0,
            "image",
            row.start_epoch,
        )
    assert (
        recipe.method.name == row.method
        and recipe.method.keywords()["student_temp"] == 0.1
        and recipe.method.keywords()["center_momentum"] == 0.9
    )
    assert (recipe.head.prototypes, recipe.head.norm_last_layer, recipe.head.patch_prototypes) == (
        row.prototypes,
        row.norm_last,
        None,
    )
    assert (recipe.head.hidden, recipe.head.bottleneck, recipe.head.layers) == (2048, 256, 3)
    assert (recipe.crops.global_scale, recipe.crops.local_number, recipe.crops.local_scale) == row.crops
    assert (recipe.crops.global_size, recipe.crops.local_size) == (224, 96)
    assert (recipe.crops.jitter, recipe.crops.jitter_prob, recipe.crops.gray_prob) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
    assert (recipe.crops.blur_prob, recipe.crops.blur_sigma, recipe.crops.solarize_prob) == (
        (1.0, 0.1, 0.5),
        (0.1, 2.0),
        0.2,
    )
    assert {"name": recipe.masking.name, **recipe.masking.keywords()} == row.mask
    assert (recipe.backbone.name, recipe.backbone.keywords()["drop_path"]) == (row.backbone, row.drop_path)
    assert recipe.pooling.name == row.pooling
    assert (
        options.name,
        options.min_lr,
        options.weight_decay,
        options.weight_decay_end,
        options.clip,
        options.freeze_last_layer,
    ) == row.optimizer
    assert (options.warmup_epochs, options.clip_mode) == (10, "tensor")
    expected = {
        "adamw": {"betas": (0.9, 0.999), "eps": 1e-8},
        "sgd": {"momentum": 0.9},
        "lars": {"momentum": 0.9, "trust": 0.001},
    }[options.name]
    assert {key: optimizer[key] for key in expected} == expected


def test_other_columns():
    assert resolved("ibot/swint14_300ep").backbone.keywords()["window_size"] == 14
    assert resolved("ibot/swint7_300ep").backbone.keywords()["window_size"] == 7
    assert (
        resolved("simpool/vits16_dino").pooling.keywords()["gamma"]
        == resolved("attmask/100pct_hint_simpool").pooling.keywords()["gamma"]
        == 1.25
    )
    for name in ("vits16_dino_nogamma", "resnet50_dino_nogamma", "convnext_small_dino_nogamma"):
        assert resolved(f"simpool/{name}").pooling.keywords()["gamma"] is None
    assert (
        resolved("simpool/resnet50_dino").pooling.keywords()["gamma"]
        == resolved("simpool/convnext_small_dino").pooling.keywords()["gamma"]
        == 2.0
    )
    resnets = {name: resolved(name) for name, row in PUBLISHED.items() if row.backbone == "resnet50"}
    assert {name for name, recipe in resnets.items() if recipe.head.norm == "batch"} == set(resnets) - {
        "dino/resnet50_100ep"
    }
    assert not any(recipe.backbone.keywords()["zero_init_last"] for recipe in resnets.values())
    released = {"dino/vits16_800ep", "dino/vits8_800ep", "dino/vitb16_400ep", "dino/vitb8_300ep", "dino/resnet50_800ep"}
    simpool = {name for name in PUBLISHED if name.startswith("simpool/")}
    full = {name for name in PUBLISHED if resolved(name).train.precision == "fp32"}
    assert full == released | simpool  # use_fp16 false
    assert resolved("ibot/swint14_300ep").pooling.norm == resolved("ibot/swint7_300ep").pooling.norm == "before"


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "pretrain/" not in name])
def test_header_has_the_published_numbers(name):
    """k-NN and linear accuracy in the header are the published ones."""
    import re

    from maskwise.recipe.reading import SHIPPED
    from maskwise.recipe.yaml_text import header

    numbers = {
        "attmask/100pct_hint": (72.8, 76.1),
        "attmask/100pct_high": (72.5, 75.7),
        "attmask/100pct_high_300ep": (75.0, 77.5),
        "attmask/100pct_block": (71.5, 74.4),
        "attmask/100pct_dino": (70.9, 74.6),
        "attmask/20pct_hint": (49.5, 57.5),
        "attmask/20pct_high": (49.7, 57.9),
        "attmask/20pct_block": (46.7, 56.4),
        "attmask/20pct_random": (47.8, 56.7),
        "attmask/20pct_random75": (47.3, 55.5),
        "attmask/20pct_random75_coin": (47.3, 55.5),
        "attmask/20pct_low": (44.0, 53.4),
        "attmask/20pct_dino_random": (43.4,),
        "attmask/20pct_dino_high": (43.5,),
        "attmask/20pct_dino_hint": (43.6,),
        "attmask/10pct_block": (31.9,),
        "attmask/10pct_high": (33.8,),
        "attmask/5pct_block": (15.7,),
        "attmask/5pct_high": (17.5,),
        "ibot/vits16_800ep": (75.2, 77.9),
        "ibot/swint14_300ep": (76.2, 79.3),
        "ibot/swint7_300ep": (75.3, 78.6),
        "dino/vits16_100ep": (69.3, 74.0),
        "dino/vits16_300ep": (73.3, 76.0),
        "simpool/vits16_dino_cls": (68.9, 71.5),
        "simpool/vits16_dino": (69.8, 72.8),
        "simpool/vits16_dino_nogamma": (69.8, 72.6),
        "simpool/vits16_dino_300ep": (72.6, 75.0),
        "simpool/vits16_dino_cls_300ep": (72.2, 74.3),
        "simpool/resnet50_dino": (63.8, 64.4),
        "simpool/convnext_small_dino": (68.8, 72.2),
        "mst/vits16_100ep": (72.1, 75.0),
        "dino/vits16_800ep": (74.5, 77.0),
        "dino/vits8_800ep": (78.3, 79.7),
        "dino/vitb16_400ep": (76.1, 78.2),
        "dino/vitb8_300ep": (77.4, 80.1),
        "dino/resnet50_800ep": (67.5, 75.3),
        "ibot/vitb16_400ep": (77.1, 79.5),
        "ibot/vitb16_rand_400ep": (77.3, 79.8),
        "ibot/vitl16_250ep": (78.0, 81.0),
        "simpool/resnet50_dino_gap": (61.8, 63.0),
        "simpool/resnet50_dino_nogamma": (63.7, 64.2),
        "simpool/convnext_small_dino_gap": (65.1, 68.2),
        "simpool/convnext_small_dino_nogamma": (68.8, 72.2),
    }
    published = header((SHIPPED / f"{name}.yaml").read_text()).published
    stated = tuple(float(number) for number in re.findall(r"(?:k-NN|linear) (\d+\.\d)", published))
    assert stated == numbers.get(name, ())
