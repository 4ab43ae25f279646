"""PCA-whitened pixels, the strongest baseline without learning from labels: as rows, and as an encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.evaluation.features.views import RawPixels
from maskwise.functional.whitening.features import Whitening, pca_whitening
from maskwise.imaging.resize import resize_image
from maskwise.nn.tokens import Features

DIMS = 256
IMAGES_PER_DIM = 10  # with fewer, the smallest variances are noise, and k-NN falls below that of raw pixels
MOST_IMAGES = 50_000  # that PCA is fitted to, evenly spread
MOST_SIDE = 8192  # of the eigenproblem: half a gigabyte, minutes


def fit_whitening(rows: Tensor, device=None) -> tuple[Whitening, dict]:
    """Fit PCA whitening to the pixels [n, D] of training images -> (whitening, its entry in a protocol).

    Raises UserError where the eigenproblem, of side min(n, D), would be too large, and for equal images.
    """
    count = min(len(rows), MOST_IMAGES)
    if min(count, rows.shape[1]) > MOST_SIDE:
        raise UserError(
            f"whitened pixels: {count} images of {rows.shape[1]} numbers are too many for PCA, which takes up to "
            f"{MOST_SIDE} of either; choose a smaller size, such as 32"
        )
    chosen = rows if count == len(rows) else rows[torch.arange(count) * len(rows) // count]
    on_gpu = device is not None and torch.device(device).type == "cuda"
    whitening = pca_whitening(chosen, min(DIMS, max(1, count // IMAGES_PER_DIM)), device=device if on_gpu else "cpu")
    return whitening, {"dims": len(whitening.variances), "fitted_to": count}


class WhitenedPixels(RawPixels):
    """PCA-whitened pixels as an encoder, fitted to training images: any image -> size x size -> [d], d at most 256."""

    def fit(self, dataset, world=None, batch_size: int = 256) -> WhitenedPixels:
        """Fit to the images of a dataset and return itself; ranks share the reading."""
        options = {"mean": self.mean, "std": self.std, "world": world, "batch_size": batch_size}
        rows = extract.pixels(dataset, self.image_size[0], **options).pooled
        whitening, self.fitted = fit_whitening(rows, self.placeholder.device)
        self.dim = self.fitted["dims"]
        self.register_buffer("center", whitening.mean.float().to(self.placeholder.device))
        self.register_buffer("projection", whitening.projection.float().to(self.placeholder.device))
        return self

    def forward(self, images: Tensor, **requests) -> Features:
        """Map normalized images [B, C, H, W] to Features of one patch, without attention."""
        vectors = (resize_image(images, self.image_size).flatten(1) - self.center) @ self.projection
        return Features(vectors, vectors[:, None], None, (1, 1))
