"""Small labelled images and encoders for the tests of probes."""

import torch

from maskwise.data.decode import CorruptImage
from maskwise.nn import POOLINGS, Backbone, Encoder


class Colours:
    """Noisy images whose mean colour tells the class; easy, but not trivially so. Those in `broken` cannot be read."""

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
        return f"colours {self.n} {self.size} {self.seed} {self.broken}"


def tiny_encoder(pooling="cls", seed=0, depth=4, **options):
    torch.manual_seed(seed)
    backbone = Backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, embed_dim=24, depth=depth, num_heads=2, **options)
    encoder = Encoder(backbone, POOLINGS[pooling](24))
    encoder.crop_pct = 1.0
    return encoder


def sets(train=48, test=30, **options):
    return {"train": Colours(train, **options), "test": Colours(test, seed=1, **options)}
