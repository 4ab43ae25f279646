"""Settings that `maskwise train --data` chooses, by device, size of the images and network, with what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MANY = 100_000  # images from which a GPU trains a Vision Transformer with the published settings


@dataclass(frozen=True)
class Measured:
    """k-NN accuracy (k = 20) of a committed run in per cent, beside its baselines; None: not yet measured.

    result: file in docs/results; data: the images, in words; epochs: of the run.
    """

    result: str
    data: str
    images: int
    epochs: int
    knn: float
    untrained: float
    raw_pixels: float
    whitened_pixels: float | None = None


@dataclass(frozen=True)
class Regime:
    """Recipe keys for one device, size and network.

    views: images seen in a run, which give its epochs, between the two numbers of `epochs`; batch_size: the largest;
    reasons: section -> why its values. Keys that are absent follow from the number of images (`suggest_recipe`).
    """

    title: str
    keys: Mapping[str, Any]
    views: int
    epochs: tuple[int, int]
    batch_size: int
    reasons: Mapping[str, str] = field(default_factory=dict)
    measured: Measured | None = None


# blur leaves too little detail in crops below 64 pixels
FEW_PIXELS = {"crops.blur_prob": [0.0, 0.0, 0.0], "crops.solarize_prob": 0.0}

# DINO with KoLeo on half of ResNet-18's widths: Sinkhorn with fewer prototypes than global crops in a batch
NARROW_RESNET = {
    "crops.local_number": 2,
    "crops.global_scale": [0.25, 1.0],
    "crops.local_scale": [0.1, 0.4],
    "crops.jitter": [0.4, 0.4, 0.4, 0.1],
    "backbone.name": "resnet18",
    "backbone.drop_path": 0.0,
    "backbone.channels": [32, 64, 128, 256],
    "pooling": "gap",
    "head.prototypes": 128,
    "head.hidden": 256,
    "head.bottleneck": 128,
    "head.norm": "batch",
    "head.norm_last_layer": True,
    "method.name": "dino",
    "method.targets": "sinkhorn",
    "method.koleo": 0.25,
    "teacher.momentum": 0.99,
    "teacher.momentum_end": 0.99,
    "teacher.temp": 0.02,
    "teacher.warmup_temp": 0.02,
    "teacher.warmup_temp_epochs": 0,
    "optimizer.lr": 4e-3,
    "optimizer.weight_decay": 0.04,
    "optimizer.weight_decay_end": 0.04,
    "optimizer.freeze_last_layer": 0,
}
FEW_IMAGES = "on a CPU and on few images a narrow ResNet learns faster than a Vision Transformer"

# DINO on ResNet-18 with lightly's settings for CIFAR-10
RESNET = {
    "crops.global_scale": [0.4, 1.0],
    "crops.jitter": [0.4, 0.4, 0.4, 0.1],
    "backbone.name": "resnet18",
    "backbone.drop_path": 0.0,
    "pooling": "gap",
    "head.prototypes": 2048,
    "head.hidden": 2048,
    "head.bottleneck": 256,
    "head.norm": "batch",
    "head.norm_last_layer": True,
    "method.name": "dino",
    "teacher.momentum": 0.99,
    "teacher.momentum_end": 0.99,
    "teacher.temp": 0.04,
    "teacher.warmup_temp": 0.04,
    "teacher.warmup_temp_epochs": 0,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.12,
    "optimizer.warmup_epochs": 0,
    "optimizer.clip": None,
    "optimizer.weight_decay": 5e-4,
    "optimizer.weight_decay_end": 5e-4,
    "optimizer.freeze_last_layer": 1,
}
LIGHTLY = "as lightly trains DINO on ResNet-18: SGD at .06 for 128 images, constant momentum"

# iBOT with AttMask-High on a small ViT
SMALL_VIT = {
    "crops.local_number": 4,
    "crops.global_scale": [0.4, 1.0],
    "crops.local_scale": [0.15, 0.5],
    "backbone.name": "vit_tiny_patch16_224",
    "backbone.drop_path": 0.0,
    "pooling": "simpool",
    "head.bottleneck": 128,
    "head.norm_last_layer": True,
    "method.name": "ibot",
    "masking.name": "attmask_high",
    "teacher.temp": 0.04,
    "teacher.warmup_temp": 0.04,
    "teacher.warmup_temp_epochs": 0,
    "teacher.patch_temp": 0.04,
    "teacher.warmup_patch_temp": 0.04,
    "optimizer.freeze_last_layer": 0,
}
ATTENTION = "gives usable attention within minutes, where a class token needs long runs"
MASKED = "a Vision Transformer, whose patches AttMask hides"

# iBOT with AttMask-Hint on ViT-S: the published settings
VIT_SMALL = {
    "backbone.name": "vit_small_patch16_224",
    "backbone.drop_path": 0.1,
    "pooling": "cls",
    "head.hidden": 2048,
    "head.bottleneck": 256,
    "method.name": "ibot",
    "optimizer.lr": 5e-4,
}

REGIMES = {
    # a CPU
    "resnet cpu below 64": Regime(
        title="DINO on a narrow ResNet-18, 48-px crops",
        keys={
            **NARROW_RESNET,
            **FEW_PIXELS,
            "crops.global_size": 48,
            "crops.local_size": 24,
            "backbone.output_stride": 16,
        },
        views=400_000,
        epochs=(5, 200),
        batch_size=128,
        reasons={"backbone": FEW_IMAGES, "crops": "enlarged, for 12 x 12 positions after the stem"},
        measured=Measured(
            "own_folder_2026-11-30.json",
            "CIFAR-10",
            10_000,
            40,
            knn=49.4,
            untrained=30.0,
            raw_pixels=39.2,
            whitened_pixels=45.8,
        ),
    ),
    "resnet cpu below 96": Regime(
        title="DINO on a narrow ResNet-18, 64-px crops",
        keys={**NARROW_RESNET, "crops.global_size": 64, "crops.local_size": 32, "backbone.output_stride": 16},
        views=200_000,
        epochs=(5, 200),
        batch_size=128,
        reasons={"backbone": FEW_IMAGES, "crops": "no larger than the images"},
    ),
    "resnet cpu from 96": Regime(
        title="DINO on a narrow ResNet-18, 96-px crops",
        keys={**NARROW_RESNET, "crops.global_size": 96, "crops.local_size": 48},
        views=60_000,
        epochs=(5, 200),
        batch_size=128,
        reasons={"backbone": FEW_IMAGES, "crops": "few and small: cost grows with the area; 224 for final runs"},
    ),
    # few images on a GPU
    "resnet gpu below 64": Regime(
        title="DINO on ResNet-18, 32-px crops",
        keys={
            **RESNET,
            **FEW_PIXELS,
            "crops.global_size": 32,
            "crops.local_size": 16,
            "crops.local_number": 0,
            "backbone.small_stem": True,
        },
        views=10_000_000,
        epochs=(100, 800),
        batch_size=128,
        reasons={"backbone": "few images: a ResNet learns more from them", "optimizer": LIGHTLY},
    ),
    "resnet gpu below 96": Regime(
        title="DINO on ResNet-18, 64-px crops",
        keys={**RESNET, "crops.global_size": 64, "crops.local_size": 32, "crops.local_number": 4},
        views=10_000_000,
        epochs=(100, 800),
        batch_size=128,
        reasons={"backbone": "few images: a ResNet learns more from them", "optimizer": LIGHTLY},
    ),
    "resnet gpu from 96": Regime(
        title="DINO on ResNet-18, 128-px crops",
        keys={
            **RESNET,
            "crops.global_size": 128,
            "crops.local_size": 64,
            "crops.local_number": 6,
            "crops.global_scale": [0.14, 1.0],
            "crops.local_scale": [0.05, 0.14],
        },
        views=10_000_000,
        epochs=(100, 800),
        batch_size=256,
        reasons={"backbone": "few images: a ResNet learns more from them", "optimizer": LIGHTLY},
    ),
    # many images on a GPU
    "vit gpu below 64": Regime(
        title="iBOT with AttMask-Hint on ViT-S/8",
        keys={
            **VIT_SMALL,
            "crops.global_size": 64,
            "crops.local_size": 32,
            "crops.local_number": 6,
            "crops.global_scale": [0.4, 1.0],
            "crops.local_scale": [0.15, 0.5],
            "backbone.patch_size": 8,
        },
        views=10_000_000,
        epochs=(100, 800),
        batch_size=256,
        reasons={
            "backbone": "21 million weights, which one GPU trains",
            "crops": "the images are small",
            "pooling": "for long runs; simpool gives sharper attention",
        },
    ),
    "vit gpu from 64": Regime(
        title="iBOT with AttMask-Hint on ViT-S/16",
        keys={
            **VIT_SMALL,
            "crops.global_size": 224,
            "crops.local_size": 96,
            "crops.local_number": 6,
            "crops.global_scale": [0.25, 1.0],
            "crops.local_scale": [0.05, 0.25],
        },
        views=10_000_000,
        epochs=(100, 800),
        batch_size=256,
        reasons={
            "backbone": "21 million weights, which one GPU trains",
            "crops": "as published; AttMask trains with six local crops on 20 % of ImageNet",
            "pooling": "for long runs; simpool gives sharper attention",
        },
    ),
    # --masked on a CPU
    "vit cpu below 64": Regime(
        title="iBOT with AttMask-High on a small ViT, 32-px crops",
        keys={
            **SMALL_VIT,
            **FEW_PIXELS,
            "crops.global_size": 32,
            "crops.local_size": 16,
            "backbone.patch_size": 8,
            "backbone.embed_dim": 128,
            "backbone.num_heads": 4,
            "backbone.depth": 4,
            "head.prototypes": 256,
            "head.hidden": 256,
            "optimizer.lr": 4e-3,
        },
        views=200_000,
        epochs=(5, 200),
        batch_size=64,
        reasons={"backbone": MASKED, "crops": "no larger than the images, and few patches", "pooling": ATTENTION},
    ),
    "vit cpu below 96": Regime(
        title="iBOT with AttMask-High on a small ViT, 64-px crops",
        keys={
            **SMALL_VIT,
            "crops.global_size": 64,
            "crops.local_size": 32,
            "backbone.patch_size": 8,
            "backbone.depth": 6,
            "head.prototypes": 1024,
            "head.hidden": 512,
            "optimizer.lr": 2e-3,
        },
        views=60_000,
        epochs=(5, 200),
        batch_size=32,
        reasons={"backbone": MASKED, "crops": "no larger than the images, and few patches", "pooling": ATTENTION},
    ),
    "vit cpu from 96": Regime(
        title="iBOT with AttMask-High on a small ViT, 112-px crops",
        keys={
            **SMALL_VIT,
            "crops.global_size": 112,
            "crops.local_size": 48,
            "crops.global_scale": [0.25, 1.0],
            "crops.local_scale": [0.05, 0.25],
            "backbone.patch_size": 16,
            "backbone.depth": 6,
            "head.prototypes": 1024,
            "head.hidden": 512,
            "optimizer.lr": 2e-3,
        },
        views=60_000,
        epochs=(5, 200),
        batch_size=32,
        reasons={"backbone": MASKED, "crops": "cost grows with the area; 224 for final runs", "pooling": ATTENTION},
    ),
}


def regime_of(device: str, side: int, count: int, *, masked: bool = False) -> str:
    """Return the name of the regime for `count` images of a short side of `side` pixels.

    device: type of the device; masked: a Vision Transformer trained with AttMask in any case.
    """
    gpu = device == "cuda"
    network = "vit" if masked or (gpu and count >= MANY) else "resnet"
    if network == "vit" and gpu:
        return "vit gpu below 64" if side < 64 else "vit gpu from 64"
    size = "below 64" if side < 64 else "below 96" if side < 96 else "from 96"
    return f"{network} {'gpu' if gpu else 'cpu'} {size}"
