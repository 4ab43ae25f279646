"""The one place where an encoder is run over a dataset.

No loader and no global generator is involved: images are read by index, in threads, a few batches ahead.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from maskwise.data.decode import CorruptImage
from maskwise.evaluation.feature_store import FeatureStore
from maskwise.functional.errors import UserError
from maskwise.functional.resample import resize_image

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BEGINNING = threading.Lock()
_NAME = re.compile(r"(?:pooled|vectors|patch_mean|patches|keys|attention|(?:cls|mean)\d*)")


@dataclasses.dataclass
class FeatureBank:
    """Features of a dataset in its own order, on the CPU; images that could not be read are left out.

    rows: name -> [n, ...], as `bank[name]`; labels int64 [n] or None; index int64 [n], where each row stands in the dataset;
    hash of images and labels; seconds; corrupt: name -> reason; device; origin: how each feature came, "computed", "cached",
    "resumed" or "damaged, made anew".
    """

    rows: dict[str, Tensor]
    labels: Tensor | None
    index: Tensor
    hash: str
    seconds: float
    corrupt: dict[str, str]
    device: str = "cpu"
    origin: dict[str, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, name: str) -> Tensor:
        return self.rows[name]

    @property
    def pooled(self) -> Tensor:
        """The pooled vectors [n, D]."""
        return self.rows["pooled"]

    @property
    def patch_mean(self) -> Tensor | None:
        """The mean patch tokens [n, D], None where nobody asked for them."""
        return self.rows.get("patch_mean")

    def cost(self) -> dict:
        """What the features took, as a Report tells it."""
        return {
            "seconds": round(self.seconds, 3), "images": len(self), "images_per_second": round(len(self) / max(self.seconds, 1e-9), 1),
            "device": self.device, "features": dict(self.origin),
        }  # fmt: skip


def extract(
    encoder, dataset, what: str | Sequence[str] = ("pooled", "patch_mean"), *, world=None, batch_size: int = 256, device=None,
    precision: str = "fp32", cache=None, view: Callable[[Tensor, int], Tensor] | None = None,
) -> FeatureBank:  # fmt: skip
    """Run an encoder over every image: eval mode, no gradient; modes are put back, random state is not touched.

    what: names of features, each after the final norm: `pooled`; `patch_mean`; `cls4` and `mean4`, the class tokens and the mean
    patch tokens of the last 4 (any number of) blocks side by side, the oldest first; `patches`; `keys` of the last block;
    `attention` [n, H, N]; `vectors` [n, k, D] of a pooling that gives several; `a+b` side by side, `a~b` element by element in turn. view(image, i) replaces the evaluation transform;
    uint8 that it gives is normalised here. precision "bf16" computes under autocast and keeps bfloat16. cache: a folder where
    features stay, by a hash of weights, transform, data and precision; they are mapped, not read, and made in parts, so that an
    interrupted extraction goes on. Batches go round the ranks, so features do not depend on their number; all ranks get the whole
    bank. device: where to compute, by default where the encoder is. Raises UserError for a feature that the encoder does not have,
    if no image is readable, and if images end in different sizes.
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
        store = FeatureStore(cache, _key(encoder, dataset, view, precision), world)
        rows, index, corrupt, origin = store.fetch(
            names, len(dataset), batch_size, lambda missing, part: _collect(encoder, dataset, missing, part, **options)
        )
    _some(index, dataset, corrupt)
    labels = None if dataset.labels is None else torch.as_tensor(dataset.labels)[index]
    return FeatureBank(rows, labels, index, fingerprint(dataset), time.perf_counter() - begin, corrupt, str(device), origin)


def extract_rows(encoder, dataset, names: Sequence[str], rows: Tensor, *, world=None, batch_size: int = 256, view=None, device=None, precision: str = "fp32"):
    """Features of some rows int64 [m], in their order, each once: ({name: [m', ...]} on the CPU, index int64 [m'], corrupt).

    Batches go round the ranks and all ranks get everything; nothing is checked and nothing is kept.
    """
    rows = torch.as_tensor(rows)
    mine = rows[_share(len(rows), world, batch_size)]
    found = _collect(encoder, dataset, names, mine, batch_size=batch_size, view=view, device=device, precision=precision)
    return _gather(*found, world, rows)


def stream(
    encoder, dataset, *, rows: Tensor | None = None, view: Callable[[Tensor, int], Tensor] | None = None, batch_size: int = 256, device=None,
    precision: str = "fp32", corrupt: dict[str, str] | None = None, attention: bool = False, keys: bool = False, layers: tuple[int, ...] = (),
) -> Iterator[tuple[Tensor, Tensor, object]]:  # fmt: skip
    """Batches (index int64 [b], images on the device, Features) of `rows` (default: all), for what needs no bank.

    The encoder is in eval mode until the last batch is taken; the gradient mode of the caller is left alone. Unreadable images go
    into `corrupt`, name -> reason.
    """
    first = next(encoder.parameters())
    home, dtype = first.device, first.dtype
    device = torch.device(device) if device is not None else home
    wanted = {"attention": attention, **({"keys": True} if keys else {}), **({"layers": tuple(layers)} if layers else {})}
    rows = torch.arange(len(dataset)) if rows is None else torch.as_tensor(rows)
    transform = encoder.transform
    if view is None:
        crop = getattr(transform, "crop", transform)  # uint8 travels; colours are normalised on the device
        view = lambda image, i: crop(image)  # noqa: E731
    mean, std = (torch.as_tensor(value, dtype=torch.float32, device=device).reshape(-1, 1, 1) for value in (encoder.mean, encoder.std))
    with evaluating(encoder):
        encoder.to(device)
        try:
            for index, images in read(dataset, view, rows, batch_size, {} if corrupt is None else corrupt):
                images = (images.pin_memory() if device.type == "cuda" else images).to(device, non_blocking=True)
                images = (images if images.is_floating_point() else (images.float() / torch.iinfo(images.dtype).max - mean) / std).to(dtype)
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    features = encoder(images, **wanted)
                yield index, images, features
        finally:
            encoder.to(home)


def check(encoder, names: Sequence[str], precision: str = "fp32") -> None:
    """Raise UserError for a feature's name that means nothing or that this encoder does not have."""
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision!r} is unknown; choose {' or '.join(PRECISIONS)}")
    backbone = getattr(encoder, "backbone", None)
    for name in names:
        for term in re.split(r"[+~]", name):
            if not _NAME.fullmatch(term) or term in ("cls0", "mean0"):
                raise UserError(f"no feature {name!r}; there are pooled, vectors, patch_mean, cls4, mean4 (any number of blocks), patches, keys, attention, and a+b of them")
            kind, count = _last(term)
            if kind == "cls" and not getattr(backbone, "has_class_token", True):
                raise UserError(f"feature {name!r} needs a class token and this encoder has none; take pooled, or mean{count} of its blocks")
            if kind and count > 1 and hasattr(backbone, "stage_dims"):
                raise UserError(f"feature {name!r} wants {count} blocks, and the maps of this encoder's have different sizes; take pooled, patch_mean or mean1")
            if kind and count > getattr(backbone, "depth", count):
                raise UserError(f"feature {name!r} wants {count} blocks and this encoder has {backbone.depth}; take fewer")


def requests(names: Sequence[str]) -> dict:
    """What `stream` must ask of an encoder for these features."""
    terms = [term for name in names for term in re.split(r"[+~]", name)]
    blocks = max((count for kind, count in map(_last, terms) if kind), default=0)
    return {"attention": "attention" in terms, "keys": "keys" in terms, "layers": tuple(range(-blocks, 0))}


def rows_of(name: str, features, prefix: int = 1) -> Tensor:
    """The rows [b, ...] of a feature's name, from Features that hold what `requests` asked for; prefix: tokens before the patches."""
    if "+" in name:
        return torch.cat([rows_of(part, features, prefix) for part in name.split("+")], dim=-1)
    if "~" in name:
        return torch.stack([rows_of(part, features, prefix) for part in name.split("~")], dim=-1).flatten(-2)
    kind, count = _last(name)
    if kind:
        stages = features.layers[-count:]
        if stages[-1].ndim == 4:  # a map: the last one's places are the patches
            return features.patches.float().mean(dim=1)
        return torch.cat([stage[:, 0] if kind == "cls" else stage[:, prefix:].float().mean(dim=1) for stage in stages], dim=-1)
    if name == "patch_mean":
        return features.patches.float().mean(dim=1)
    found = getattr(features, name, None)
    if found is None:
        raise UserError(f"this encoder gives no {name}; choose another feature, or an encoder whose pooling makes an attention")
    return found


def pixels(dataset, size: int = 32, *, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), world=None, batch_size: int = 256) -> FeatureBank:
    """Raw pixels as features, the line that learning has to beat: resized to size x size, normalised, flattened -> `pooled` [n, 3 * size^2]."""
    begin = time.perf_counter()
    mean, std = (torch.as_tensor(values).detach().float().cpu().reshape(-1, 1, 1) for values in (mean, std))

    def view(image: Tensor, i: int) -> Tensor:
        return (resize_image(image, (size, size)).float() / torch.iinfo(image.dtype).max - mean) / std

    rows, flat, corrupt = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, 3 * size * size)], {}
    for index, images in read(dataset, view, _share(len(dataset), world, batch_size), batch_size, corrupt):
        rows.append(index)
        flat.append(images.flatten(1))
    found, index, corrupt = _gather({"pooled": torch.cat(flat)}, torch.cat(rows), corrupt, world, torch.arange(len(dataset)))
    _some(index, dataset, corrupt)
    labels = None if dataset.labels is None else torch.as_tensor(dataset.labels)[index]
    return FeatureBank(found, labels, index, fingerprint(dataset), time.perf_counter() - begin, corrupt)


def read(
    dataset, view: Callable, index: Tensor, batch_size: int, corrupt: dict[str, str], threads: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (index int64 [b], images [b, 3, H, W]) of the readable images; the others go into `corrupt` with a reason.

    view is a function of an image, or of an image and its index in the dataset.
    """
    alone = not _takes_two(view)

    def one(i: int) -> Tensor | None:
        try:
            return view(dataset.image(i)) if alone else view(dataset.image(i), i)
        except CorruptImage as error:
            corrupt[dataset.name(i)] = error.reason
            return None

    def collect(futures) -> tuple[Tensor, Tensor] | None:
        images = [(i, future.result()) for i, future in futures]
        kept = [(i, image) for i, image in images if image is not None]
        shapes = {tuple(image.shape) for _, image in kept}
        if len(shapes) > 1:
            raise UserError(f"the encoder's transform gives images of different sizes ({sorted(shapes)}); give batch_size=1, or a transform with one size")
        return (torch.tensor([i for i, _ in kept]), torch.stack([image for _, image in kept])) if kept else None

    chunks = torch.split(index, batch_size) if len(index) else ()
    with ThreadPoolExecutor(max_workers=threads or min(16, os.cpu_count() or 1), initializer=_begin_thread) as pool:
        ahead: collections.deque = collections.deque()
        for chunk in chunks:
            ahead.append([(i, pool.submit(one, i)) for i in chunk.tolist()])
            if len(ahead) > 2 and (batch := collect(ahead.popleft())):
                yield batch
        while ahead:
            if batch := collect(ahead.popleft()):
                yield batch


def _begin_thread() -> None:
    # A forked process makes torch's own pool anew when a thread first asks for it; two that ask at once find none ("Invalid thread pool!").
    with _BEGINNING:
        torch.get_num_threads()


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside; afterwards every submodule is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for part, mode in modes:
            part.training = mode


def fingerprint(dataset) -> str:
    """Hex digest of a dataset's images and labels."""
    return _with_labels(dataset, dataset.fingerprint())


def weights_fingerprint(encoder: nn.Module) -> str:
    """Hex digest of a module: every parameter and buffer, and the plain settings of every part (a pooling's gamma, a norm's eps)."""
    digest = hashlib.sha256()
    for name, part in encoder.named_modules():
        plain = {key: value for key, value in vars(part).items() if key != "training" and not key.startswith("_") and _plain(value)}
        digest.update(f"{name}:{type(part).__module__}.{type(part).__qualname__}{sorted(plain.items())}\n".encode())
    for name, tensor in (*encoder.named_parameters(), *encoder.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _key(encoder, dataset, view, precision: str) -> dict:
    """What cached features depend on."""
    transform = encoder.transform if view is None else view
    if view is not None and not hasattr(view, "fingerprint"):
        raise UserError("features of a view can be cached only if it has a fingerprint() of what it does; leave the cache out")
    said = transform.fingerprint() if hasattr(transform, "fingerprint") else getattr(transform, "__qualname__", None) or repr(transform)
    normal = [[float(value) for value in values] for values in (encoder.mean, encoder.std)]
    data = _with_labels(dataset, getattr(dataset, "stamp", dataset.fingerprint)())
    return {"weights": weights_fingerprint(encoder), "transform": f"{said} {normal}", "data": data, "precision": precision}


def _with_labels(dataset, images: str) -> str:
    digest = hashlib.sha256(images.encode())
    if dataset.labels is not None:
        digest.update(torch.as_tensor(dataset.labels).to(torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def _collect(encoder, dataset, names: Sequence[str], rows: Tensor, *, precision: str, **options):
    """Features of some rows: ({name: [m, ...]}, index int64 [m], corrupt); nothing but empty tensors where no image is readable."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    index, corrupt = [torch.zeros(0, dtype=torch.int64)], {}
    prefix = getattr(getattr(encoder, "backbone", None), "num_prefix", 1)
    for numbers, _, features in stream(encoder, dataset, rows=rows, precision=precision, corrupt=corrupt, **requests(names), **options):
        index.append(numbers)
        for name in names:
            found[name].append(rows_of(name, features, prefix).to(PRECISIONS[precision]).cpu())
    return {name: torch.cat(parts) if parts else torch.zeros(0, dtype=PRECISIONS[precision]) for name, parts in found.items()}, torch.cat(index), corrupt


def _last(term: str) -> tuple[str | None, int]:
    """cls4 -> ("cls", 4), cls -> ("cls", 1), anything else -> (None, 0)."""
    kind = term.rstrip("0123456789")
    return (kind, int(term[len(kind) :] or 1)) if kind in ("cls", "mean") else (None, 0)


def _takes_two(view: Callable) -> bool:
    """Whether a view wants the index beside the image."""
    import inspect

    try:
        kinds = [each for each in inspect.signature(view).parameters.values() if each.default is each.empty]
    except (TypeError, ValueError):
        return False
    return sum(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in kinds) > 1


def _plain(value) -> bool:
    return value is None or isinstance(value, (bool, int, float, str)) or isinstance(value, (tuple, torch.Size)) and all(map(_plain, value))


def _share(n: int, world, batch_size: int) -> Tensor:
    """This rank's places among n: whole batches go round the ranks, so that a batch holds the same images for any number of them."""
    rows = torch.arange(n)
    if world is None or world.size == 1:
        return rows
    return rows[rows // batch_size % world.size == world.rank]


def _gather(rows: dict[str, Tensor], index: Tensor, corrupt: dict, world, order: Tensor):
    """Everybody's rows, in the order given."""
    if world is not None and world.size > 1:
        shapes = {name: shape for some in world.gather_objects({name: tuple(part.shape[1:]) for name, part in rows.items() if part.ndim > 1}) for name, shape in some.items()}
        rows = {name: world.gather(part.reshape(len(index), *shapes[name])) if name in shapes else part for name, part in rows.items()}
        index = world.gather(index)
        corrupt = {name: reason for some in world.gather_objects(corrupt) for name, reason in some.items()}
    sorted_rows, back = torch.sort(order)
    place = torch.argsort(back[torch.searchsorted(sorted_rows, index)])
    if torch.equal(place, torch.arange(len(place))):
        return rows, index, corrupt
    return {name: part[place] for name, part in rows.items()}, index[place], corrupt


def _some(index: Tensor, dataset, corrupt: dict) -> None:
    if not len(index):
        first = next(iter(corrupt.items()), None)
        raise UserError(f"none of the {len(dataset)} images can be read" + (f" ({first[0]}: {first[1]})" if first else "") + "; give images")
