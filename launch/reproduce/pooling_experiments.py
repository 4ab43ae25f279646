"""Experiments of the pooling table: what is trained, on which pack, with which overrides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# SimPool's exponent for convolutional networks; with CaiT's own 1e-5 short runs end at chance accuracy
OPTIONS = {"simpool": ("pooling.gamma=2.0",), "cait": ("pooling.layer_scale=0.1",)}
LANDSCAPE = {
    name: (f"pooling.name={name}", *OPTIONS.get(name, ()))
    for name in (
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
}
# the paper's figures are those of ResNet-18 on a fifth of ImageNet-1k, 100 epochs (SimPool, table 1)
PAPER = {
    "gap": 55.0,
    "max": 53.9,
    "gem": 55.9,
    "lse": 55.3,
    "how": 54.8,
    "otk": 55.9,
    "kmeans": 55.4,
    "slot": 56.7,
    "se": 55.7,
    "cbam": 55.6,
    "vit": 56.1,
    "cait": 56.7,
    "simpool": 57.1,
}
ONE = (
    "classifier.groups=1",
    "classifier.tokens=1",
    "classifier.average=null",
    "classifier.intra=0",
    "classifier.inter=0",
)
STEPS_OF_MAP = {
    "gap": ("classifier=linear",),
    "cap": (
        *ONE,
        "classifier.layers=[3]",
        "classifier.gram=false",
        "classifier.gram_width=null",
        "classifier.gram_groups=null",
        "classifier.dim=128",
        "classifier.embed=128",
        "classifier.heads=4",
    ),
    "token": ONE,
    "tokens": ("classifier.intra=0", "classifier.inter=0"),
    "intra": ("classifier.inter=0",),
    "inter": (),
}


@dataclass(frozen=True)
class Experiment:
    """Rows trained alike: recipe, data pack, overrides of all and of each row, the reported number, the network part
    whose weights are counted, and published values of the rows.
    """

    title: str
    recipe: str
    pack: str
    words: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    report: str = "top1"
    number: str = "top1"
    part: str = "pooling"
    paper: tuple[str, Mapping[str, float]] | None = ("ImageNet-20 %", PAPER)
    seeds: tuple[int, ...] = (0, 1, 2)


CIFAR = Experiment(
    "CIFAR-10 at 32 px, ResNet of 3 blocks",
    "pooling_table_supervised",
    "cifar10-jpeg-small",
    ("train.epochs=2",),
    LANDSCAPE,
)
IMAGENETTE = Experiment(
    "Imagenette at 64 px, ResNet of 3 blocks",
    "pooling_table_supervised",
    "imagenette224-core",
    (
        "train.epochs=4",
        "train.batch_size=32",
        "data.per_class=160",
        "data.side=72",
        "augment.size=64",
        "augment.scale=[0.35,1.0]",
        "backbone.output_stride=16",
        "evaluate.crop_pct=0.889",
    ),
    LANDSCAPE,
)
DINO = Experiment(
    "CIFAR-10 at 32 px, DINO, ViT of 3 blocks",
    "pooling_table_dino",
    "cifar10-jpeg-small",
    (),
    {name: (f"pooling.name={name}",) for name in ("cls", "gap", "simpool")},
    "knn",
    "pooled_top1_k20",
    paper=None,
)
MAP = Experiment(
    "CIFAR-10 at 32 px, ResNet of 3 blocks, MAP step by step",
    "pooling_table_map",
    "cifar10-jpeg-small",
    (),
    STEPS_OF_MAP,
    part="classifier",
    paper=("ImageNet, ResNet-50", {"gap": 77.1, "cap": 78.5, "token": 78.5, "intra": 80.2, "inter": 80.7}),
)
TINY = Experiment(
    "Tiny-ImageNet-100 at 64 px, ResNet-18",
    "pooling_table_supervised",
    "tinyimagenet100",
    (
        "train.epochs=40",
        "train.batch_size=256",
        "augment.size=64",
        "augment.scale=[0.25,1.0]",
        "augment.jitter=0.4",
        "augment.smoothing=0.1",
        "backbone.channels=[64,128,256,512]",
        "backbone.layers=[2,2,2,2]",
        "backbone.output_stride=8",
        "optimizer.lr=0.1",
        "optimizer.warmup_epochs=2",
        "train.precision=auto",
        "speed.workers=auto",
    ),
    LANDSCAPE,
)
PROFILES = {
    "cpu": {"cifar": CIFAR, "imagenette": IMAGENETTE, "dino": DINO},
    "map": {"steps": MAP},
    "gpu": {"tinyimagenet": TINY},
}
FEW = ("data.per_class=12", "train.steps=2", "train.batch_size=8", "optimizer.warmup_epochs=0")
SMALL = {
    "pooling_table_supervised": (*FEW, "backbone.channels=[8,8,8]", "speed.workers=0"),
    "pooling_table_map": (*FEW, "speed.workers=0"),
    "pooling_table_dino": (*FEW, "backbone.embed_dim=16", "backbone.depth=1", "head.prototypes=16"),
}
PARTS = {"pooling": "student.encoder.pooling.", "classifier": "student.head."}
