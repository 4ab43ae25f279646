"""Write natural-looking JPEGs for timing decoders: `python -m maskwise.bench.baselines.natural_jpegs FOLDER`.

Each is 500 x 375 at quality 90 and 60-70 KB, the size of a typical ImageNet photograph: textures with a 1/f spectrum,
drifting hues, sharp-edged objects before a background, light from one side. Image k is a function of (seed, k).
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375
BYTES = (60_000, 70_000)


def texture(rng: np.random.Generator, slope: float, angle: float = 0.0, stretch: float = 1.0) -> np.ndarray:
    """A field [H, W] of unit variance whose amplitude falls as 1/f**slope, finer across `angle` than along it."""
    y, x = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    radius = np.sqrt((along * stretch) ** 2 + across**2)
    radius[0, 0] = np.inf
    field = np.fft.irfft2(np.exp(2j * np.pi * rng.random(radius.shape)) / radius**slope, s=(HEIGHT, WIDTH))
    return (field - field.mean()) / field.std()


def surface(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One material: its color without fine detail [H, W, 3] in 0..1, and its fine detail [H, W, 3]."""
    base, tint = rng.uniform(0.2, 0.8) + rng.normal(0, 0.09, 3), rng.normal(0, 0.04, 3)
    coarse = texture(rng, rng.uniform(1.4, 1.9))[..., None]
    drift = texture(rng, 1.9)[..., None]
    fine = texture(rng, rng.uniform(0.75, 1.1), rng.uniform(0, np.pi), rng.uniform(1, 2.5))[..., None]
    return base + 0.10 * coarse + tint * drift, fine * (1 + rng.normal(0, 0.12, 3))


def outline(rng: np.random.Generator) -> np.ndarray:
    """Coverage [H, W] in 0..1 of a blob with a wavy rim, sharp to about a pixel."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    cy, cx, size = rng.uniform(0, HEIGHT), rng.uniform(0, WIDTH), rng.uniform(30, 140)
    angle, flat = np.arctan2(y - cy, x - cx), rng.uniform(0.5, 1.0)
    rim = size * (1 + sum(rng.normal(0, 0.25 / k) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(2, 9)))
    distance = np.hypot((x - cx) * flat, (y - cy) / flat)
    return np.clip((rim - distance) / rng.uniform(1.0, 3.0) + 0.5, 0, 1)


def scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colors [H, W, 3] in 0..1 and fine detail [H, W, 3]: a background, four to nine objects, light from one side."""
    color, detail = surface(rng)
    for _ in range(rng.integers(4, 10)):
        cover = outline(rng)[..., None]
        own_color, own_detail = surface(rng)
        color, detail = color + cover * (own_color - color), detail + cover * (own_detail - detail)
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    a = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0.1, 0.4) * (x * np.cos(a) + y * np.sin(a))
    sharp = np.clip(0.65 + 0.45 * texture(rng, 2.0), 0.1, 1.3)
    return color * light[..., None], detail * (light * sharp)[..., None]


def jpeg(seed: int, number: int) -> bytes:
    """The file of image `number`; the strength of the fine detail is chosen so that the size is in range."""
    color, detail = scene(np.random.default_rng([seed, number]))
    low, high = 0.0, 0.5
    for _ in range(20):
        strength = (low + high) / 2
        pixels = np.clip((color + strength * detail) * 255, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        if BYTES[0] <= len(buffer.getvalue()) <= BYTES[1]:
            return buffer.getvalue()
        low, high = (strength, high) if len(buffer.getvalue()) < BYTES[0] else (low, strength)
    raise RuntimeError(f"image {number} of seed {seed} does not reach {BYTES} bytes")


def write(folder: Path, count: int, seed: int = 0) -> list[int]:
    """Write `count` images into two class folders, unless they exist; return their sizes in bytes."""
    sizes = []
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{seed}_{number:05d}.jpg"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(seed, number))
        sizes.append(path.stat().st_size)
    return sizes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sizes = np.array(write(given.folder, given.count, given.seed))
    quartiles = np.percentile(sizes, [25, 75])
    print(
        f"{len(sizes)} files in {given.folder}: {sizes.min()} to {sizes.max()} bytes, median {np.median(sizes):.0f}, "
        f"quartiles {quartiles}"
    )
