"""Unsupervised object discovery: LOST, DINO-seg and TokenCut boxes, scored by CorLoc."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.bounds import Count, Fraction, NonNegativeInt
from maskwise.data.benchmark_sets import boxed
from maskwise.errors import UserError
from maskwise.evaluation.features import extract, views
from maskwise.evaluation.features.fingerprints import fingerprint
from maskwise.evaluation.protocol import Options, as_tuple
from maskwise.evaluation.report import Report, cost
from maskwise.functional.attention import patch_attention
from maskwise.functional.metrics import corloc
from maskwise.nn.pooling import SimPool
from maskwise.nn.tokens import Features

METHODS = ("lost", "dino_seg", "token_cut")
SOURCES = ("keys", "pooling", "patches")
DINO_SEG_HEAD = 4  # of ViT-S/16, as published
CELLS = 1 << 24  # affinities at a time: 128 MiB of float64


@dataclasses.dataclass
class LostResult:
    """Result of LOST: box float [4], seed, expanded int64 [n] (the seeds of the expansion), mask bool [N].

    The mask holds all patches similar to the expanded seeds, of which the box surrounds the seed's component.
    """

    box: Tensor
    seed: int
    expanded: Tensor
    mask: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscoveryOptions(Options):
    """Options of discovery.

    methods: lost, dino_seg and token_cut, by default those that the encoder allows; source of the features: "keys" of
    the last block, "pooling" (the keys of SimPool) or "patches" (CNNs), by default pooling for SimPool, else keys, else
    patches; k: seeds of LOST; mass: share of the attention that DINO-seg keeps; head: its head, by default 4 of a class
    token with more heads than that, else the mean; tau: least cosine of TokenCut's graph; hard: count truncated and
    difficult objects; long_side: larger images are downscaled, which bounds the memory.
    """

    evaluation = "discovery"

    methods: str | Sequence[str] = ()
    source: str | None = None
    k: Count = 100
    mass: Fraction = 0.6
    head: NonNegativeInt | None = None
    tau: float = 0.2
    hard: bool = True
    long_side: Count = 1024


def discovery(encoder, data: dict, world=None, **options) -> Report:
    """Find one box per image of data["test"] by each method -> Report, CorLoc in per cent.

    data["test"]: images with `.boxes(i)` or `.box(i)`; those without objects are left out. options: those of
    `DiscoveryOptions`. Images keep their size (batch size 1) and are padded with zeros to whole patches after
    normalization. `whole_image` is the CorLoc of the whole image as the box. Ranks share the images. Raises UserError
    for unknown methods, features or attention that the encoder does not have, and images without boxes.
    """
    begin, chosen = time.perf_counter(), DiscoveryOptions(**options)
    test, device = data["test"], next(encoder.parameters()).device
    methods, source = methods_of(encoder, chosen, test), source_of(encoder, chosen)
    padded, view = Padded(encoder, source), views.Native(chosen.long_side)
    boxes, index, corrupt, downscaled = [], [torch.zeros(0, dtype=torch.int64)], {}, 0
    for number, images, features in extract.stream(
        padded,
        test,
        rows=extract.rank_share(len(test), world, 1),
        view=view,
        batch_size=1,
        corrupt=corrupt,
        attention="dino_seg" in methods,
        keys=True,
    ):
        original, size = view.sizes.pop(int(number)), tuple(images.shape[-2:])
        patch = tuple(side / cells for side, cells in zip(padded.padded(size), features.grid))
        found = found_boxes(encoder, features, size, patch, chosen, methods)
        found["whole_image"] = torch.tensor([0.0, 0.0, size[1], size[0]])
        factor = torch.tensor([whole / shown for whole, shown in zip(original, size)][::-1] * 2, dtype=torch.float64)
        boxes.append(torch.stack([box.double() for box in found.values()]) * factor)
        index.append(number)
        downscaled += original != size
    names = [*names_of(methods), "whole_image"]
    boxes = torch.stack(boxes) if boxes else torch.zeros(0, len(names), 4, dtype=torch.float64)
    index = torch.cat(index)
    if world is not None and world.size > 1:
        boxes, index = world.gather(boxes), world.gather(index)
        corrupt = {name: reason for part in world.gather_objects(corrupt) for name, reason in part.items()}
        downscaled = sum(world.gather_objects(downscaled))
    extract.require_images(len(index), test, corrupt)
    truth = [boxed.boxes_of(test, i, hard=chosen.hard) for i in index.tolist()]
    larger = [f"{downscaled} images downscaled to {chosen.long_side} pixels"] if downscaled else []
    return Report(
        numbers={name: corloc(boxes[:, column], truth) for column, name in enumerate(names)},
        protocol={
            "evaluation": "discovery",
            "metric": "CorLoc, IoU of at least .5 with any object",
            "methods": list(methods),
            "source": source,
            "k": chosen.k,
            "mass": chosen.mass,
            "head": chosen.head,
            "tau": chosen.tau,
            "hard": chosen.hard,
            "differences": ["equal degrees of LOST rank by index, where the toolkit sorts unstably", *larger],
            "images": sum(len(boxes) > 0 for boxes in truth),
        },
        data_hash=fingerprint(test),
        cost=cost(begin, len(index), device),
        corrupt=corrupt,
    )


def methods_of(encoder, chosen: DiscoveryOptions, test) -> tuple[str, ...]:
    """Return the methods, by default those that the encoder allows.

    Raises UserError for unknown ones and for images without boxes, before any image is read.
    """
    gives_attention = getattr(getattr(encoder, "pooling", None), "gives_attention", False)
    methods = as_tuple(chosen.methods) or tuple(name for name in METHODS if name != "dino_seg" or gives_attention)
    if unknown := [name for name in methods if name not in METHODS]:
        raise UserError(f"discovery: no method {unknown[0]!r}; choose from {', '.join(METHODS)}")
    if not boxed.has_boxes(test):
        raise UserError(
            "discovery needs images with boxes; give test=FOLDER in the layout of VOC (VOCdevkit/VOC2007), COCO, CUB "
            "or the lists of wsolevaluation"
        )
    return methods


def names_of(methods: Sequence[str]) -> list[str]:
    """Return the numbers of the methods, in order: DINO-seg has two."""
    return [name for method in methods for name in (method, f"{method}_faithful")[: 1 + (method == "dino_seg")]]


def source_of(encoder, chosen: DiscoveryOptions) -> str:
    """Return the source of an encoder's features. Raises UserError for one that it does not have."""
    has_keys = getattr(getattr(encoder, "backbone", None), "stage_dims", ()) is None
    has_pooling = isinstance(getattr(encoder, "pooling", None), SimPool)
    possible = {"pooling": has_pooling, "keys": has_keys, "patches": True}
    if chosen.source is None:
        return next(name for name, has in possible.items() if has)
    if chosen.source not in SOURCES or not possible[chosen.source]:
        there = ", ".join(name for name, has in possible.items() if has)
        raise UserError(f"discovery: no features source={chosen.source}; this encoder has {there}")
    return chosen.source


class Padded(nn.Module):
    """An encoder of images padded right and below to whole patches, whose `Features.keys` are those of a source."""

    def __init__(self, encoder, source: str):
        super().__init__()
        self.encoder, self.source = encoder, source
        self.mean, self.std, self.dim, self.transform = encoder.mean, encoder.std, encoder.dim, encoder.transform

    def forward(self, images: Tensor, *, attention: bool = False, keys: bool = True) -> Features:
        """Map normalized images [B, C, H, W] to Features of the padded images."""
        height, width = self.padded(tuple(images.shape[-2:]))
        images = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
        if self.source == "pooling":
            tokens = self.encoder.backbone(images)
            if self.encoder.norm_order == "before":
                tokens.patches = self.encoder.norm(tokens.patches)
            pooled = self.encoder.pooling(tokens)
            found = self.encoder.pooling.keys(tokens.patches)
            return Features(pooled.vector, tokens.patches, pooled.attention, tokens.grid, found)
        if self.source == "keys":
            return self.encoder(images, attention=attention, keys=True)
        features = self.encoder(images, attention=attention)
        return dataclasses.replace(features, keys=F.layer_norm(features.patches, features.patches.shape[1:]))

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size (height, width) of an image with its padding."""
        backbone = getattr(self.encoder, "backbone", None)
        divisor = getattr(getattr(backbone, "family", None), "divisor", None)
        units = [max(unit, divisor(backbone) if divisor else 1) for unit in views.patch_of(self.encoder)]
        return tuple(-(-side // unit) * unit for side, unit in zip(size, units))


def found_boxes(encoder, features, size: tuple[int, int], patch: tuple[float, float], chosen, methods) -> dict:
    """Return the box of each method for one image of `size` (height, width), float [4] by name."""
    boxes = {}
    if "lost" in methods:
        boxes["lost"] = lost_box(features.keys[0], features.grid, patch, size, chosen.k).box
    if "dino_seg" in methods:
        attention = chosen_attention(encoder, features.attention, chosen.head)
        for name, faithful in (("dino_seg", False), ("dino_seg_faithful", True)):
            boxes[name] = dino_seg_box(attention, features.grid, patch, chosen.mass, faithful)
    if "token_cut" in methods:
        boxes["token_cut"] = token_cut_box(features.keys[0], features.grid, patch, size, chosen.tau)
    return {name: boxes[name] for name in names_of(methods)}


def chosen_attention(encoder, attention: Tensor | None, head: int | None) -> Tensor:
    """Return the attention of DINO-seg on one image, [1, H, N] -> [N]. Raises UserError for a head that is missing."""
    if attention is None:
        raise UserError("discovery: this encoder's pooling computes no attention; leave dino_seg out of methods")
    heads = attention.shape[1]
    if head is None and "cls_attention" in encoder.pooling.needs and heads > DINO_SEG_HEAD:
        head = DINO_SEG_HEAD
    if head is not None and head >= heads:
        raise UserError(f"discovery: there is no head {head}; this attention has heads 0 to {heads - 1}")
    return patch_attention(attention, encoder.pooling.k)[0] if head is None else attention[0, head]


def lost_box(keys: Tensor, grid, patch_size, image_size: tuple[int, int], k: int = 100) -> LostResult:
    """Return the box of LOST (Simeoni et al. 2021, sec. 3): keys [N, D] on a grid (h, w), image (height, width).

    The degree of a patch is the number of others with a positive dot product. The seed has the lowest degree (ties by
    index); of the k patches of lowest degree those similar to it are the expanded seeds; the mask holds the patches
    whose summed products with these are positive; the box surrounds the seed's 4-connected component, x0, y0, x1, y1
    with exclusive maxima, cut at the image. patch_size: pixels, or (height, width). A seed that is a zero vector finds
    nothing: the box is empty. Raises UserError without SciPy.
    """
    keys = keys.double()
    degree = torch.cat([(rows @ keys.T > 0).sum(dim=1) for rows in keys.split(max(1, CELLS // len(keys)))])
    degree -= (keys.square().sum(dim=1) > 0).to(degree.dtype)  # without the patch itself
    order = degree.argsort(stable=True)
    seed, candidates = order[0], order[:k]
    expanded = candidates[keys[candidates] @ keys[seed] > 0]
    mask = keys @ keys[expanded].sum(dim=0) > 0
    box = component_box(mask, int(seed), grid, patch_size, image_size)
    return LostResult(box, int(seed), expanded, mask)


def dino_seg_box(attention: Tensor, grid, patch_size, mass: float = 0.6, faithful: bool = False) -> Tensor:
    """Return the box of DINO-seg: the largest component of the patches that hold `mass` of the attention [N].

    Patches in ascending order are dropped while their cumulated share is at most 1 - mass. Components are 4-connected;
    of equal ones the first in raster order counts. faithful=True repeats the published code (LOST toolkit), which
    cannot choose the last component, and takes the background if there is a single one. Box: float [4] as x0, y0, x1,
    y1, maxima exclusive, not cut at the image; empty if there is nothing to choose. Raises UserError without SciPy.
    """
    values, order = attention.double().sort(stable=True)
    kept = (values / values.sum()).cumsum(dim=0) > 1 - mass
    mask = torch.zeros_like(kept)
    mask[order] = kept
    labels, count = labeled(mask, grid)
    numbers = range(1, count + 1)
    if faithful:
        numbers = range(1, count) if count > 1 else range(count)
    chosen = max(numbers, key=lambda number: int((labels == number).sum()), default=None)
    if chosen is None:
        return torch.zeros(4)
    return box_around(labels == chosen, patch_size)


def token_cut_box(
    keys: Tensor, grid, patch_size, image_size: tuple[int, int], tau: float = 0.2, eps: float = 1e-5
) -> Tensor:
    """Return the box of TokenCut (Wang et al. 2022, sec. 3): keys [N, D] on a grid (h, w), image (height, width).

    A normalized cut of the graph with edges 1 where the cosine exceeds tau, else eps: the second generalized
    eigenvector is split at its mean; the object is the side of its largest absolute entry, the box that entry's
    4-connected component, cut at the image. Raises UserError without SciPy.
    """
    keys = F.normalize(keys.double(), dim=1)
    vector = second_eigenvector(torch.where(keys @ keys.T > tau, 1.0, eps).double())
    seed = int(vector.abs().argmax())
    above = vector > vector.mean()
    return component_box(above == above[seed], seed, grid, patch_size, image_size)


def second_eigenvector(weights: Tensor) -> Tensor:
    """Return the second smallest solution x of (D - W) x = lambda D x for symmetric weights [N, N] -> float64 [N].

    Its sign is that of LAPACK. Raises UserError without SciPy.
    """
    linalg = scipy_part("linalg")
    scale = weights.sum(dim=1).rsqrt()
    normalized = torch.eye(len(weights), dtype=torch.float64, device=weights.device) - scale[:, None] * weights * scale
    if len(weights) < 2:
        return torch.ones(len(weights), dtype=torch.float64, device=weights.device)
    _, vectors = linalg.eigh(normalized.cpu().numpy(), subset_by_index=[1, 1], overwrite_a=True)
    return torch.from_numpy(vectors[:, 0].copy()).to(weights.device) * scale


def component_box(mask: Tensor, seed: int, grid, patch_size, image_size: tuple[int, int]) -> Tensor:
    """Return the box of the seed's 4-connected component, float [4], cut at the image; empty if it is not inside."""
    if not mask[seed]:
        return torch.zeros(4)
    labels, _ = labeled(mask, grid)
    box = box_around(labels == labels.flatten()[seed], patch_size)
    height, width = image_size
    return torch.minimum(box, torch.tensor([width, height, width, height], dtype=box.dtype))


def labeled(mask: Tensor, grid) -> tuple[Tensor, int]:
    """Number the 4-connected components of a mask bool [N] from 1, in raster order -> int64 [h, w], their count."""
    labels, count = scipy_part("ndimage").label(mask.cpu().numpy().reshape(tuple(grid)))
    return torch.from_numpy(labels).long(), count


def box_around(inside: Tensor, patch_size) -> Tensor:
    """Return the box of patches bool [h, w] in pixels, float [4], maxima exclusive; empty without patches."""
    rows, columns = inside.nonzero(as_tuple=True)
    if not len(rows):
        return torch.zeros(4)
    height, width = (patch_size, patch_size) if isinstance(patch_size, (int, float)) else patch_size
    corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    return torch.tensor([float(corner) * side for corner, side in zip(corners, (width, height) * 2)])


def scipy_part(name: str):
    """Return a module of SciPy. Raises UserError where it is not installed."""
    try:
        from scipy import linalg, ndimage

        return {"linalg": linalg, "ndimage": ndimage}[name]
    except ImportError:
        raise UserError("discovery needs SciPy: pip install 'maskwise[eval]'") from None
