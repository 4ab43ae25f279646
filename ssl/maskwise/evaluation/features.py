"""The one place where an encoder is run over a dataset.

No loader and no global generator is involved: images are read by index, in threads, a few batches ahead.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from maskwise.data.decode import CorruptImage
from maskwise.functional.errors import UserError
from maskwise.functional.resample import resize_image


@dataclasses.dataclass
class FeatureBank:
    """Features of a dataset in its own order, on the CPU; images that could not be read are left out.

    pooled [n, D]; patch_mean [n, D], the mean patch token after the final norm, or None; labels int64 [n] or None; index int64 [n],
    where each row stands in the dataset; hash of images and labels; seconds; corrupt: name -> reason.
    """

    pooled: Tensor
    patch_mean: Tensor | None
    labels: Tensor | None
    index: Tensor
    hash: str
    seconds: float
    corrupt: dict[str, str]

    def __len__(self) -> int:
        return len(self.pooled)


def extract(encoder, dataset, *, world=None, batch_size: int = 256, device=None, patch_means: bool = True) -> FeatureBank:
    """Run an encoder over every image by its evaluation transform: eval mode, no gradient, no autocast; kept as float32.

    Ranks share the images and all get the whole bank. The encoder's modes are put back, random state is not touched.
    device: where to compute, by default where the encoder is. Raises UserError if no image is readable or images end
    in different sizes.
    """
    begin = time.perf_counter()
    first = next(encoder.parameters())
    home, dtype = first.device, first.dtype
    device = torch.device(device) if device is not None else home
    rows = [torch.zeros(0, dtype=torch.int64)]
    pooled, means = [torch.zeros(0, encoder.dim)], [torch.zeros(0, encoder.dim)]
    corrupt: dict[str, str] = {}
    with evaluating(encoder), torch.no_grad(), torch.autocast(device.type, enabled=False):
        encoder.to(device)
        try:
            for index, images in read(dataset, encoder.transform, _share(len(dataset), world), batch_size, corrupt):
                features = encoder(images.to(device, dtype), attention=False)
                rows.append(index)
                pooled.append(features.pooled.float().cpu())
                if patch_means:
                    means.append(features.patches.float().mean(dim=1).cpu())
        finally:
            encoder.to(home)
    index, pooled, means, corrupt = _gather(rows, pooled, means if patch_means else [torch.zeros(0, 0)], corrupt, device, world)
    _some(index, dataset, corrupt)
    labels = None if dataset.labels is None else torch.as_tensor(dataset.labels)[index]
    return FeatureBank(pooled, means if patch_means else None, labels, index, fingerprint(dataset), time.perf_counter() - begin, corrupt)


def pixels(dataset, size: int = 32, *, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), world=None, batch_size: int = 256) -> FeatureBank:
    """Raw pixels as features, the line that learning has to beat: resized to size x size, normalised, flattened -> [n, 3 * size^2]."""
    begin = time.perf_counter()
    mean, std = (torch.as_tensor(values).detach().float().cpu().reshape(3, 1, 1) for values in (mean, std))

    def transform(image: Tensor) -> Tensor:
        return (resize_image(image, (size, size)).float() / 255 - mean) / std

    rows, flat = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, 3 * size * size)]
    corrupt: dict[str, str] = {}
    for index, images in read(dataset, transform, _share(len(dataset), world), batch_size, corrupt):
        rows.append(index)
        flat.append(images.flatten(1))
    index, flat, _, corrupt = _gather(rows, flat, [torch.zeros(0, 0)], corrupt, torch.device("cpu"), world)
    _some(index, dataset, corrupt)
    labels = None if dataset.labels is None else torch.as_tensor(dataset.labels)[index]
    return FeatureBank(flat, None, labels, index, fingerprint(dataset), time.perf_counter() - begin, corrupt)


def read(
    dataset, transform: Callable[[Tensor], Tensor], index: Tensor, batch_size: int, corrupt: dict[str, str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (index int64 [b], images [b, 3, H, W]) of the readable images; the others go into `corrupt` with a reason."""

    def one(i: int) -> Tensor | None:
        try:
            return transform(dataset.image(i))
        except CorruptImage as error:
            corrupt[dataset.name(i)] = error.reason
            return None

    def collect(futures) -> tuple[Tensor, Tensor] | None:
        images = {i: future.result() for i, future in futures}
        kept = {i: image for i, image in images.items() if image is not None}
        shapes = {tuple(image.shape) for image in kept.values()}
        if len(shapes) > 1:
            raise UserError(f"the encoder's transform gives images of different sizes ({sorted(shapes)}); give batch_size=1, or a transform with one size")
        return (torch.tensor(list(kept)), torch.stack(list(kept.values()))) if kept else None

    chunks = torch.split(index, batch_size) if len(index) else ()
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as threads:
        ahead: collections.deque = collections.deque()
        for chunk in chunks:
            ahead.append([(i, threads.submit(one, i)) for i in chunk.tolist()])
            if len(ahead) > 2 and (batch := collect(ahead.popleft())):
                yield batch
        while ahead:
            if batch := collect(ahead.popleft()):
                yield batch


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside; afterwards every submodule is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for part, mode in modes:
            part.training = mode


def fingerprint(dataset) -> str:
    """Hex digest of a dataset's images and labels."""
    digest = hashlib.sha256(dataset.fingerprint().encode())
    if dataset.labels is not None:
        digest.update(torch.as_tensor(dataset.labels).to(torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def _share(n: int, world) -> Tensor:
    return torch.arange(n) if world is None else torch.arange(world.rank, n, world.size)


def _gather(rows: list, pooled: list, means: list, corrupt: dict, device: torch.device, world):
    """Everybody's rows, in the dataset's order."""
    parts = [torch.cat(part) for part in (rows, pooled, means)]
    if world is not None and world.size > 1:
        parts = [world.gather(part) for part in parts]
        corrupt = {name: reason for some in world.gather_objects(corrupt) for name, reason in some.items()}
    place = torch.argsort(parts[0])
    return parts[0][place], parts[1][place], parts[2][place] if len(parts[2]) else parts[2], corrupt


def _some(index: Tensor, dataset, corrupt: dict) -> None:
    if not len(index):
        first = next(iter(corrupt.items()), None)
        raise UserError(f"none of the {len(dataset)} images can be read" + (f" ({first[0]}: {first[1]})" if first else "") + "; give images")
