"""Small labeled images and encoders for the tests of probes."""

import unicodedata

import torch

from maskwise.data.decoding.image import CorruptImage
from maskwise.nn import POOLINGS, Backbone, Encoder


class Colors:
    """Noisy images whose classes differ by mean color; those in `broken` cannot be read."""

    def __init__(self, n, classes=3, size=16, seed=0, broken=()):
        self.n, self.size, self.seed, self.broken = n, size, seed, broken
        self.labels, self.classes = torch.arange(n) % classes, [f"c{i}" for i in range(classes)]
        self.reads = 0

    def __len__(self):
        return self.n

    def image(self, i):
        self.reads += 1
        if i in self.broken:
            raise CorruptImage(self.name(i), "cut short")
        g = torch.Generator().manual_seed(1000 * self.seed + i)
        noise = torch.rand(3, self.size + i % 3, self.size, generator=g) * 120
        noise[int(self.labels[i]) % 3] += 60
        return noise.to(torch.uint8)

    def name(self, i):
        return f"{i}.png"

    def fingerprint(self):
        return f"colors {self.n} {self.size} {self.seed} {self.broken}"


class Renamed:
    """Colored images whose classes have other numbers and, in Unicode, other spellings of their names."""

    def __init__(self, images, order):
        self.images, self.order = images, order
        self.classes = [unicodedata.normalize("NFD", images.classes[k]) for k in order]
        self.labels = torch.tensor([order.index(int(label)) for label in images.labels])

    def __len__(self):
        return len(self.images)

    def __getattr__(self, name):
        return getattr(self.images, name)


class Part(Renamed):
    """Colored images without those of the first class, the others numbered from 0."""

    def __init__(self, images):
        keep = [i for i, label in enumerate(images.labels) if label > 0]
        self.images, self.keep, self.classes = images, keep, images.classes[1:]
        self.labels = images.labels[keep] - 1

    def __len__(self):
        return len(self.keep)

    def image(self, i):
        return self.images.image(self.keep[i])

    def name(self, i):
        return self.images.name(self.keep[i])


def tiny_encoder(pooling="cls", seed=0, depth=4, **options):
    torch.manual_seed(seed)
    backbone = Backbone(
        "vit_tiny_patch16_224", image_size=16, patch_size=8, embed_dim=24, depth=depth, num_heads=2, **options
    )
    encoder = Encoder(backbone, POOLINGS[pooling](24))
    encoder.crop_pct = 1.0
    return encoder


def sets(train=48, test=30, **options):
    return {"train": Colors(train, **options), "test": Colors(test, seed=1, **options)}
