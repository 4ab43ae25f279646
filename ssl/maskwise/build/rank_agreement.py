"""Ranks of one run were started alike: same recipe, same images, same version; found before the first step."""

from __future__ import annotations

import socket

import numpy as np
import torch

from maskwise import __version__
from maskwise.build.running.continuing import PARTS, differing
from maskwise.data.datasets.contents import contents, numbers_digest
from maskwise.distributed.world import World
from maskwise.recipe.recipe import Recipe

LOCAL_KEYS = {"data.path", "data.test_path"}  # a machine may hold its copy elsewhere; the images are compared

SHOWN = 3  # differing keys in a line


def check_ranks(recipe: Recipe, data, test, world: World) -> None:
    """Raise the same UserError on all ranks if one of them was started with something else than rank 0.

    data, test: training images, and test images or None.
    """
    if world.size == 1:
        return
    first, *others = world.gather_objects(
        {
            "host": socket.gethostname(),
            "versions": (__version__, torch.__version__),
            "recipe": dict(recipe.values),
            "images": described(data),
            "test images": described(test),
        }
    )
    for rank, other in enumerate(others, start=1):
        if problem := difference(first, other):
            world.raise_together(f"rank {rank} on {other['host']} {problem}")


def difference(first: dict, other: dict) -> str:
    """Describe how a rank's start differs from that of rank 0; "" if they are alike."""
    if first["versions"] != other["versions"]:
        here, there = (" with torch ".join(start["versions"]) for start in (other, first))
        return f"runs maskwise {here}, rank 0 maskwise {there}: install the same on all machines"
    changes = [
        f"{key} {other['recipe'].get(key, 'not set')} instead of {first['recipe'].get(key, 'not set')}"
        for key in dict.fromkeys((*first["recipe"], *other["recipe"]))
        if first["recipe"].get(key) != other["recipe"].get(key)
        and key not in LOCAL_KEYS
        and (key == "speed.shard" or not key.startswith("speed."))
    ]
    other_count = first["images"]["count"] != other["images"]["count"]
    fits_other_images = other_count and not any(change.startswith("data.") for change in changes)
    if changes and not fits_other_images:  # a recipe fits its schedules to the number of images
        more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        text = ", ".join(changes[:SHOWN]) + more
        return f"was started with another recipe than rank 0 ({text}): start all ranks with the same command"
    for name in ("images", "test images"):
        if parts := differing(first[name], other[name]):
            counts = f"{other[name]['count']}, not {first[name]['count']}"
            what = counts if "count" in parts else PARTS.get(parts[0], parts[0])
            return f"has other {name} than rank 0 ({what}): data.path must hold the same files on all machines"
    return ""


def described(data) -> dict[str, int | str]:
    """Return the number of images and digests of their contents and labels; 0 images for None."""
    if data is None:
        return {"count": 0}
    labels = getattr(data, "labels", None)
    return {**contents(data), **({} if labels is None else {"labels": numbers_digest(np.asarray(labels).tolist())})}
