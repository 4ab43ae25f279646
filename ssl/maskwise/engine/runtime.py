"""Process-wide settings of a run: deterministic kernels on GPUs."""

import os

import torch

WORKSPACE = ":4096:8"  # cuBLAS reads it when it starts


def use_deterministic_kernels() -> None:
    """Select kernels whose result does not depend on thread order; call before the first product on a GPU.

    An operation without such a kernel raises RuntimeError. CPU runs need none of it: with the same number of threads
    they repeat bit for bit anyway. Uninitialized memory is not filled, since no code here reads it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
