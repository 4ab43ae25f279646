"""Embeddings of image sets with any model: the verbs `embed`, `search` and `dupes` as functions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from maskwise.bounds import Count
from maskwise.build.images import opened_images, value_range_of
from maskwise.build.models import model_title, opened_model
from maskwise.data.decoding.image import CorruptImage
from maskwise.data.decoding.multichannel import decode
from maskwise.distributed.environment import world_size
from maskwise.distributed.world import World
from maskwise.embedding import copies, duplicates
from maskwise.embedding.embed import SizedImages
from maskwise.embedding.embed import embed as embed_images
from maskwise.embedding.identity import check_model
from maskwise.embedding.reader import Embeddings, is_embeddings, open_embeddings
from maskwise.embedding.search import Neighbors, Queries
from maskwise.embedding.search import search as search_images
from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.evaluation.features.feature_names import check
from maskwise.process.progress import Progress


def embed(
    model,
    images,
    to,
    *,
    features: str | Sequence[str] = ("pooled",),
    batch_size: Count = 256,
    precision: Literal["fp32", "bf16"] = "fp32",
    dtype: Literal["float32", "float16"] = "float32",
    data_options: Mapping = MappingProxyType({}),
    world: World | None = None,
    **of_model,
) -> dict:
    """Write the vectors of all images to a Parquet, CSV or NPY file, by the ending of `to`; returns its settings.

    model, images: as in `evaluate`, or images as `opened_images` takes them with `data_options`. features: names as in
    `evaluation.features.extract`, `a+b` joined; several are columns of their own, and those with several rows per image
    become NPY files beside. The same call continues an interrupted one. Under torchrun the ranks share the work.
    of_model: options of `maskwise.load` for a model given by path.
    """
    encoder_ = opened_model(model, of_model)
    data = opened_images(images, model, len(encoder_.mean), **data_options)
    names = (features,) if isinstance(features, str) else tuple(features)
    with joined(world) as world:
        encoder_ = encoder_.to(world.device) if isinstance(model, (str, Path)) else encoder_
        options = {"batch_size": batch_size, "precision": precision, "dtype": dtype}
        to = Path(to).expanduser()
        return embed_images(encoder_, data, to, names, name=model_title(model), world=world, **options)


@contextlib.contextmanager
def joined(world: World | None) -> Iterator[World]:
    """Join the ranks for the block, unless a world is given; ranks fail together."""
    world = world or World.start()
    with world.fail_together():
        yield world


def search(model, embeddings, images: Sequence, *, k: Count = 10, feature: str | None = None, **of_model) -> Neighbors:
    """Find the images of an embedding file that are nearest to given image files.

    feature: of a file with several columns, by default the first. Raises UserError for embeddings of another model, and
    for an image that cannot be read.
    """
    encoder_ = opened_model(model, of_model)
    stored = open_embeddings(Path(embeddings).expanduser(), feature)
    check_model(encoder_, stored.meta, embeddings)
    paths = [os.path.expanduser(str(image)) for image in images]
    value_range, pixels = value_range_of(model), []
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path} is not a file; give image files")
        try:
            pixels.append(decode(path, path, len(encoder_.mean), value_range=value_range))
        except CorruptImage as error:
            raise UserError(f"cannot read the image {path}: {error.reason}") from None
    encoder_ = encoder_.to(World.start().device)
    return search_images(encoder_, Queries(pixels, paths), stored, feature or stored.meta["features"][0], k)


def dupes(
    model,
    train,
    test=None,
    *,
    threshold: float | None = None,
    feature: str = "pooled",
    mirrored: bool = True,
    engine: Literal["auto", "torch", "faiss"] = "auto",
    batch_size: Count = 256,
    precision: Literal["fp32", "bf16"] = "fp32",
    keep_list: Path | None = None,
    data_options: Mapping = MappingProxyType({}),
    test_options: Mapping = MappingProxyType({}),
    **of_model,
) -> tuple[duplicates.Duplicates, copies.Calibration | None]:
    """Find near-duplicates within training images, and between these and test images, by a model's vectors.

    train, test: images as `opened_images` takes them, or embedding files of this model. threshold: least cosine; None:
    that which separates altered copies of these images best, returned as well. mirrored: also compare mirrored training
    images. engine: of the exact search. keep_list: where a list of images will be written, checked first. Raises
    UserError for sets that this model cannot embed.
    """
    if world_size() > 1:
        raise UserError("dupes runs in one process; run `maskwise embed` under torchrun, and give dupes its file")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    encoder_ = opened_model(model, of_model)
    check(encoder_, (feature,), precision)
    encoder_ = encoder_.to(World.start().device) if isinstance(model, (str, Path)) else encoder_
    settings = {"batch_size": batch_size, "precision": precision}

    bank = opened_set(encoder_, train, model, feature, settings, data_options, "training", keep_list)
    queries = None
    if test is not None:
        queries = opened_set(encoder_, test, model, feature, settings, test_options, "test")
    views = copies.MIRROR if mirrored else ()
    calibration = None
    if threshold is None:
        calibration = copies.calibrate(encoder_, bank.vectors, bank.picture, feature, views, **settings)
        threshold = calibration.threshold
    calls = [partial(changed_vectors, encoder_, bank, feature, change, settings) for change in views]
    device = next(encoder_.parameters()).device
    return duplicates.duplicates(bank, queries, threshold, calls, engine=engine, device=device), calibration


def opened_set(
    encoder_, images, model, feature: str, settings: Mapping, options: Mapping, name: str, keep_list: Path | None = None
) -> Embeddings:
    """Return the vectors of an image set: those of an embedding file of this model, or computed now.

    keep_list: where a list of its images will be written. Raises UserError for a set that no list can name.
    """
    if isinstance(images, (str, Path)) and is_embeddings(images):
        stored = open_embeddings(images, feature)
        check_model(encoder_, stored.meta, images)
        if keep_list is not None:
            duplicates.check_list(stored.root, keep_list)
        return stored
    dataset = opened_images(images, model, len(encoder_.mean), **options)
    if keep_list is not None:
        duplicates.check_list(getattr(dataset, "root", None), keep_list)
    return embedded(encoder_, dataset, feature, f"embedding {name} images", **settings)


def changed_vectors(encoder_, bank: Embeddings, feature: str, change, settings: Mapping) -> tuple[Tensor, Tensor]:
    """Return the vectors [v, D] of changed images and their rows int64 [v]. Raises UserError where none can be read."""
    changed = copies.Copies(bank.picture, range(len(bank)), change)
    with Progress("embedding mirrored images", len(bank)) as progress:
        counted = SizedImages(changed, progress)
        values, rows, _ = extract.extract_rows(encoder_, counted, [feature], torch.arange(len(bank)), **settings)
    if not len(rows):
        raise UserError(f"the images are not in {bank.root}, and mirrored=true reads them; give mirrored=false")
    return values[feature], rows


def embedded(encoder_, dataset, feature: str, what: str, **settings) -> Embeddings:
    """Return the vectors of a dataset's readable images in memory. Raises UserError where there are none."""
    with Progress(what, len(dataset)) as progress:
        sized = SizedImages(dataset, progress)
        values, index, corrupt = extract.extract_rows(
            encoder_, sized, [feature], torch.arange(len(dataset)), **settings
        )
    extract.require_images(len(index), dataset, corrupt)
    labels = None if dataset.labels is None else torch.as_tensor(dataset.labels)[index]
    sizes = torch.tensor([sized.sizes[i][::-1] for i in index.tolist()])
    paths = [dataset.name(i) for i in index.tolist()]
    return Embeddings(values[feature], paths, labels, sizes, getattr(dataset, "root", None), {}, dataset, index)
