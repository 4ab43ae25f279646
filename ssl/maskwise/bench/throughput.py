"""Images per second of a network in inference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from maskwise.bench.machine import wait

WARM_UP = 2  # calls that are not timed
FEWEST = 3  # timed calls, however long one takes


@torch.inference_mode()
def images_per_second(
    network: Callable[[torch.Tensor], object], size: tuple[int, int], batch: int, device: torch.device, seconds: float
) -> float:
    """Return the batch divided by the median time of calls on random images [batch, 3, *size], float32.

    Calls are repeated for `seconds`.
    """
    images = torch.randn(batch, 3, *size, device=device)
    for _ in range(WARM_UP):
        network(images)
    wait(device)
    times: list[float] = []
    while len(times) < FEWEST or sum(times) < seconds:
        begin = time.perf_counter()
        network(images)
        wait(device)
        times.append(time.perf_counter() - begin)
    return batch / statistics.median(times)
