"""Held-out images: a part of a labeled training set for evaluations, chosen by the names of the images."""

import hashlib
import math

import numpy as np

from maskwise.data.datasets.labels import why_unlabeled
from maskwise.data.datasets.subset import Subset
from maskwise.errors import UserError

MOST = 5000  # images held out: more do not make a k-NN accuracy much more exact
PURPOSE = b"maskwise holdout"  # key of the hash
ROUNDING = 1e-9  # 0.29 * 100 is 28.999...


def split(dataset, share: float) -> tuple[Subset, Subset]:
    """Split a labeled set into training and held-out images. Raises UserError without labels or a held-out image.

    share: largest share of each class; in all at most MOST images. The same images in another place give the same
    split.
    """
    if dataset.labels is None:
        reason = why_unlabeled(dataset, "the training images")
        raise UserError(f"data.holdout: {reason}, or data.holdout=null")
    labels = np.asarray(dataset.labels)
    held = held_out_rows(sample_keys(dataset), labels, share)
    if not len(held):
        largest = np.unique(labels, return_counts=True)[1].max()
        raise UserError(
            f"data.holdout={share:g} holds out no image: the largest class has {largest}; give a larger share, or null"
        )
    rest = np.ones(len(labels), dtype=bool)
    rest[held] = False
    train, test = Subset(dataset, np.flatnonzero(rest)), Subset(dataset, held)
    train.notes = [
        *getattr(dataset, "notes", ()),
        f"{len(test)} of {len(dataset)} images are held out for evaluations (data.holdout={share:g})",
    ]
    return train, test


def held_out_rows(keys: list[str], labels: np.ndarray, share: float) -> np.ndarray:
    """Return the sorted rows of the held-out images, int64: of each class those with the smallest hashes of their keys.

    A class of n images gives floor(share * n), with the share lowered where all classes would give more than MOST.
    """
    hashes = np.fromiter(map(hash_of, keys), dtype=np.uint64, count=len(keys))
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.lexsort((hashes, classes))
    place = np.empty(len(keys), dtype=np.int64)  # of an image in its class
    place[order] = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
    share = min(share, MOST / max(1, len(keys)))
    quota = np.array([math.floor(share * count + ROUNDING) for count in counts], dtype=np.int64)
    return np.flatnonzero(place < quota[classes])


def hash_of(key: str) -> int:
    """Return 64 bits of a text."""
    data = key.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=PURPOSE).digest(), "little")


def sample_keys(dataset) -> list[str]:
    """Return the names of all images, without the place of the dataset."""
    place = str(getattr(dataset, "path", ""))
    return [dataset.name(index).removeprefix(place) for index in range(len(dataset))]
