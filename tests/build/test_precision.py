"""`train.precision=auto` on machines with and without bf16 products."""

import pytest
import torch

from maskwise.build.training import resolved_precision
from maskwise.recipe.reading import read_recipe

FUNCTIONS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


@pytest.mark.parametrize("supported", [(False, False), (True, False), (False, True)])
def test_auto_is_bf16_only_where_cpu_multiplies_bf16(supported, monkeypatch):
    for name, value in zip(FUNCTIONS, supported):
        monkeypatch.setattr(torch.cpu, name, lambda value=value: value, raising=False)
    expected = "bf16" if any(supported) else "fp32"
    assert resolved_precision(read_recipe("debug/tiny", "train.precision=auto"), torch.device("cpu")) == expected


def test_auto_is_fp32_where_torch_cannot_tell(monkeypatch):
    for name in FUNCTIONS:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert resolved_precision(read_recipe("debug/tiny", "train.precision=auto"), torch.device("cpu")) == "fp32"
