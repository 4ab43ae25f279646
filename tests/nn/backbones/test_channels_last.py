"""Channels-last memory of convolutional backbones: same numbers, same files, kept through copies and loading."""

import copy

import pytest
import torch

from maskwise.engine.plain_tensors import plain
from maskwise.nn import Backbone
from maskwise.nn.backbones.timm_registry import FAMILIES

NETWORKS = {
    "resnet18": {"channels": [16, 16, 16, 32], "small_stem": True},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32]},
    "mobilenetv2_050": {},
}


def build(name: str, **options) -> torch.nn.Module:
    """Build a network from seed 0, in float64 and evaluation mode."""
    torch.manual_seed(0)
    return Backbone(name, image_size=64, **options).double().eval()


def four_dimensional(module: torch.nn.Module) -> list[torch.Tensor]:
    """Return the weights of the convolutions that have more than one layout."""
    return [
        weight for weight in module.parameters() if weight.ndim == 4 and min(weight.shape[1], weight[0, 0].numel()) > 1
    ]


@pytest.mark.parametrize("name, options", NETWORKS.items())
def test_memory_format_changes_no_number(name, options, monkeypatch):
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = build(name, **options)
    family = FAMILIES[ours.kind]
    monkeypatch.setattr(type(family), "channels_last", False)
    plain_memory = build(name, **options)
    assert all(weight.is_contiguous() for weight in four_dimensional(plain_memory))
    expected = plain_memory(images).patches
    monkeypatch.undo()
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in four_dimensional(ours))
    torch.testing.assert_close(ours(images).patches, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name, options", NETWORKS.items())
def test_copies_and_loaded_weights_stay_channels_last_and_files_are_contiguous(name, options):
    ours = build(name, **options)
    stored = plain(ours.state_dict())
    assert all(tensor.is_contiguous() for tensor in stored.values())
    copied = copy.deepcopy(ours)
    ours.load_state_dict(stored)
    for module in (ours, copied):
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in four_dimensional(module))
    for weight, stored_weight in zip(ours.state_dict().values(), stored.values()):
        assert torch.equal(weight, stored_weight)


def test_maps_stay_channels_last_between_blocks():
    ours = build("resnet18", **NETWORKS["resnet18"])
    formats = []
    for part in ours.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.register_forward_hook(
                lambda _module, _inputs, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
            )
    ours(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    assert len(formats) == 21 and all(formats)


def test_narrow_strided_pointwise_convolutions_stay_contiguous():
    """Their gradient in channels-last memory ends the process on some CPUs."""
    narrow = Backbone("resnet18", image_size=96, channels=[8, 8, 8, 16], layers=[1, 1, 1, 1], small_stem=True)
    assert not narrow.channels_last and all(weight.is_contiguous() for weight in narrow.parameters())
    for _ in range(3):
        narrow(torch.randn(8, 3, 96, 96)).patches.square().mean().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in narrow.parameters())
