"""Tensors that share memory are written one by one, with equal values."""

import torch
from safetensors.torch import load_file, save_file

from maskwise.engine.plain_tensors import plain


def test_shared_and_transposed_tensors_are_written(tmp_path):
    base = torch.arange(12.0).view(3, 4).requires_grad_()
    tensors = {"a": base, "same": base, "row": base[1], "turned": base.t(), "alone": torch.ones(2)}
    save_file(plain(tensors), tmp_path / "x.safetensors")
    written = load_file(tmp_path / "x.safetensors")
    assert written.keys() == tensors.keys() and all(torch.equal(written[key], tensors[key]) for key in tensors)
