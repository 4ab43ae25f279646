"""Datasets with boxes or masks of objects, whichever layout a folder has."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from maskwise.data.benchmark_sets import coco, cub, imagenet_boxes, voc, wsol

COCO_20K = "coco_20k_filenames.txt"  # of the LOST and TokenCut toolkits: 19,817 images of train2014


def read(folder) -> dict:
    """Read the images with boxes that a folder holds -> {"test", ...}; {} for any other folder.

    Layouts: wsolevaluation lists (also {"fullsup"}), CUB (the official split's test images), ImageNet's CLS-LOC boxes,
    VOC (trainval), COCO (the 20,000 images of train2014 if their list `coco_20k_filenames.txt` is there). Raises
    UserError for incomplete datasets.
    """
    folder = Path(folder).expanduser()
    if wsol.matches(folder):
        return wsol.read(folder)
    if cub.matches(folder):
        return {"test": cub.read(folder, part="split")["test"]}
    if imagenet_boxes.matches(folder):
        return imagenet_boxes.read(folder)
    if voc.matches(folder):
        return voc.read(folder)
    if coco.matches(folder):
        names = next((path for path in (folder / COCO_20K, folder / "coco" / COCO_20K) if path.is_file()), None)
        return coco.read(folder, masks=True) if names is None else coco.read(folder, "train2014", names, masks=True)
    return {}


def has_boxes(dataset) -> bool:
    """Return whether the objects of a dataset have boxes."""
    return hasattr(dataset, "boxes") or hasattr(dataset, "box")


def boxes_of(dataset, index: int, *, hard: bool = True) -> Tensor:
    """Return the boxes of an image, float [n, 4] as x0, y0, x1, y1, maxima exclusive.

    hard=False leaves out truncated and difficult objects, where the dataset marks them.
    """
    if hasattr(dataset, "boxes"):
        boxes = dataset.boxes(index).float()
        if not hard and hasattr(dataset, "hard"):
            boxes = boxes[~dataset.hard(index)]
        inclusive = getattr(dataset, "inclusive", False)
    else:
        boxes, inclusive = dataset.box(index)[None].float(), True
    return boxes + torch.tensor([0.0, 0.0, 1.0, 1.0]) if inclusive else boxes


def object_mask(dataset, index: int, size: tuple[int, int]) -> Tensor:
    """Return the pixels of an image of size (height, width) that lie on an object, or in its box, bool [H, W]."""
    if hasattr(dataset, "mask"):
        return dataset.mask(index)
    mask = torch.zeros(size, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes_of(dataset, index).round().long().clamp(min=0).tolist():
        mask[y0:y1, x0:x1] = True
    return mask
