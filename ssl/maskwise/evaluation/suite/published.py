"""Published numbers of the recipes' papers, in per cent, ViT-S/16 unless noted."""

from __future__ import annotations

_IN9 = ("only_fg", "mixed_same", "mixed_rand", "mixed_next", "no_fg", "only_bg_b", "only_bg_t", "original")


def _in9(*values: float) -> dict[str, float]:
    table = {f"backgrounds.{name}": value for name, value in zip(_IN9, values)}
    return {**table, "backgrounds.bg_gap": round(table["backgrounds.mixed_same"] - table["backgrounds.mixed_rand"], 1)}


def _few_shot(*values: float) -> dict[str, float]:
    return {f"knn.pooled_few_shot_{count}": value for count, value in zip((1, 5, 10, 20), values)}


def _retrieval(oxford: tuple[float, float], paris: tuple[float, float]) -> dict[str, float]:
    sets = {"roxford5k": oxford, "rparis6k": paris}
    return {
        f"retrieval.{name}.papers_{level}_map": value
        for name, pair in sets.items()
        for level, value in zip(("medium", "hard"), pair)
    }


def _recall(cub: tuple, cars: tuple, products: tuple, inshop: tuple) -> dict[str, float]:
    sets = {
        "cub": ((1, 2, 4), cub),
        "cars": ((1, 2, 4), cars),
        "products": ((1, 10, 100), products),
        "inshop": ((1, 10, 20), inshop),
    }
    return {f"recall.{name}.recall_{k}": value for name, (ks, values) in sets.items() for k, value in zip(ks, values)}


def _boxes(cub: float, imagenet: float, dino_seg: tuple, lost: tuple) -> dict[str, float]:
    """Return tables 5 and 6 of SimPool: its DINO-seg is the LOST toolkit's, its COCO 20,000 images of train2014."""
    sets = ("VOC2007", "VOC2012", "coco")
    return {
        "localization.cub.max_box_acc_v2": cub,
        "localization.imagenet_boxes.max_box_acc_v2": imagenet,
        **{f"discovery.{name}.dino_seg_faithful": value for name, value in zip(sets, dino_seg)},
        **{f"discovery.{name}.lost": value for name, value in zip(sets, lost)},
    }


def _video(j: float, f: float, both: float) -> dict[str, float]:
    return {"video.davis.j_mean": j, "video.davis.f_mean": f, "video.davis.jf_mean": both}


def _segmentation(*values: float) -> dict[str, float]:
    return {f"linear_segmentation.ade.{name}": value for name, value in zip(("miou", "macc", "aacc"), values)}


# recipe -> "evaluation.number" (or "evaluation.set.number") -> per cent.
# IN-9 is by the frozen backbone and the ImageNet linear probe. SimPool's Recall@k is on halves of each set, not on the
# standard splits.
PUBLISHED: dict[str, dict[str, float]] = {
    "attmask/20pct_block": {
        "knn.top1": 46.7,
        "linear.top1": 56.4,
        **_in9(72.4, 74.3, 59.4, 56.8, 36.3, 14.4, 15.0, 89.1),
    },
    "attmask/20pct_random75": {
        "knn.top1": 47.3,
        "linear.top1": 55.5,
        **_in9(73.1, 73.8, 58.8, 55.9, 35.6, 13.7, 14.5, 87.9),
    },
    "attmask/20pct_random": {
        "knn.top1": 47.8,
        "linear.top1": 56.7,
        **_in9(72.8, 75.3, 60.4, 57.5, 34.9, 10.3, 14.4, 89.3),
    },
    "attmask/20pct_low": {
        "knn.top1": 44.0,
        "linear.top1": 53.4,
        **_in9(66.0, 71.1, 55.2, 52.2, 32.4, 12.5, 14.0, 86.6),
    },
    "attmask/20pct_hint": {
        "knn.top1": 49.5,
        "linear.top1": 57.5,
        **_in9(74.4, 75.9, 61.7, 58.3, 39.6, 16.7, 15.7, 89.6),
    },
    "attmask/20pct_high": {
        "knn.top1": 49.7,
        "linear.top1": 57.9,
        **_in9(75.2, 76.2, 62.3, 59.4, 40.6, 15.2, 15.3, 89.8),
    },
    "attmask/20pct_dino_random": {"knn.top1": 43.4},
    "attmask/20pct_dino_high": {"knn.top1": 43.5},
    "attmask/20pct_dino_hint": {"knn.top1": 43.6},
    "attmask/5pct_block": {"knn.top1": 15.7},
    "attmask/10pct_block": {"knn.top1": 31.9},
    "attmask/5pct_high": {"knn.top1": 17.5},
    "attmask/10pct_high": {"knn.top1": 33.8},
    "attmask/100pct_dino": {"knn.top1": 70.9, "linear.top1": 74.6},
    "attmask/100pct_block": {
        "knn.top1": 71.5,
        "linear.top1": 74.4,
        **_few_shot(32.9, 47.6, 52.5, 56.4),
        **_retrieval((31.0, 11.7), (56.2, 28.9)),
        **_video(59.5, 61.4, 60.5),
    },
    "attmask/100pct_high": {
        "knn.top1": 72.5,
        "linear.top1": 75.7,
        **_few_shot(37.1, 51.3, 55.7, 59.1),
        **_retrieval((33.5, 12.1), (59.0, 31.5)),
        **_video(60.6, 63.5, 62.1),
    },
    "attmask/100pct_hint": {"knn.top1": 72.8, "linear.top1": 76.1, **_few_shot(37.6, 52.2, 56.4, 59.6)},
    "attmask/100pct_high_300ep": {"knn.top1": 75.0, "linear.top1": 77.5, **_few_shot(40.4, 55.5, 59.9, 63.1)},
    "dino/vits16_100ep": {"knn.top1": 69.3, "linear.top1": 74.0},
    "dino/vits16_300ep": {"knn.top1": 73.3, "linear.top1": 76.0},
    "ibot/vits16_800ep": {"knn.top1": 75.2, "linear.top1": 77.9},
    "simpool/vits16_dino_cls": {
        "knn.pooled_top1_k10": 68.9,
        "linear.top1": 71.5,
        **_in9(87.3, 87.9, 78.5, 76.7, 47.9, 20.0, 16.9, 95.3),
        **_retrieval((29.4, 10.0), (54.6, 26.2)),
        **_recall((56.7, 69.4, 80.5), (37.5, 47.5, 58.4), (59.8, 74.4, 85.4), (40.4, 63.9, 70.3)),
        **_boxes(82.7, 62.0, (30.8, 31.0, 36.7), (55.5, 59.4, 46.6)),
        **_segmentation(26.4, 34.0, 71.6),
    },
    "simpool/vits16_dino": {
        "knn.pooled_top1_k10": 69.8,
        "linear.top1": 72.8,
        **_in9(87.3, 88.1, 80.6, 78.7, 48.2, 17.8, 16.7, 95.6),
        **_retrieval((32.1, 10.6), (56.5, 27.3)),
        **_recall((61.8, 74.4, 83.6), (37.6, 48.0, 58.4), (59.5, 73.9, 85.0), (41.1, 64.3, 70.8)),
        **_boxes(86.1, 66.1, (53.2, 56.2, 43.4), (59.8, 65.0, 49.4)),
        **_segmentation(27.9, 35.7, 72.6),
    },
    "supervised/vits16_cls": {
        "localization.cub.max_box_acc_v2": 63.1,
        "localization.imagenet_boxes.max_box_acc_v2": 53.6,
    },
    "supervised/vits16_simpool": {
        "localization.cub.max_box_acc_v2": 77.9,
        "localization.imagenet_boxes.max_box_acc_v2": 64.4,
    },
    "simpool/vits16_dino_cls_300ep": {"knn.pooled_top1_k10": 72.2, "linear.top1": 74.3},
    "simpool/vits16_dino_300ep": {"knn.pooled_top1_k10": 72.6, "linear.top1": 75.0},
}
PUBLISHED |= {
    "pretrain/attmask_hint_vits16": PUBLISHED["attmask/100pct_hint"],
    "pretrain/dino_vits16": PUBLISHED["dino/vits16_100ep"],
    "pretrain/ibot_vits16": PUBLISHED["ibot/vits16_800ep"],
}


def published(recipe: str | None, evaluation: str, data: str, number: str) -> float | None:
    """Return the published number of a recipe, None if there is none.

    A number of the data set of this name takes precedence over that of the evaluation on any data.
    """
    table = PUBLISHED.get(recipe or "", {})
    return table.get(f"{evaluation}.{data}.{number}", table.get(f"{evaluation}.{number}"))
