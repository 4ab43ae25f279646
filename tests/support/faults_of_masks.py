"""Faults of evaluations that predict masks: video, segmentation, detection."""

from support.mutant import Mutant

METRICS = "tests/functional/test_metrics.py"
VIDEO = "tests/evaluation/test_video.py"

DETECTION = "tests/evaluation/dense/test_detection.py"
SEGMENTATION = "tests/evaluation/dense/test_segmentation.py"

FAULTS = {
    "mirrored boxes keep their sides": Mutant(
        "evaluation/dense/detection.py",
        {
            'width - target["boxes"][:, 2], width - target["boxes"][:, 0]': (
                'width - target["boxes"][:, 0], width - target["boxes"][:, 2]'
            )
        },
        f"{DETECTION} -k mirrored",
    ),
    "results with corners instead of width and height": Mutant(
        "evaluation/dense/detection.py", {"[x0, y0, x1 - x0, y1 - y0]": "[x0, y0, x1, y1]"}, f"{DETECTION} -k ranks"
    ),
    "category ids not mapped back": Mutant(
        "evaluation/dense/detection.py", {"categories[int(label) - 1]": "int(label)"}, f"{DETECTION} -k ranks"
    ),
    "windows at the end cut off": Mutant(
        "evaluation/dense/patch_maps.py",
        {"max(0, min(i * stride, length - window))": "i * stride"},
        f"{SEGMENTATION} -k window_starts",
    ),
    "overlapping windows summed": Mutant(
        "evaluation/dense/patch_maps.py", {"return total / count": "return total"}, f"{SEGMENTATION} -k overlaps"
    ),
    "loss averaged over labeled pixels": Mutant(
        "evaluation/dense/linear_segmentation.py",
        {'reduction="sum") / pixels': 'reduction="sum") / (labels != IGNORED).sum()'},
        f"{SEGMENTATION} -k mean_over_all",
    ),
    "patch map transposed": Mutant(
        "evaluation/dense/patch_maps.py",
        {
            "maps = [stage[:, prefix:].float().transpose(1, 2).unflatten(2, features.grid)": (
                "maps = [stage[:, prefix:].float().transpose(1, 2).unflatten(2, features.grid[::-1]).transpose(2, 3)"
            )
        },
        f"{SEGMENTATION} -k row_major",
    ),
    "clusters without a class not counted": Mutant(
        "evaluation/dense/unsupervised_segmentation.py",
        {"    table[:, -1] = counts.sum(dim=1) - table.sum(dim=1)\n": ""},
        f"{SEGMENTATION} -k matched",
    ),
    "labels flipped without the image": Mutant(
        "data/augmentation/segmentation_crop.py",
        {"image, labels = image.flip(-1), labels.flip(-1)": "labels = labels.flip(-1)"},
        "tests/data/augmentation/test_segmentation_crop.py -k follow",
    ),
    "contours compared by a square": Mutant(
        "functional/metrics.py", {"math.isqrt(radius**2 - dy**2)": "radius"}, f"{METRICS} -k dilation"
    ),
    "boundary without the diagonal neighbor": Mutant(
        "functional/metrics.py",
        {"    boundary[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]\n": ""},
        f"{METRICS} -k boundary",
    ),
    "accuracy of absent classes counts as zero": Mutant(
        "functional/metrics.py",
        {"float(accuracy.nanmean())": "float(accuracy.nan_to_num().mean())"},
        f"{METRICS} -k segmentation_scores",
    ),
    "votes chosen for each frame": Mutant(
        "evaluation/video.py",
        {
            "        least = votes.topk(min(topk, votes.shape[1]), dim=1).values[:, -1:]\n": (
                "        frames = votes.unflatten(1, (len(context), -1))\n"
                "        least = frames.topk(min(topk, frames.shape[2]), dim=2).values[:, :, -1:]\n"
                "        least = least.expand_as(frames).flatten(1)\n"
            )
        },
        f"{VIDEO} -k compete",
    ),
    "round window of patches": Mutant(
        "evaluation/video.py",
        {
            "((y[rows, None] - y).abs() <= radius) & ((x[rows, None] - x).abs() <= radius)": (
                "(y[rows, None] - y) ** 2 + (x[rows, None] - x) ** 2 <= radius**2"
            )
        },
        f"{VIDEO} -k loops",
    ),
    "first and last frame scored": Mutant(
        "evaluation/video.py", {"range(1, len(truth) - 1)": "range(len(truth))"}, f"{VIDEO} -k first_and_last"
    ),
    "means over videos": Mutant(
        "evaluation/video.py",
        {
            "float(np.mean([row[name] for row in scores.values()]))": (
                "float(np.mean([np.mean([row[name] for key, row in scores.items() if key[:-2] == video])"
                " for video in {key[:-2] for key in scores}]))"
            )
        },
        f"{VIDEO} -k means_are",
    ),
    "labels not scaled before the largest is taken": Mutant(
        "evaluation/video.py",
        {"((large - low) / torch.where(high > low, high - low, 1)).argmax(dim=0)": "large.argmax(dim=0)"},
        f"{VIDEO} -k each_label",
    ),
    "hard labels vote": Mutant(
        "evaluation/video.py",
        {"queue.append((patches, soft))": "queue.append((patches, (soft == soft.amax(dim=0)).to(soft)))"},
        f"{VIDEO} -k soft",
    ),
}
