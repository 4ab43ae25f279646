"""Pixel decoder against torch's fold and an explicit loop."""

import torch
from torch.nn import functional as F

from maskwise.nn.pixel_decoder import PixelDecoder


def decoder(dim=6, patch=(4, 2)):
    torch.manual_seed(0)
    return PixelDecoder(dim, patch).double()


def test_patches_are_folded_into_the_image():
    """Row n of the linear layer's output are the pixels of patch n, as in torch's fold."""
    model = decoder()
    patches = torch.randn(2, 15, 6, dtype=torch.float64)
    image = model(patches, (3, 5))
    assert image.shape == (2, 3, 12, 10)
    mixed = F.gelu(
        F.conv2d(patches.transpose(1, 2).reshape(2, 6, 3, 5), model.neighbors.weight, model.neighbors.bias, padding=1)
    )
    rows = F.linear(mixed.flatten(2).transpose(1, 2), model.pixels.weight, model.pixels.bias)
    torch.testing.assert_close(image, F.fold(rows.transpose(1, 2), (12, 10), (4, 2), stride=(4, 2)), rtol=0, atol=0)


def test_the_convolution_is_a_sum_over_neighbors():
    model = decoder()
    patches = torch.randn(1, 6, 6, dtype=torch.float64)
    image = model(patches, (2, 3))
    grid = torch.zeros(4, 5, 6, dtype=torch.float64)  # one row of zeros around
    grid[1:3, 1:4] = patches.view(2, 3, 6)
    for i in range(2):
        for j in range(3):
            total = model.neighbors.bias.clone()
            for di in range(3):
                for dj in range(3):
                    total = total + model.neighbors.weight[:, :, di, dj] @ grid[i + di, j + dj]
            pixels = (model.pixels.weight @ (0.5 * total * (1 + torch.erf(total / 2**0.5))) + model.pixels.bias).view(
                3, 4, 2
            )
            torch.testing.assert_close(image[0, :, 4 * i : 4 * i + 4, 2 * j : 2 * j + 2], pixels)


def test_initialization():
    model = PixelDecoder(384, (16, 16))
    assert model.pixels.weight.shape == (768, 384) and not model.pixels.bias.any() and not model.neighbors.bias.any()
    assert (
        abs(model.pixels.weight.std().item() - 0.02) < 1e-3 and abs(model.neighbors.weight.std().item() - 0.02) < 1e-3
    )
