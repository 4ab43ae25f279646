"""Miniature benchmark sets in their layout on disk, and a tiny encoder."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.nn import POOLINGS, Backbone, Encoder


def tiny_encoder(seed: int = 0, pooling: str = "cls", size: int = 32) -> Encoder:
    """Return an encoder of two blocks of width 48 on 8 x 8 patches."""
    with keyed_random.seed_scope(seed):
        backbone = Backbone("vit_tiny_patch16_224", image_size=size, patch_size=8, embed_dim=48, depth=2, num_heads=3)
        return Encoder(backbone, POOLINGS[pooling](48)).eval()


def photograph(path, seed: int, size=(32, 32), tint: int | None = None):
    """Write a random image; `tint` sets its dominant color."""
    g = np.random.default_rng(seed)
    pixels = g.integers(0, 80 if tint is not None else 256, (size[1], size[0], 3), dtype=np.uint8)
    if tint is not None:
        pixels[..., tint % 3] += 100 + 50 * (tint // 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    Image.fromarray(pixels).save(path, **options)


def class_folders(root, names, per_class: int, seed: int = 0, size=(32, 32), pattern="{:04d}.JPEG"):
    """Write one subfolder per class, each of one color."""
    for label, name in enumerate(names):
        for i in range(per_class):
            photograph(root / name / pattern.format(i), seed + 1000 * label + i, size, tint=label)
    return root


def revisited(root, queries: int = 3, database: int = 12, name: str = "roxford5k"):
    """Write jpg/ and gnd_<name>.pkl in the published format: a dict of lists, boxes and index arrays in NumPy."""
    place = root / name
    for i in range(database):
        photograph(place / "jpg" / f"db_{i}.jpg", i, (40 + i, 36), tint=i % queries)
    for i in range(queries):
        photograph(place / "jpg" / f"q_{i}.jpg", 100 + i, (60, 44), tint=i)
    truth = []
    for q in range(queries):
        mine = [i for i in range(database) if i % queries == q]
        truth.append(
            {
                "bbx": [4.0, 2.0, 50.5, 40.0],
                "easy": np.array(mine[:2]),
                "hard": np.array(mine[2:3]),
                "junk": np.array(mine[3:]),
            }
        )
    content = {
        "imlist": [f"db_{i}" for i in range(database)],
        "qimlist": [f"q_{i}" for i in range(queries)],
        "gnd": truth,
    }
    (place / f"gnd_{name}.pkl").write_bytes(pickle.dumps(content, protocol=2))
    return place


def labels_of(dataset) -> list:
    return torch.as_tensor(dataset.labels).tolist()


def refused(function, *parts, **options):
    """Check that a call is refused with one line that contains a text."""
    with pytest.raises(UserError) as caught:
        function(*parts[:-1], **options)
    assert "\n" not in str(caught.value) and parts[-1] in str(caught.value), caught.value
    return str(caught.value)
