"""The AttMask table: what hiding the most attended patches does, at equal steps and crops."""

from __future__ import annotations

from dataclasses import replace

from launch.reproduce.tables.plan import Contrast, Row, Setting, Story

SHAPES = "pretrain/quickstart_shapes"
CIFAR10 = "pretrain/cifar10_attmask"
ON_20PCT, ON_100PCT = "k-NN, ImageNet-20 %", "k-NN, ImageNet-1k"
DINO = ("method.name=dino", "masking.name=none")

ROWS = {
    "none": Row("no mask (DINO)", DINO),
    "random": Row("random", ("masking.name=random",), published={"knn": 47.8, "linear": 56.7}),
    "random75": Row(
        "random, 75 %",
        ("masking.name=random", "masking.ratio=0.75", "masking.var=0.0", "masking.prob=1.0"),
        published={"knn": 47.3, "linear": 55.5},
    ),
    "block": Row("block-wise", ("masking.name=block",), published={"knn": 46.7, "linear": 56.4}),
    "low": Row("AttMask-Low", ("masking.name=attmask_low",), published={"knn": 44.0, "linear": 53.4}),
    "high": Row("AttMask-High", ("masking.name=attmask_high",), published={"knn": 49.7, "linear": 57.9}),
    "hint": Row("AttMask-Hint", ("masking.name=attmask_hint",), published={"knn": 49.5, "linear": 57.5}),
}
CONTRASTS = (
    Contrast("high", "block", 1, 3.0, ON_20PCT),
    Contrast("hint", "block", 1, 2.8, ON_20PCT),
    Contrast("high", "random", 1, 1.9, ON_20PCT),
    Contrast("hint", "random", 1, 1.7, ON_20PCT),
    Contrast("high", "low", 1, 5.7, ON_20PCT),
    Contrast("low", "block", -1, -2.7, ON_20PCT),
    Contrast("random", "block", 1, 1.1, ON_20PCT),
    Contrast("random75", "random", -1, -0.5, ON_20PCT),
    Contrast("hint", "high", 0, -0.2, ON_20PCT),
    Contrast("block", "none", 1, 0.6, ON_100PCT),
)
OBJECTS = ("mask_quality", "localization")

SMALL = Setting(
    "`shapes`, masks follow SimPool's attention",
    SHAPES,
    ROWS,
    CONTRASTS,
    seeds=(0, 1, 2, 3, 4),
    measures=("knn", "linear", "few_shot", *OBJECTS),
)
SMALL_CLS = replace(
    SMALL,
    title="`shapes`, masks follow the class token's attention",
    words=("pooling.name=cls",),
    seeds=(0, 1, 2),
    gate="high",
)
CIFAR = Setting(
    "CIFAR-10 at 32 px, ViT with a convolutional stem, masks follow SimPool's attention",
    CIFAR10,
    ROWS,
    CONTRASTS,
    same_images=True,
    pack="cifar10-jpeg",
)
CIFAR_CLS = replace(
    CIFAR,
    title="CIFAR-10 at 32 px, ViT with a convolutional stem, masks follow the class token's attention",
    words=("pooling.name=cls",),
    gate="high",
)


def on_gpu(setting: Setting) -> Setting:
    """Return a setting for one GPU: the precision that it is fast in, and cores shared by runs side by side."""
    return replace(setting, words=(*setting.words, "train.precision=auto", "speed.workers=3"))


PAPER = {
    name: Row(ROWS[row].label, (), f"attmask/20pct_{recipe}", ROWS[row].published)
    for name, row, recipe in (
        ("none", "none", "dino"),
        ("random", "random", "random"),
        ("random75", "random75", "random75"),
        ("block", "block", "block"),
        ("low", "low", "low"),
        ("high", "high", "high"),
        ("hint", "hint", "hint"),
    )
}
PAPER_100 = {
    "none": Row("no mask (DINO)", (), "attmask/100pct_dino", {"knn": 70.9, "linear": 74.6}),
    "block": Row("block-wise", (), "attmask/100pct_block", {"knn": 71.5, "linear": 74.4}),
    "high": Row("AttMask-High", (), "attmask/100pct_high", {"knn": 72.5, "linear": 75.7}),
    "hint": Row("AttMask-Hint", (), "attmask/100pct_hint", {"knn": 72.8, "linear": 76.1}),
    "high_simpool": Row("AttMask-High by SimPool", (), "attmask/100pct_high_simpool"),
    "hint_simpool": Row("AttMask-Hint by SimPool", (), "attmask/100pct_hint_simpool"),
}
IMAGENET_20 = Setting(
    "20 % of ImageNet-1k, ViT-S/16, 100 epochs", "attmask/20pct_block", PAPER, CONTRASTS, same_images=True
)
IMAGENET = Setting(
    "ImageNet-1k, ViT-S/16, 100 epochs",
    "attmask/100pct_block",
    PAPER_100,
    (
        Contrast("block", "none", 1, 0.6, ON_100PCT),
        Contrast("high", "block", 1, 1.0, ON_100PCT),
        Contrast("hint", "block", 1, 1.3, ON_100PCT),
        Contrast("hint", "high", 0, 0.3, ON_100PCT),
        Contrast("high_simpool", "high", 0),
        Contrast("hint_simpool", "hint", 0),
    ),
    seeds=(0,),
    same_images=True,
)

STORY = Story(
    "Does hiding what the teacher attends to help?",
    {
        "cpu": {"shapes": SMALL, "cifar10": CIFAR, "shapes_cls": SMALL_CLS},
        "gpu": {
            "shapes": on_gpu(SMALL),
            "cifar10": on_gpu(CIFAR),
            "shapes_cls": on_gpu(SMALL_CLS),
            "cifar10_cls": on_gpu(CIFAR_CLS),
        },
        "full": {"imagenet20": IMAGENET_20, "imagenet": IMAGENET},
    },
)
