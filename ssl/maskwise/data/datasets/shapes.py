"""Embedded dataset: a textured object on a textured background, with class, box and mask, generated without files.

Brightness, color, contrast and spectrum do not reveal the object. The background is a phase-randomized copy of a
texture of the same families, added to its mirror images: equal power at every scale, different structure. Both are
equally bright and saturated; the background has any hue, the object one near its class's, which neighboring classes
share. The object cannot be found by a patch's mean, variance or gradient: it has to be learned.
"""

from __future__ import annotations

import functools
import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from maskwise.bounds import Count
from maskwise.errors import UserError
from maskwise.functional import keyed_random

CLASSES = (
    "striped disc",
    "chequered square",
    "dotted triangle",
    "ringed ellipse",
    "bricked flower",
    "zigzag star",
    "crossed drop",
    "triangled peanut",
)
SPLITS = ("train", "test")
VERSION = 1  # part of the fingerprint; raise it with any change to the images

AREA = (0.15, 0.36)  # share of the image that the silhouette covers
PERIOD = (0.115, 0.15)  # of the texture, as a share of the image's side
CONTRAST = 30  # standard deviation of the texture, in gray levels
TINT = 30  # gray levels; the object's hue is near its class's, the background's is arbitrary

_SCALARS = 40  # uniforms per image, before those of the background's phases


class Shapes:
    """Generate `count` images of size x size pixels, each a pure function of (seed, split, index).

    `.labels` int64 [count], balanced; `.classes`; `.box(i)` int64 [4] = x0, y0, x1, y1, inclusive pixels; `.mask(i)`
    bool [H, W]. Raises UserError for a count, size or split out of range.
    """

    def __init__(self, count: Count = 8192, size: Count = 96, seed: int = 0, split: str = "train"):
        if count < 1 or size < 32:
            raise UserError(
                f"shapes: count = {count} and size = {size}, but at least 1 image of 32 pixels is needed; "
                "raise data.count or data.size"
            )
        if split not in SPLITS:
            raise UserError(f"shapes: no split {split!r}; write one of {', '.join(SPLITS)}")
        self.count, self.size = count, size
        self.seed, self.split = seed, split
        self.classes = list(CLASSES)
        # Every eight images hold each class once, in an order of their own: no stride through the set favors a class.
        groups = torch.arange(-(-count // len(CLASSES)))
        keys = keyed_random.make_key(keyed_random.SHAPES, seed, SPLITS.index(split), -1, groups)
        self.labels = keyed_random.uniform(keys, len(CLASSES)).argsort(dim=1).flatten()[:count]

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        """Return a readable name of image i."""
        return f"{self.split}/{i:06d} {CLASSES[self.labels[i]]}"

    def fingerprint(self) -> str:
        """Hash all settings of the images -> 16 hexadecimal digits."""
        text = f"shapes {VERSION} {self.count} {self.size} {self.seed} {self.split}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def contents(self) -> dict[str, str]:
        """Return a digest of all settings of the images."""
        return {"settings": self.fingerprint()}

    def image(self, i: int) -> Tensor:
        """Draw image i -> uint8 [3, size, size]."""
        u, noise = self._uniforms(i, self.size * (self.size // 2 + 1))
        kind = int(self.labels[i])
        cover, _ = _silhouette(self.size, kind, u[:8])
        period = self.size * (PERIOD[0] + (PERIOD[1] - PERIOD[0]) * u[8])
        target = _equalize(_texture(self.size, kind, period, u[10:20]), period)
        background = _randomize_phases(_texture(self.size, int(u[9] * len(CLASSES)), period, u[20:30]), period, noise)
        field = CONTRAST * (1 + 0.4 * (u[31] - 0.5)) * (background + cover * (target - background))
        hue, background_hue = (kind + 2 * (u[32] - 0.5)) / len(CLASSES), u[33]
        tint = _tint(background_hue)[:, None, None]
        tint = tint + cover * (_tint(hue) - _tint(background_hue))[:, None, None]
        pixels = 128 + 30 * (u[30] - 0.5) + field + tint
        return torch.from_numpy(np.clip(pixels, 0, 255).astype(np.uint8))

    def mask(self, i: int) -> Tensor:
        """Return the object mask of image i, bool [size, size]."""
        u, _ = self._uniforms(i, 0)
        return torch.from_numpy(_silhouette(self.size, int(self.labels[i]), u[:8])[1])

    def box(self, i: int) -> Tensor:
        """Return the object box of image i, int64 [4] = x0, y0, x1, y1, inclusive pixels."""
        rows, columns = self.mask(i).nonzero(as_tuple=True)
        return torch.stack([columns.min(), rows.min(), columns.max(), rows.max()])

    def _uniforms(self, i: int, noise: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= i < self.count:
            raise IndexError(i)
        key = keyed_random.make_key(keyed_random.SHAPES, self.seed, SPLITS.index(self.split), i)
        numbers = keyed_random.uniform(key, _SCALARS + noise).numpy()
        return numbers[:_SCALARS], numbers[_SCALARS:]


@functools.lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    line = np.arange(size, dtype=np.float32) + 0.5
    return np.meshgrid(line, line, indexing="xy")


@functools.lru_cache(maxsize=4)
def _window(size: int) -> np.ndarray:
    line = np.sin(np.pi * (np.arange(size, dtype=np.float32) + 0.5) / size) ** 2
    return np.outer(line, line)


def _radius(kind: int, angle: np.ndarray) -> np.ndarray:
    """Compute the outline of a silhouette in polar coordinates, up to scale."""

    def polygon(corners: int) -> np.ndarray:
        wedge = 2 * math.pi / corners
        return 1 / np.cos(np.mod(angle, wedge) - wedge / 2)

    if kind == 0:
        return np.ones_like(angle)
    if kind == 1:
        return polygon(4)
    if kind == 2:
        return polygon(3)
    if kind == 3:
        return 1 / np.sqrt(np.cos(angle) ** 2 + (1.8 * np.sin(angle)) ** 2)
    if kind == 4:
        return 1 + 0.22 * np.cos(5 * angle)
    if kind == 5:
        return 1 + 0.34 * np.cos(4 * angle)
    if kind == 6:
        return 1 + 0.3 * np.cos(angle) + 0.12 * np.cos(2 * angle)
    return 1 + 0.42 * np.cos(2 * angle)


_TURN = np.linspace(0, 2 * math.pi, 720, endpoint=False, dtype=np.float32)


@functools.lru_cache(maxsize=len(CLASSES))
def _outline(kind: int) -> tuple[np.ndarray, float]:
    radius = _radius(kind, _TURN)
    return radius, float((radius**2).mean() * math.pi)  # and the area inside


def _silhouette(size: int, kind: int, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw a rotated, scaled, off-center silhouette -> soft cover in [0, 1] and bool mask, [size, size]."""
    radius, area = _outline(kind)
    scale = size * math.sqrt((AREA[0] + (AREA[1] - AREA[0]) * u[0]) / area)
    turn = 2 * math.pi * u[1]
    x, y = scale * radius * np.cos(_TURN + turn), scale * radius * np.sin(_TURN + turn)
    place = []
    for low, high, side, far in ((x.min(), x.max(), u[2], u[3]), (y.min(), y.max(), u[4], u[5])):
        slack = (size - 2 - (high - low)) / 2
        offset = (1 if side < 0.5 else -1) * slack * (0.4 + 0.6 * far)
        place.append(size / 2 - (low + high) / 2 + offset)
    across, down = _grid(size)
    across, down = across - np.float32(place[0]), down - np.float32(place[1])
    inside = scale * _radius(kind, np.arctan2(down, across) - np.float32(turn)) - np.hypot(across, down)
    return np.clip(inside + 0.5, 0, 1), inside > 0


def _texture(size: int, family: int, period: float, u: np.ndarray) -> np.ndarray:
    """Draw a texture of one family, rotated, shifted and gently warped -> [size, size], mean 0."""
    across, down = _grid(size)
    turn = 2 * math.pi * u[0]
    cos, sin = np.float32(math.cos(turn) / period), np.float32(math.sin(turn) / period)
    bend = np.float32(2 * math.pi / size)
    x = (
        cos * across
        + sin * down
        + np.float32(u[1])
        + np.float32(0.25) * np.sin(bend * down * (1 + u[3]) + 6.28 * u[4], dtype=np.float32)
    )
    y = (
        cos * down
        - sin * across
        + np.float32(u[2])
        + np.float32(0.25) * np.sin(bend * across * (1 + u[5]) + 6.28 * u[6], dtype=np.float32)
    )
    field = np.tanh(3 * _pattern(family, x, y))
    return field - field.mean()


def _wave(x: np.ndarray) -> np.ndarray:
    return np.cos(np.float32(2 * math.pi) * x)


def _cell(x: np.ndarray) -> np.ndarray:
    return np.abs(x - np.round(x))  # distance to the nearest lattice line, in periods


def _pattern(family: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute a signed field of about unit amplitude and unit period; its sign is the texture."""
    if family == 0:
        return _wave(x)
    if family == 1:
        return 2 * _wave(x / 1.4) * _wave(y / 1.4)
    if family == 2:
        half, tall = x / 2, 0.866 * y
        return _wave(x) + _wave(half + tall) + _wave(half - tall)
    if family == 3:
        x, y = x / 1.4, y / 1.4
        return 12 * (0.11 - np.abs(np.hypot(_cell(x), _cell(y)) - 0.3))
    if family == 4:
        row = np.round(y / 0.9)
        return 8 * (0.12 - np.minimum(_cell(x / 1.8 + row / 2), 0.5 - _cell(y / 0.9)))
    if family == 5:
        return _wave(y + 1.2 * _cell(x / 1.6))
    if family == 6:
        x, y = _cell(x / 1.4), _cell(y / 1.4)
        return 8 * np.minimum(0.13 - np.minimum(x, y), 0.4 - np.maximum(x, y))
    return 4 * np.sin(math.pi * x) * np.sin(math.pi * (x / 2 + 0.866 * y)) * np.sin(math.pi * (x / 2 - 0.866 * y))


def _randomize_phases(field: np.ndarray, period: float, u: np.ndarray) -> np.ndarray:
    """Randomize the phases of a field plus its mirror images -> [size, size], mean 0, standard deviation 1."""
    size = len(field)
    field = field + field.T
    # Without the mirrors the background has a direction, an easier cue to the image than the object.
    field = field + field[::-1]
    amplitude = np.abs(np.fft.rfft2(field * _window(size)))
    amplitude[0, 0] = 0
    phase = np.float32(2 * math.pi) * u.astype(np.float32).reshape(amplitude.shape)
    field = np.fft.irfft2(amplitude * (np.cos(phase) + 1j * np.sin(phase)), s=(size, size)).astype(np.float32)
    return _equalize(field, period)


def _equalize(field: np.ndarray, period: float) -> np.ndarray:
    """Equalize the local contrast of a zero-mean field, in windows of one period -> standard deviation 1."""
    reach = max(1, round(0.5 * period))
    width = 2 * reach + 1
    total = np.pad(np.pad(field * field, reach, mode="reflect").cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    power = total[width:, width:] - total[:-width, width:] - total[width:, :-width] + total[:-width, :-width]
    field = field / np.sqrt(power / width**2 + np.float32(0.05) * field.var())
    return field / field.std()


def _tint(hue: float) -> np.ndarray:
    """Convert a hue in turns to a color offset, float32 [3] in gray levels with sum 0."""
    return (TINT * np.cos(2 * math.pi * (hue - np.arange(3) / 3))).astype(np.float32)
