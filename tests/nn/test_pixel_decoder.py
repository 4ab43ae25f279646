"""The decoder from patches to pixels against unfolded patches and an explicit loop."""

import torch
from torch.nn import functional as F

from maskwise.nn.pixel_decoder import PixelDecoder


def decoder(dim=6, patch=(4, 2)):
    torch.manual_seed(0)
    return PixelDecoder(dim, patch).double()


def test_each_patch_lands_on_its_own_pixels():
    """Pixels of patch n are row n of the linear map: folding them with torch's own fold gives the same image."""
    made = decoder()
    patches = torch.randn(2, 15, 6, dtype=torch.float64)
    image = made(patches, (3, 5))
    assert image.shape == (2, 3, 12, 10)
    mixed = F.gelu(F.conv2d(patches.transpose(1, 2).reshape(2, 6, 3, 5), made.neighbours.weight, made.neighbours.bias, padding=1))
    rows = F.linear(mixed.flatten(2).transpose(1, 2), made.pixels.weight, made.pixels.bias)
    torch.testing.assert_close(image, F.fold(rows.transpose(1, 2), (12, 10), (4, 2), stride=(4, 2)), rtol=0, atol=0)


def test_the_convolution_is_a_sum_over_neighbours():
    made = decoder()
    patches = torch.randn(1, 6, 6, dtype=torch.float64)
    image = made(patches, (2, 3))
    grid = torch.zeros(4, 5, 6, dtype=torch.float64)  # one row of zeros around
    grid[1:3, 1:4] = patches.view(2, 3, 6)
    for i in range(2):
        for j in range(3):
            total = made.neighbours.bias.clone()
            for di in range(3):
                for dj in range(3):
                    total = total + made.neighbours.weight[:, :, di, dj] @ grid[i + di, j + dj]
            pixels = (made.pixels.weight @ (0.5 * total * (1 + torch.erf(total / 2**0.5))) + made.pixels.bias).view(3, 4, 2)
            torch.testing.assert_close(image[0, :, 4 * i : 4 * i + 4, 2 * j : 2 * j + 2], pixels)


def test_how_it_starts():
    made = PixelDecoder(384, (16, 16))
    assert made.pixels.weight.shape == (768, 384) and not made.pixels.bias.any() and not made.neighbours.bias.any()
    assert abs(made.pixels.weight.std().item() - 0.02) < 1e-3 and abs(made.neighbours.weight.std().item() - 0.02) < 1e-3
