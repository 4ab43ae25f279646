"""Reading of a dataset's images by index, in threads, a few batches ahead."""

from __future__ import annotations

import collections
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from maskwise.data.decoding.image import CorruptImage
from maskwise.errors import UserError
from maskwise.imaging.tensors import with_channels
from maskwise.process.progress import images_read

AHEAD = 3  # batches that are read while another is used
_BEGINNING = threading.Lock()


def read(
    dataset,
    view: Callable,
    index: Tensor,
    batch_size: int,
    corrupt: dict[str, str],
    threads: int | None = None,
    channels: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches (index int64 [b], images [b, C, H, W]) of readable images; the others go into `corrupt`.

    view: a function of an image, or of an image and its index in the dataset. channels: gray images are repeated to 3,
    colors become luma for 1. Progress is counted when the next batch is asked for. Raises UserError, with the image's
    name, where the channels differ otherwise.
    """
    with_index = _takes_index(view)

    def load(i: int) -> Tensor | None:
        try:
            image = dataset.image(i)
            if channels is not None and image.shape[0] != channels:
                image = converted(image, channels, dataset.name(i))
            return view(image, i) if with_index else view(image)
        except CorruptImage as error:
            corrupt[dataset.name(i)] = error.reason
            return None

    def collect(futures) -> tuple[Tensor, Tensor] | None:
        images = [(i, future.result()) for i, future in futures]
        readable = [(i, image) for i, image in images if image is not None]
        shapes = {tuple(image.shape) for _, image in readable}
        if len(shapes) > 1:
            raise UserError(
                f"the encoder's transform gives images of different sizes ({sorted(shapes)}); give batch_size=1, or a "
                "transform with one size"
            )
        if not readable:
            return None
        return torch.tensor([i for i, _ in readable]), torch.stack([image for _, image in readable])

    chunks = torch.split(index, batch_size) if len(index) else ()
    with (
        images_read(len(index)) as progress,
        ThreadPoolExecutor(max_workers=threads or min(16, os.cpu_count() or 1), initializer=_begin_thread) as pool,
    ):
        ahead: collections.deque = collections.deque()
        remaining = iter(chunks)
        while True:
            while len(ahead) < AHEAD and (chunk := next(remaining, None)) is not None:
                ahead.append([(i, pool.submit(load, i)) for i in chunk.tolist()])
            if not ahead:
                return
            futures = ahead.popleft()
            if batch := collect(futures):
                yield batch
            progress.add(len(futures))


def converted(image: Tensor, channels: int, name: str) -> Tensor:
    """Return an image [C, H, W] with the given channels. Raises UserError where there is no conversion."""
    other = with_channels(image, channels)
    if other is None:
        raise UserError(
            f"{name} has {len(image)} channels and the encoder takes {channels}; give images of {channels} channels"
        )
    return other


def _begin_thread() -> None:
    # After a fork, torch rebuilds its thread pool on first use; two threads at once find none ("Invalid thread pool!").
    with _BEGINNING:
        torch.get_num_threads()


def _takes_index(view: Callable) -> bool:
    """Return whether a view takes the index after the image."""
    try:
        parameters = [item for item in inspect.signature(view).parameters.values() if item.default is item.empty]
    except (TypeError, ValueError):
        return False
    return sum(item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD) for item in parameters) > 1
