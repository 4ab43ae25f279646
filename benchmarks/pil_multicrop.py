"""The 2021 way to make twelve views of an image, as a plain baseline: everything on Pillow images, one view after another.

Each view is cut, resized, flipped, jittered, greyed, blurred, solarised, turned into a float tensor and normalised in the
worker; the loader stacks the views and hands over float32 (attmask.md 3 gives order, probabilities and ranges). It draws from
Python's and torch's global generators, as that code did. `maskwise bench data` times it beside the package's loader.
"""

import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resized_crop(image: Image.Image, size: int, scale, ratio=(3 / 4, 4 / 3)) -> Image.Image:
    """A random box of the image at `size` x `size`, bicubic."""
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
    return image.crop((left, top, left + w, top + h)).resize((size, size), Image.BICUBIC)


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
    """Normalised float32 [3, H, W]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return pixels.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def view(image: Image.Image, size: int, scale, blur: float, solarize: float = 0.0) -> torch.Tensor:
    """One view, from the whole image to the normalised tensor."""
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
    """All JPEGs below a folder as lists of 2 global and `locals_` local views."""

    def __init__(self, folder, locals_: int = 10, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25)):
        self.files = sorted(Path(folder).rglob("*.jpg"))
        self.locals_, self.global_scale, self.local_scale = locals_, global_scale, local_scale

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[list[torch.Tensor], int]:
        with open(self.files[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        views = [view(image, 224, self.global_scale, 1.0), view(image, 224, self.global_scale, 0.1, 0.2)]
        return views + [view(image, 96, self.local_scale, 0.5) for _ in range(self.locals_)], 0


def loader(folder, batch_size: int, workers: int) -> DataLoader:
    """The baseline's loader, as it was set up: shuffled, pinned where there is a GPU, the default collation, workers per epoch."""
    return DataLoader(MultiCropFolder(folder), batch_size=batch_size, shuffle=True, num_workers=workers, drop_last=True,
                      pin_memory=torch.cuda.is_available())
