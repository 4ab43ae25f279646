"""A torch dataset of noise, and crops of its images by torchvision, for tests of images given in Python."""

import numpy
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2


class Noise(Dataset):
    """Labeled noise of `side` pixels; image i is a function of (seed, i)."""

    classes = ["a", "b", "c"]

    def __init__(self, count, seed=0, side=24):
        self.seed, self.side = seed, side
        self.targets = [index % 3 for index in range(count)]

    def __len__(self):
        return len(self.targets)

    def array(self, index):
        """Pixels of an image, uint8 [side, side, 3]."""
        draws = numpy.random.default_rng([self.seed, index])
        return draws.integers(0, 256, (self.side, self.side, 3), dtype=numpy.uint8)

    def __getitem__(self, index):
        return Image.fromarray(self.array(index)), self.targets[index]


GLOBAL = v2.Compose([v2.RandomResizedCrop(16, scale=(0.4, 1)), v2.RandomHorizontalFlip()])
LOCAL = v2.RandomResizedCrop(8, scale=(0.1, 0.4))


def crops(image):
    """Return two global crops of 16 px and two local ones of 8 px."""
    return [GLOBAL(image), GLOBAL(image), LOCAL(image), LOCAL(image)]


def other_crops(image):
    """Return crops of the same sizes, unlike `crops`."""
    return crops(image.rotate(90))
