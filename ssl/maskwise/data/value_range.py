"""The values of a few images of a set, looked at before a run: black, white and cut ones are reported with a remedy."""

import math

import torch

from maskwise.data.decoding.image import CorruptImage

PROBED = 8  # images
OUTLIERS = 0.001  # share of the values of an image that may lie outside: hot pixels, burned-in text
DARK, WIDE_DARK, WHITE = 16 / 255, 0.25, 250 / 255  # as shares of the full range; the second for more than eight bits


def range_notes(dataset) -> list[str]:
    """Describe in one line that images come out nearly black, white or cut, and the remedy; [] where they do not.

    Datasets without `stored_range` are not looked at.
    """
    if not hasattr(dataset, "stored_range"):
        return []
    probed = count = min(PROBED, len(dataset))
    dark, white, stored = 0, 0, []
    for k in range(probed):
        index = k * len(dataset) // probed
        try:
            image = dataset.image(index)
        except CorruptImage:  # counted and listed in training
            count -= 1
            continue
        found = dataset.stored_range(index)
        stored += [found] if found else []
        values = image.float() / torch.iinfo(image.dtype).max
        dark += share(values > (WIDE_DARK if found else DARK)) <= OUTLIERS
        white += share(values < WHITE) <= OUTLIERS
    if count < 1:
        return []
    look = "nearly black" if dark == count else "nearly white" if white == count else ""
    if getattr(dataset, "value_range", None):
        given = list(dataset.value_range)
        return (
            [f"{count} of {count} images looked at are {look} with data.value_range={given}{actual(stored)}"]
            if look
            else []
        )
    fault = f"come out {look}" if look else cut(stored)
    if not fault:
        return []
    if not stored:
        return [
            f"{count} of {count} images looked at are {look}: "
            "are they masks, bytes of 0..1, or black under an alpha channel?"
        ]
    key = f"data.value_range={remedy(stored)}"
    return [f"{len(stored)} of {count} images looked at {fault}{actual(stored)}: {key} scales them"]


def share(selected: torch.Tensor) -> float:
    """Return the share of True."""
    return selected.float().mean().item()


def cut(stored: list[tuple[str, float, float]]) -> str:
    """Describe how stored values are cut or scaled unequally, "" where they are not."""
    if not stored:
        return ""
    floats = [high for kind, _, high in stored if kind == "float"]
    low, high, limit = *extremes(stored), 255 if floats else 65535
    if low < 0 or high > limit:
        return f"are cut to 0..{limit}"
    if floats and min(floats) <= 1 < max(floats):
        return "are scaled unequally: floats up to 1 are read as 0..1, others as 0..255"
    return ""


def extremes(stored: list[tuple[str, float, float]]) -> tuple[float, float]:
    """Return the lowest and the highest stored value."""
    return min(low for _, low, _ in stored), max(high for _, _, high in stored)


def actual(stored: list[tuple[str, float, float]]) -> str:
    """Describe the range of the stored values, "" without any."""
    if not stored:
        return ""
    low, high = extremes(stored)
    return f" (stored values from {low:.4g} to {high:.4g})"


def remedy(stored: list[tuple[str, float, float]]) -> str:
    """Return a range that holds the stored values, as a recipe states it: 4095 for twelve bits."""
    low, high = extremes(stored)
    low = math.floor(low) if low < 0 or low > high / 4 else 0
    whole = all(kind == "integer" for kind, _, _ in stored)
    if whole and low == 0 and high < 65536:
        return f"[0, {(1 << int(high).bit_length()) - 1}]"
    return f"[{low}, {max(math.ceil(high), low + 1)}]"
