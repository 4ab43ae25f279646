"""Miniature sets with label maps, and with instances in the layout of COCO."""

import json

import numpy as np
from PIL import Image


def colored_halves(root, count, split="", seed=0, labels=(0, 1, 2), size=(32, 48)):
    """Write images whose left and right halves have one of three colors, and their label maps."""
    g = np.random.default_rng(seed)
    for i in range(count):
        left, right = g.permutation(3)[:2]
        ids = np.full(size, labels[left], dtype=np.uint8)
        ids[:, size[1] // 2 :] = labels[right]
        pixels = g.integers(0, 60, (*size, 3)).astype(np.uint8)
        pixels[:, : size[1] // 2, left] += 180
        pixels[:, size[1] // 2 :, right] += 180
        for folder, content, name in (("images", pixels, f"{i}.png"), ("labels", ids, f"{i}.png")):
            path = root / folder / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(path)
    return root


def instances(root, part, images, names=("square", "bar")):
    """Write images, {file: (uint8 [H, W, 3], [(category id, polygon), ...])}, in COCO's layout."""
    table = {"images": [], "annotations": [], "categories": [{"id": 3 + 4 * i, "name": n} for i, n in enumerate(names)]}
    for number, (name, (pixels, objects)) in enumerate(images.items(), start=1):
        path = root / part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=95)
        table["images"].append(
            {"id": 10 * number, "file_name": name, "height": pixels.shape[0], "width": pixels.shape[1]}
        )
        for category, polygon in objects:
            points = np.array(polygon, dtype=float).reshape(-1, 2)
            low, high = points.min(axis=0), points.max(axis=0)
            table["annotations"].append(
                {
                    "id": len(table["annotations"]) + 1,
                    "image_id": 10 * number,
                    "category_id": category,
                    "segmentation": [points.flatten().tolist()],
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "area": float(np.prod(high - low)),
                    "iscrowd": 0,
                }
            )
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(table))
    return root


def squares(root, part, count, seed=0):
    """Dark images with a bright square each, and its outline."""
    g, images = np.random.default_rng(seed), {}
    for i in range(count):
        x, y, side = (int(v) for v in g.integers((4, 4, 40), (50, 50, 60)))
        pixels = g.integers(0, 40, (112, 112, 3)).astype(np.uint8)
        pixels[y : y + side, x : x + side] = 230
        outline = [x, y, x + side, y, x + side, y + side, x, y + side]
        images[f"{i:012d}.jpg"] = (pixels, [(3, outline)])
    return instances(root, part, images)
