"""Rows of MAP's tables that state costs: recipes, changes to them, and what the paper prints."""

from __future__ import annotations

from typing import NamedTuple

R50, CNX, VIT, PIT = "map/resnet50_100ep", "map/convnext_tiny_100ep", "map/vits16_100ep", "map/pits_100ep"
STEPS = ("_gap", "_token", "_intra", "")
WITH_CLASS_TOKEN = ("backbone.class_token=true", "pooling=cls")


class Row(NamedTuple):
    """A network: recipe, overrides; published images/s on one RTX 3090, parameters in M, multiply-adds in G, top-1."""

    label: str
    recipe: str
    overrides: tuple[str, ...] = ()
    published: tuple[float | None, float | None, float | None, float | None] = (None, None, None, None)


def sized(groups: int, tokens: int, *published: float) -> Row:
    """A row of table 6; one group of one token is the recipe without distillation."""
    label = f"{groups} x {tokens}"
    values = (published[0], None, *published[1:])
    if groups == tokens == 1:
        return Row(label, f"{R50}_token", (), values)
    return Row(label, R50, (f"classifier.groups={groups}", f"classifier.tokens={tokens}"), values)


def steps(label: str, recipe: str, *published: tuple[float, float, float]) -> list[Row]:
    """Rows of table 9: without a token, with one, with intra-group and with inter-group distillation."""
    names = ("GAP", "token", "+ intra", "+ inter")
    return [
        Row(f"{label}, {name}", recipe + end, (), (images, None, gigas, top1))
        for name, end, (gigas, images, top1) in zip(names, STEPS, published)
    ]


def other(label: str, name: str, *published: float) -> Row:
    """A network of table 3 without MAP."""
    return Row(label, f"{CNX}_gap", (f"backbone.name={name}", "backbone.drop_path=0"), published)


TABLES: dict[str, list[Row]] = {
    "map1": [
        Row("GAP", f"{R50}_gap", (), (None, 25.6, 4.1, 77.1)),
        Row("VGG", f"{R50}_vgg", (), (None, 235.3, 4.3, 76.3)),
        Row("DFT", f"{R50}_dft", (), (None, 92.7, 4.1, 77.6)),
        Row("CAP", f"{R50}_cap", (), (None, 59.1, 4.5, 78.5)),
        Row("MAP", R50, (), (None, 38.0, 4.5, 80.7)),
    ],
    "map3": [
        other("Swin-T", "swin_tiny_patch4_window7_224", 1676, 28.3, 4.4, 81.3),
        other("ConvNeXt-T", "convnext_tiny", 2040, 29.0, 4.5, 82.1),
        other("Swin-S", "swin_small_patch4_window7_224", 1017, 49.6, 8.5, 83.0),
        other("ConvNeXt-S", "convnext_small", 1257, 50.0, 8.7, 83.1),
        other("Swin-B", "swin_base_patch4_window7_224", 726, 87.7, 15.1, 83.5),
        Row("MAP-ResNet50", "map/resnet50_300ep", (), (2819, 38.0, 4.5, 81.8)),
        Row("MAP-ConvNeXt-T", "map/convnext_tiny_300ep", (), (1665, 47.8, 4.9, 83.3)),
        Row("MAP-ConvNeXt-S", "map/convnext_small_300ep", (), (1111, 82.8, 9.2, 84.1)),
        other("MaxViT-T", "maxvit_tiny_tf_224", 1009, 30.9, 5.4, 83.6),
        other("ConvNeXt-B", "convnext_base", 886, 89.0, 15.4, 83.8),
        other("MaxViT-S", "maxvit_small_tf_224", 654, 69.0, 11.7, 84.5),
        other("MaxViT-B", "maxvit_base_tf_224", 361, 120.0, 23.4, 85.0),
        Row("MAP-MaxViT-T", "map/maxvit_tiny_300ep", (), (907, 50.0, 5.8, 84.3)),
        Row("MAP-MaxViT-S", "map/maxvit_small_300ep", (), (613, 100.9, 11.8, 85.0)),
    ],
    "map6": [
        sized(1, 1, 3094, 4.6, 78.5),
        sized(1, 2, 3073, 4.6, 79.2),
        sized(1, 4, 3021, 4.7, 79.5),
        sized(1, 8, 2979, 4.8, 79.8),
        sized(2, 1, 2920, 4.5, 79.7),
        sized(2, 4, 2819, 4.5, 80.7),
        sized(4, 1, 2528, 4.7, 80.5),
        sized(4, 4, 2417, 4.8, 81.0),
        sized(16, 1, 1652, 5.0, 80.6),
    ],
    "map7d": [Row(label, R50 + end) for label, end in (("GAP", "_gap"), ("CAP", "_cap"), ("MAP", ""))],
    "map8": [
        Row("ViT-S", "map/vits16_300ep_gap", WITH_CLASS_TOKEN, (2611, 22.1, 4.3, 79.8)),
        Row("ViT-style MAP", "map/vits16_300ep_vitstyle", (), (2417, 27.8, 4.6, 79.1)),
        Row("MAP", "map/vits16_300ep", (), (2287, 36.9, 4.5, 81.8)),
        Row(
            "ViT-B",
            "map/vits16_300ep_gap",
            (*WITH_CLASS_TOKEN, "backbone.name=vit_base_patch16_224"),
            (1011, 86.6, 16.9, 81.8),
        ),
    ],
    "map9": [
        *steps("ResNet-50", R50, (4.1, 3334, 77.1), (4.4, 2951, 78.5), (4.5, 2835, 80.2), (4.5, 2819, 80.7)),
        *steps("ConvNeXt-T", CNX, (4.5, 2039, 80.4), (4.8, 1864, 81.3), (4.9, 1792, 82.2), (5.3, 1600, 82.6)),
        *steps("DeiT-S", VIT, (4.3, 2611, 75.8), (4.4, 2427, 77.4), (4.4, 2340, 78.0), (4.6, 2078, 79.7)),
        *steps("PiT-S", PIT, (2.4, 2710, 77.0), (2.5, 2534, 78.1), (2.6, 2440, 79.2), (2.8, 2151, 79.7)),
    ],
}
SIZES = {"map7d": (160, 192, 224, 256, 288)}  # ours: the figure's sizes are not stated; elsewhere 224
