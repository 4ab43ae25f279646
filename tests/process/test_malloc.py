"""Freed memory stays with the process and is used again."""

import pytest
import torch

from maskwise.process.malloc import keep_freed_memory


def heap() -> tuple[int, int]:
    """Begin and end of this process's heap."""
    lines = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]")]
    return min(int(begin, 16) for begin, _ in lines), max(int(end, 16) for _, end in lines)


def test_freed_memory_remains_in_the_heap():
    if not keep_freed_memory():
        pytest.skip("not glibc")
    tensor = torch.ones(1 << 24)  # 64 MiB: mapped on its own otherwise, and given back at once
    begin, end = heap()
    assert begin <= tensor.data_ptr() < end
    del tensor
    assert heap()[1] >= end
