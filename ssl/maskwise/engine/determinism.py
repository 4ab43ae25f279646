"""The same bits from the same run on one GPU, at a price in speed."""

import os

import torch

WORKSPACE = ":4096:8"  # what cuBLAS needs to know before it starts


def be_deterministic() -> None:
    """Make torch choose kernels whose result does not depend on the order of threads; call before the first product on a GPU.

    An operation without such a kernel raises RuntimeError instead of giving other bits each time. CPUs need none of it: a run with the
    same number of threads repeats bit for bit anyway. Fresh memory is not filled: no code here reads it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
