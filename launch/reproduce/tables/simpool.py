"""The SimPool table: average pooling, class token and SimPool on three kinds of networks, with DINO and supervised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from launch.reproduce.tables.attmask import CIFAR10, DINO, SHAPES, on_gpu
from launch.reproduce.tables.plan import Contrast, Row, Setting, Story

SUPERVISED = str(Path(__file__).with_name("shapes_supervised.yaml"))
RESNET = ("backbone=resnet18", "backbone.channels=[32,64,128]", "backbone.layers=[1,1,1]", "backbone.output_stride=8")
CONVNEXT = (
    "backbone=convnext_atto",
    "backbone.patch_size=4",
    "backbone.depths=[1,1,2,1]",
    "backbone.dims=[32,64,128,128]",
    "backbone.output_stride=8",
)
FOR_CNN, FOR_VIT = "pooling.gamma=2.0", "pooling.gamma=1.25"  # the paper's exponents


def rows(gamma: str, class_token: bool, *more: str) -> dict[str, Row]:
    """Return the poolings of a network; more: overrides of the section pooling, for all."""
    simpool = ("pooling.name=simpool",)
    made = {"gap": Row("GAP", ("pooling.name=gap", *more))}
    if class_token:
        made["cls"] = Row("class token", ("pooling.name=cls", *more))
    made["simpool"] = Row("SimPool", (*simpool, gamma, *more))
    made["simpool_nogamma"] = Row("SimPool without gamma", (*simpool, "pooling.gamma=null", *more))
    return made


KNN_100, TOP1_100 = "k-NN, ImageNet-1k", "top-1, ImageNet-1k"
WITHOUT_GAMMA = Contrast("simpool", "simpool_nogamma", 0)
VIT_DINO = (
    Contrast("simpool", "cls", 1, 0.9, f"{KNN_100}, ViT-S"),
    Contrast("simpool", "gap", 0),
    Contrast("simpool", "simpool_nogamma", 0, 0.0, f"{KNN_100}, ViT-S"),
)
RESNET_DINO = (Contrast("simpool", "gap", 1, 2.0, f"{KNN_100}, ResNet-50"), WITHOUT_GAMMA)
CONVNEXT_DINO = (Contrast("simpool", "gap", 1, 3.7, f"{KNN_100}, ConvNeXt-S"), WITHOUT_GAMMA)
VIT_LABELS = (
    Contrast("simpool_nogamma", "cls", 1, 1.6, f"{TOP1_100}, ViT-S"),
    Contrast("simpool_nogamma", "gap", 1, 1.0, f"{TOP1_100}, ViT-S"),
    Contrast("gap", "cls", 1, 0.6, f"{TOP1_100}, ViT-S"),
    WITHOUT_GAMMA,
)
RESNET_LABELS = (Contrast("simpool", "gap", 1, 0.6, f"{TOP1_100}, ResNet-50"), WITHOUT_GAMMA)
CONVNEXT_LABELS = (Contrast("simpool", "gap", 1, 0.6, f"{TOP1_100}, ConvNeXt-S"), WITHOUT_GAMMA)
OBJECTS = ("localization", "discovery")

DINO_VIT = Setting(
    "DINO, `shapes`, ViT", SHAPES, rows(FOR_VIT, True), VIT_DINO, words=DINO, measures=("knn", "linear", *OBJECTS)
)
DINO_RESNET = replace(
    DINO_VIT, title="DINO, `shapes`, ResNet", rows=rows(FOR_CNN, False), contrasts=RESNET_DINO, words=(*DINO, *RESNET)
)
DINO_CONVNEXT = replace(
    DINO_RESNET, title="DINO, `shapes`, ConvNeXt", contrasts=CONVNEXT_DINO, words=(*DINO, *CONVNEXT)
)
LABELS_VIT = Setting(
    "supervised, `shapes`, ViT",
    SUPERVISED,
    rows(FOR_VIT, True, "pooling.norm=before"),
    VIT_LABELS,
    metric="top1",
    measures=("top1", "knn", *OBJECTS),
    backbone_of=SHAPES,
)
LABELS_RESNET = replace(
    LABELS_VIT,
    title="supervised, `shapes`, ResNet",
    rows=rows(FOR_CNN, False),
    contrasts=RESNET_LABELS,
    words=RESNET,
    backbone_of=None,
)
LABELS_CONVNEXT = replace(
    LABELS_RESNET, title="supervised, `shapes`, ConvNeXt", contrasts=CONVNEXT_LABELS, words=CONVNEXT
)
CIFAR_VIT = Setting(
    "DINO, CIFAR-10 at 32 px, ViT with a convolutional stem",
    CIFAR10,
    rows(FOR_VIT, True),
    VIT_DINO,
    words=DINO,
    measures=("knn", "linear"),
    same_images=True,
    pack="cifar10-jpeg",
)
CIFAR_RESNET = replace(
    CIFAR_VIT,
    title="DINO with KoLeo, CIFAR-10 at 48 px, ResNet",
    recipe="pretrain/cifar10_dino",
    rows=rows(FOR_CNN, False),
    contrasts=RESNET_DINO,
    words=(),
)
SMALL = {
    "dino_vit": DINO_VIT,
    "dino_resnet": DINO_RESNET,
    "dino_convnext": DINO_CONVNEXT,
    "supervised_vit": LABELS_VIT,
    "supervised_resnet": LABELS_RESNET,
    "supervised_convnext": LABELS_CONVNEXT,
}

PAPER = {
    "dino_vit": Setting(
        "DINO, ImageNet-1k, ViT-S/16, 100 epochs",
        "simpool/vits16_dino_cls",
        {
            "gap": Row("GAP", ("pooling=gap",), "simpool/vits16_dino_cls"),
            "cls": Row("class token", (), "simpool/vits16_dino_cls", {"knn": 68.9, "linear": 71.5}),
            "simpool": Row("SimPool", (), "simpool/vits16_dino", {"knn": 69.7, "linear": 72.8}),
            "simpool_nogamma": Row(
                "SimPool without gamma", (), "simpool/vits16_dino_nogamma", {"knn": 69.8, "linear": 72.6}
            ),
        },
        VIT_DINO,
    ),
    "dino_resnet": Setting(
        "DINO, ImageNet-1k, ResNet-50, 100 epochs",
        "simpool/resnet50_dino_gap",
        {
            "gap": Row("GAP", (), "simpool/resnet50_dino_gap", {"knn": 61.8, "linear": 63.0}),
            "simpool": Row("SimPool", (), "simpool/resnet50_dino", {"knn": 63.8, "linear": 64.4}),
            "simpool_nogamma": Row("SimPool without gamma", (), "simpool/resnet50_dino_nogamma", {"knn": 63.7}),
        },
        RESNET_DINO,
    ),
    "dino_convnext": Setting(
        "DINO, ImageNet-1k, ConvNeXt-S, 100 epochs",
        "simpool/convnext_small_dino_gap",
        {
            "gap": Row("GAP", (), "simpool/convnext_small_dino_gap", {"knn": 65.1, "linear": 68.2}),
            "simpool": Row("SimPool", (), "simpool/convnext_small_dino", {"knn": 68.8, "linear": 72.2}),
            "simpool_nogamma": Row("SimPool without gamma", (), "simpool/convnext_small_dino_nogamma", {"knn": 68.8}),
        },
        CONVNEXT_DINO,
    ),
    "supervised_vit": Setting(
        "supervised, ImageNet-1k, ViT-S/16, 100 epochs",
        "supervised/vits16_cls",
        {
            "gap": Row("GAP", (), "supervised/vits16_gap", {"top1": 73.3}),
            "cls": Row("class token", (), "supervised/vits16_cls", {"top1": 72.7}),
            "simpool": Row("SimPool", (), "supervised/vits16_simpool", {"top1": 74.2}),
            "simpool_nogamma": Row("SimPool without gamma", (), "supervised/vits16_simpool_nogamma", {"top1": 74.3}),
        },
        VIT_LABELS,
        metric="top1",
    ),
    "supervised_resnet": Setting(
        "supervised, ImageNet-1k, ResNet-50, 100 epochs",
        "supervised/resnet50_gap",
        {
            "gap": Row("GAP", (), "supervised/resnet50_gap", {"top1": 77.4}),
            "simpool": Row("SimPool", (), "supervised/resnet50_simpool", {"top1": 78.0}),
            "simpool_nogamma": Row("SimPool without gamma", ("pooling.gamma=null",), "supervised/resnet50_simpool"),
        },
        RESNET_LABELS,
        metric="top1",
    ),
    "supervised_convnext": Setting(
        "supervised, ImageNet-1k, ConvNeXt-S, 100 epochs",
        "supervised/convnext_gap",
        {
            "gap": Row("GAP", (), "supervised/convnext_gap", {"top1": 81.1}),
            "simpool": Row("SimPool", (), "supervised/convnext_simpool", {"top1": 81.7}),
            "simpool_nogamma": Row("SimPool without gamma", ("pooling.gamma=null",), "supervised/convnext_simpool"),
        },
        CONVNEXT_LABELS,
        metric="top1",
    ),
}
ON_LABELS, ON_DINO = ("top1", *OBJECTS), ("knn", "linear", *OBJECTS)
FULL = {
    name: replace(
        setting, seeds=(0,), same_images=True, measures=ON_LABELS if name.startswith("supervised") else ON_DINO
    )
    for name, setting in PAPER.items()
}

STORY = Story(
    "Average pooling, class token or SimPool?",
    {
        "cpu": SMALL,
        "gpu": {
            **{name: on_gpu(setting) for name, setting in SMALL.items()},
            "cifar10_vit": on_gpu(CIFAR_VIT),
            "cifar10_resnet": on_gpu(CIFAR_RESNET),
        },
        "full": FULL,
    },
)
