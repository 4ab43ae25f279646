"""Feature extraction: the only module that runs an encoder over a dataset.

It uses neither the training loader nor global random generators.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.evaluation.features.bank import FeatureBank
from maskwise.evaluation.features.cache import FeatureStore
from maskwise.evaluation.features.feature_names import PRECISIONS, check, requests, rows_of
from maskwise.evaluation.features.fingerprints import cache_key, fingerprint
from maskwise.evaluation.features.reading import read
from maskwise.imaging.resize import resize_image
from maskwise.process.progress import whole


def extract(
    encoder,
    dataset,
    what: str | Sequence[str] = ("pooled", "patch_mean"),
    *,
    world=None,
    batch_size: int = 256,
    device=None,
    precision: str = "fp32",
    cache=None,
    view: Callable[[Tensor, int], Tensor] | None = None,
) -> FeatureBank:
    """Run an encoder over every image, in eval mode without gradient; modes and random state are restored.

    what: names of features, each after the final norm: `pooled`; `patch_mean`; `cls4` and `mean4`, the class tokens and
    the mean patch tokens of the last 4 (any number of) blocks, concatenated, the earliest first; `patches`; `keys` of
    the last block; `attention` [n, H, N]; `vectors` [n, k, D] of a pooling with several; `a+b` concatenated, `a~b`
    interleaved. view(image, i) replaces the evaluation transform; its uint8 output is normalized here. precision "bf16"
    computes under autocast and returns bfloat16. cache: a folder for features, by a hash of weights, transform, data
    and precision; they are memory-mapped and computed in parts, so that an interrupted extraction continues. Whole
    batches are dealt to the ranks, so features do not depend on their number; all ranks get the whole bank. device: by
    default the encoder's. Raises UserError for a feature that the encoder does not have, if no image is readable, and
    for images of different sizes.
    """
    begin = time.perf_counter()
    names = (what,) if isinstance(what, str) else tuple(what)
    check(encoder, names, precision)
    device = torch.device(device) if device is not None else next(encoder.parameters()).device
    options = dict(view=view, batch_size=batch_size, device=device, precision=precision)
    if cache is None:
        rows, index, corrupt = extract_rows(encoder, dataset, names, torch.arange(len(dataset)), world=world, **options)
        origin = dict.fromkeys(names, "computed")
    else:
        store = FeatureStore(cache, cache_key(encoder, dataset, view, precision), world)
        with whole(len(rank_share(len(dataset), world, batch_size))):
            rows, index, corrupt, origin = store.fetch(
                names,
                len(dataset),
                batch_size,
                lambda missing, part: _collect(encoder, dataset, missing, part, **options),
            )
    require_images(len(index), dataset, corrupt)
    labels = None if dataset.labels is None else torch.as_tensor(dataset.labels)[index]
    return FeatureBank(
        rows, labels, index, fingerprint(dataset), time.perf_counter() - begin, corrupt, str(device), origin
    )


def extract_rows(
    encoder,
    dataset,
    names: Sequence[str],
    rows: Tensor,
    *,
    world=None,
    batch_size: int = 256,
    view=None,
    device=None,
    precision: str = "fp32",
):
    """Extract features of distinct rows int64 [m] -> ({name: [m', ...]} on the CPU, index int64 [m'], corrupt).

    Rows stay in order. Batches are dealt to the ranks and all ranks get all rows. Nothing is checked or cached.
    """
    rows = torch.as_tensor(rows)
    mine = rows[rank_share(len(rows), world, batch_size)]
    part = _collect(encoder, dataset, names, mine, batch_size=batch_size, view=view, device=device, precision=precision)
    return _gather(*part, world, rows)


def stream(
    encoder,
    dataset,
    *,
    rows: Tensor | None = None,
    view: Callable[[Tensor, int], Tensor] | None = None,
    batch_size: int = 256,
    device=None,
    precision: str = "fp32",
    corrupt: dict[str, str] | None = None,
    attention: bool = False,
    keys: bool = False,
    layers: tuple[int, ...] = (),
) -> Iterator[tuple[Tensor, Tensor, object]]:
    """Yield (index int64 [b], images on the device, Features) of `rows` (default: all), without storing a bank.

    The encoder is in eval mode until the last batch is taken; the caller's gradient mode is unchanged. Unreadable
    images go into `corrupt`, name -> reason.
    """
    first = next(encoder.parameters())
    home, dtype = first.device, first.dtype
    device = torch.device(device) if device is not None else home
    requested: dict = {"attention": attention}
    if keys:
        requested["keys"] = True
    if layers:
        requested["layers"] = tuple(layers)
    rows = torch.arange(len(dataset)) if rows is None else torch.as_tensor(rows)
    transform = encoder.transform
    if view is None:
        crop = getattr(transform, "crop", transform)  # uint8 is copied to the device and normalized there
        view = lambda image, i: crop(image)  # noqa: E731
    mean, std = (
        torch.as_tensor(value, dtype=torch.float32, device=device).reshape(-1, 1, 1)
        for value in (encoder.mean, encoder.std)
    )
    with evaluating(encoder):
        encoder.to(device)
        try:
            for index, images in read(
                dataset, view, rows, batch_size, {} if corrupt is None else corrupt, channels=len(encoder.mean)
            ):
                images = (images.pin_memory() if device.type == "cuda" else images).to(device, non_blocking=True)
                if not images.is_floating_point():
                    images = (images.float() / torch.iinfo(images.dtype).max - mean) / std
                images = images.to(dtype)
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    features = encoder(images, **requested)
                yield index, images, features
        finally:
            encoder.to(home)


def pixels(
    dataset, size: int = 32, *, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), world=None, batch_size: int = 256
) -> FeatureBank:
    """Return raw pixels as features, a baseline: resized, normalized, flattened -> `pooled` [n, C * size^2]."""
    begin = time.perf_counter()
    mean, std = (torch.as_tensor(values).detach().float().cpu().reshape(-1, 1, 1) for values in (mean, std))

    def view(image: Tensor, i: int) -> Tensor:
        return (resize_image(image, (size, size)).float() / torch.iinfo(image.dtype).max - mean) / std

    channels = len(mean)
    rows, flat, corrupt = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, channels * size * size)], {}
    mine = rank_share(len(dataset), world, batch_size)
    for index, images in read(dataset, view, mine, batch_size, corrupt, channels=channels):
        rows.append(index)
        flat.append(images.flatten(1))
    pooled, index, corrupt = _gather(
        {"pooled": torch.cat(flat)}, torch.cat(rows), corrupt, world, torch.arange(len(dataset))
    )
    require_images(len(index), dataset, corrupt)
    labels = None if dataset.labels is None else torch.as_tensor(dataset.labels)[index]
    return FeatureBank(pooled, labels, index, fingerprint(dataset), time.perf_counter() - begin, corrupt)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Set eval mode inside the context; restore the mode of every submodule after it."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for part, mode in modes:
            part.training = mode


def _collect(encoder, dataset, names: Sequence[str], rows: Tensor, *, precision: str, **options):
    """Extract features of some rows -> ({name: [m, ...]}, index int64 [m], corrupt); empty if none is readable."""
    rows_by_name: dict[str, list[Tensor]] = {name: [] for name in names}
    index, corrupt = [torch.zeros(0, dtype=torch.int64)], {}
    prefix = getattr(getattr(encoder, "backbone", None), "num_prefix", 1)
    for numbers, _, features in stream(
        encoder, dataset, rows=rows, precision=precision, corrupt=corrupt, **requests(names), **options
    ):
        index.append(numbers)
        for name in names:
            rows_by_name[name].append(rows_of(name, features, prefix).to(PRECISIONS[precision]).cpu())
    return (
        {
            name: torch.cat(parts) if parts else torch.zeros(0, dtype=PRECISIONS[precision])
            for name, parts in rows_by_name.items()
        },
        torch.cat(index),
        corrupt,
    )


def rank_share(n: int, world, batch_size: int) -> Tensor:
    """Return this rank's indices among n.

    Whole batches are dealt to the ranks in turn, so that the images of a batch do not depend on the number of ranks.
    """
    rows = torch.arange(n)
    if world is None or world.size == 1:
        return rows
    return rows[rows // batch_size % world.size == world.rank]


def _gather(rows: dict[str, Tensor], index: Tensor, corrupt: dict, world, order: Tensor):
    """Gather the rows of all ranks, in the order given."""
    if world is not None and world.size > 1:
        shapes = {
            name: shape
            for part in world.gather_objects(
                {name: tuple(part.shape[1:]) for name, part in rows.items() if part.ndim > 1}
            )
            for name, shape in part.items()
        }
        rows = {
            name: world.gather(part.reshape(len(index), *shapes[name])) if name in shapes else part
            for name, part in rows.items()
        }
        index = world.gather(index)
        corrupt = {name: reason for part in world.gather_objects(corrupt) for name, reason in part.items()}
    sorted_rows, back = torch.sort(order)
    place = torch.argsort(back[torch.searchsorted(sorted_rows, index)])
    if torch.equal(place, torch.arange(len(place))):
        return rows, index, corrupt
    return {name: part[place] for name, part in rows.items()}, index[place], corrupt


def require_images(count: int, dataset, corrupt: dict[str, str]) -> None:
    """Raise UserError where no image of a dataset could be read."""
    if not count:
        reason = next((f" ({name}: {text})" for name, text in corrupt.items()), "")
        raise UserError(f"none of the {len(dataset)} images can be read{reason}; give images")
