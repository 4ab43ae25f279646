"""`Embedder`: an encoder as a transformer of scikit-learn, images in, vectors out."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from maskwise.build.models import opened_model
from maskwise.data.datasets.torch_dataset import TorchDataset
from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.evaluation.features.feature_names import check

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils.validation import validate_data
except ImportError:
    raise UserError("maskwise.Embedder needs scikit-learn: pip install 'maskwise[eval]'") from None


class Embedder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Transform images to their vectors [n, D]; nothing is learned, so that `fit` may be left out.

    model: an encoder, a timm model, or a path as of `maskwise.load`, which is loaded by `fit` (without it at each
    `transform`). features: as in `maskwise.embed`, such as `pooled+patch_mean`. Images: a list of PIL images, arrays,
    tensors or paths (a column of a table too), an array [n, H, W] or [n, H, W, C], a tensor [n, C, H, W], or a
    dataset; each is uint8, or floats in 0..1. image_shape: in place of images, rows of pixels [n, H * W * C] of this
    shape (one side may be -1), as scikit-learn's own image sets; value_range: their black and white. device: by default
    the encoder's. Raises UserError for anything else, and for an image that cannot be read.
    """

    def __init__(
        self,
        model=None,
        *,
        features="pooled",
        image_shape=None,
        value_range=None,
        batch_size=256,
        precision="fp32",
        device=None,
    ):
        self.model = model
        self.features = features
        self.image_shape = image_shape
        self.value_range = value_range
        self.batch_size = batch_size
        self.precision = precision
        self.device = device

    def fit(self, X, y=None) -> Embedder:
        """Load the model and check the images; returns the embedder."""
        images = self._images(X, reset=True)
        encoder = self._opened()
        self._n_features_out = self._vectors(encoder, images, [0]).shape[1]
        self.encoder_ = encoder
        return self

    def transform(self, X) -> np.ndarray:
        """Return the vectors of images, float [n, D], in their order."""
        images = self._images(X, reset=False)
        encoder = self.encoder_ if hasattr(self, "encoder_") else self._opened()
        return self._vectors(encoder, images, range(len(images)))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        rows = self.image_shape is not None
        tags.requires_fit = False
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = rows, not rows
        tags.input_tags.string = not rows
        tags.transformer_tags.preserves_dtype = []
        return tags

    def _opened(self):
        if self.model is None:
            raise UserError("Embedder: give a model, an encoder or a path that maskwise.load reads")
        encoder = opened_model(self.model, {})
        check(encoder, (self.features,), self.precision)
        return encoder

    def _images(self, X, reset: bool):
        """Return images as a sequence, rows of pixels as arrays [H, W] or [H, W, C]."""
        if self.image_shape is None:
            return listed(X)
        rows = validate_data(self, X, reset=reset, dtype="numeric")
        try:
            images = rows.reshape(len(rows), *self.image_shape)
        except ValueError:
            raise UserError(
                f"Embedder: rows of {rows.shape[1]} pixels are no images of image_shape={self.image_shape}"
            ) from None
        if self.value_range is None:
            return images
        low, high = self.value_range
        return np.clip((images.astype(np.float64) - low) / (high - low), 0, 1)

    def _vectors(self, encoder, images, rows: Sequence[int]) -> np.ndarray:
        dataset = images if hasattr(images, "image") else TorchDataset(images, channels=len(encoder.mean))
        values, _, corrupt = extract.extract_rows(
            encoder,
            dataset,
            [self.features],
            torch.as_tensor(list(rows)),
            batch_size=self.batch_size,
            device=self.device,
            precision=self.precision,
        )
        if corrupt:
            name, reason = next(iter(corrupt.items()))
            raise UserError(
                f"Embedder: {len(corrupt)} of {len(images)} images cannot be read (the first: {name}: {reason})"
            )
        vectors = values[self.features]
        return (vectors.float() if vectors.dtype == torch.bfloat16 else vectors).numpy()


def listed(images):
    """Return images as a sequence with one entry per image; a single image is refused."""
    if isinstance(images, (str, bytes, os.PathLike)):
        raise UserError("Embedder takes several images; give a list, [image]")
    if hasattr(images, "to_numpy"):  # a column of a table, or a table of one
        images = images.to_numpy()
    if isinstance(images, np.ndarray) and images.dtype.kind in "OUS":
        if images.ndim == 2 and images.shape[1] == 1:
            images = images[:, 0]
        return images.tolist() if images.ndim == 1 else images
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim not in (3, 4):
        raise UserError(
            f"Embedder takes images [n, H, W] or [n, H, W, C]; this is {list(images.shape)}: give image_shape for rows "
            "of pixels"
        )
    return images
