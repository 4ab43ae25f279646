"""Plain multi-crop on Pillow images, one view after another: the baseline of `maskwise bench data`.

Each view is cropped, resized, flipped, jittered, converted to gray, blurred, solarized, made a float tensor and
normalized in the worker, with the order, probabilities and ranges of DINO; the loader stacks float32 views. Random
numbers come from the global generators of Python and torch, as in DINO's code.
"""

import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler

from maskwise.imaging.resize import pair

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resized_crop(image: Image.Image, size: int | tuple[int, int], scale, ratio=(3 / 4, 4 / 3)) -> Image.Image:
    """A random box of the image at `size`, a side or (h, w), bicubic."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = random.randint(0, height - h), random.randint(0, width - w)
            break
    else:
        w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
        top, left = (height - h) // 2, (width - w) // 2
    return image.crop((left, top, left + w, top + h)).resize(pair(size)[::-1], Image.BICUBIC)


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Rotate the hue channel of the 8-bit HSV image."""
    hue, saturation, value = image.convert("HSV").split()
    moved = np.array(hue, dtype=np.uint8)
    moved += np.array(int(turns * 255) % 256, dtype=np.uint8)
    return Image.merge("HSV", (Image.fromarray(moved), saturation, value)).convert("RGB")


def jitter(image: Image.Image, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1) -> Image.Image:
    """Brightness, contrast, saturation and hue by random amounts, in random order."""
    for op in random.sample(range(4), 4):
        if op == 0:
            image = ImageEnhance.Brightness(image).enhance(random.uniform(1 - brightness, 1 + brightness))
        elif op == 1:
            image = ImageEnhance.Contrast(image).enhance(random.uniform(1 - contrast, 1 + contrast))
        elif op == 2:
            image = ImageEnhance.Color(image).enhance(random.uniform(1 - saturation, 1 + saturation))
        else:
            image = shift_hue(image, random.uniform(-hue, hue))
    return image


def to_float(image: Image.Image) -> torch.Tensor:
    """Normalized float32 [3, H, W]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return pixels.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def view(image: Image.Image, size: int | tuple[int, int], scale, blur: float, solarize: float = 0.0) -> torch.Tensor:
    """One view, from the whole image to the normalized tensor."""
    image = resized_crop(image, size, scale)
    if random.random() < 0.5:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    if random.random() < 0.8:
        image = jitter(image)
    if random.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if random.random() < blur:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
    if random.random() < solarize:
        image = ImageOps.solarize(image)
    return to_float(image)


class MultiCropFolder(Dataset):
    """All images below a folder as lists of 2 global and L local views; crops: recipe section `crops`."""

    def __init__(self, folder, crops):
        self.files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        self.crops = crops

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        """One image, decoded."""
        with open(self.files[index], "rb") as file:
            return Image.open(file).convert("RGB")

    def __getitem__(self, index: int) -> tuple[list[torch.Tensor], int]:
        image, crops = self.image(index), self.crops
        views = [
            view(image, crops.global_size, crops.global_scale, 1.0),
            view(image, crops.global_size, crops.global_scale, 0.1, 0.2),
        ]
        return views + [view(image, crops.local_size, crops.local_scale, 0.5) for _ in range(crops.local_number)], 0

    def geometry_only(self, index: int) -> list[Image.Image]:
        """Decode and crop only, without color and conversion to float."""
        image, crops = self.image(index), self.crops
        views = [resized_crop(image, crops.global_size, crops.global_scale) for _ in range(2)]
        return views + [resized_crop(image, crops.local_size, crops.local_scale) for _ in range(crops.local_number)]


class Endless(Sampler):
    """Endless random orders of the images, so that no measurement contains the end of an epoch."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self):
        while True:
            yield from torch.randperm(self.count).tolist()


def loader(folder, batch_size: int, workers: int, crops):
    """Endless batches with the default collation of float32 views, pinned if there is a GPU."""
    data = MultiCropFolder(folder, crops)
    return DataLoader(
        data,
        batch_size=batch_size,
        sampler=Endless(len(data)),
        num_workers=workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
    )
