"""Video object segmentation: labels of the first frame propagated by the similarity of patch tokens."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from maskwise.bounds import Count, NonNegativeInt, Positive
from maskwise.data.benchmark_sets import davis
from maskwise.engine.atomic_file import write_error
from maskwise.errors import UserError
from maskwise.evaluation.features import extract, views
from maskwise.evaluation.protocol import Options
from maskwise.evaluation.report import Report, cost, joint_hash
from maskwise.functional.metrics import boundary_f, jaccard
from maskwise.functional.precision import at_least_float32
from maskwise.imaging.indexed_png import write_indexed_png
from maskwise.imaging.resize import resize_bilinear

SHORT_SIDE, WIDTH_UNIT = 480, 64
IMAGENET_STD, PROTOCOL_STD = (0.229, 0.224, 0.225), (0.228, 0.224, 0.225)  # the first as in the released script
_CELLS = 1 << 25  # similarities at a time: 128 MiB of float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoOptions(Options):
    """Options of video object segmentation.

    previous: frames before the target that vote, beside the first; radius: half the window of patches, 0 for the whole
    frame; topk: votes of a patch; short_side: of the frames, in pixels; masks: a folder for the predicted masks,
    indexed PNG as in DAVIS.
    """

    evaluation = "video"

    previous: Count = 7
    radius: NonNegativeInt = 12
    topk: Count = 5
    temperature: Positive = 0.1
    short_side: Count = SHORT_SIDE
    masks: object = None


PUBLISHED = {"previous": 7, "radius": 12, "topk": 5, "temperature": 0.1, "short_side": SHORT_SIDE}


def read(folder) -> dict:
    """Read a folder in the layout of DAVIS -> {"test": sequences}, {} for any other folder."""
    return davis.read(folder) if davis.matches(Path(folder)) else {}


def video(encoder, data: dict, world=None, **options) -> Report:
    """Propagate the first masks of videos data["test"] and score J and F against the others -> Report, in per cent.

    options: those of `VideoOptions`. Means, recalls and decays are over objects, not videos; those of each object are
    in the protocol under `objects`. Ranks share the videos. Raises UserError for data that are no videos with masks.
    """
    begin, chosen = time.perf_counter(), VideoOptions(**options)
    sequences = data["test"]
    if not isinstance(sequences, Sequence) or not all(isinstance(entry, davis.Sequence) for entry in sequences):
        raise UserError(
            "video: these are no videos; give test=FOLDER in the layout of DAVIS, with JPEGImages/480p, "
            "Annotations/480p and ImageSets"
        )
    corrupt: dict[str, str] = {}
    scores: dict[str, dict[str, float]] = {}
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    for sequence in sequences[rank::size]:
        predicted = predicted_masks(encoder, sequence, chosen, corrupt)
        if chosen.masks:
            write_masks(Path(str(chosen.masks)).expanduser() / sequence.name, sequence, predicted)
        truth = [sequence.mask(i).to(torch.uint8) for i in range(len(predicted))]
        for label, per_frame in object_scores(predicted, truth).items():
            scores[f"{sequence.name}_{label}"] = {
                f"{name}_{kind}": 100 * value
                for name, values in per_frame.items()
                for kind, value in statistics(values).items()
            }
    if world is not None:
        scores = {name: row for part in world.gather_objects(scores) for name, row in part.items()}
        corrupt = {name: reason for part in world.gather_objects(corrupt) for name, reason in part.items()}
    if not scores:
        raise UserError("video: no video has an object and more than two frames; give the whole dataset")
    device, patch = next(encoder.parameters()).device, views.patch_of(encoder)
    frames = sum(len(sequence.frames) for sequence in sequences)
    return Report(
        numbers=object_means(scores),
        protocol={
            "evaluation": "video",
            "preset": "dino",
            **{name: getattr(chosen, name) for name in PUBLISHED},
            "patch": list(patch),
            "videos": len(sequences),
            "frames": frames,
            "objects": {name: scores[name] for name in sorted(scores)},
            "differences": [
                f"{name}={getattr(chosen, name):g} instead of {value:g}"
                for name, value in PUBLISHED.items()
                if getattr(chosen, name) != value
            ],
        },
        data_hash=joint_hash(*(sequence.frames.fingerprint() for sequence in sequences)),
        cost=cost(begin, frames, device),
        corrupt=corrupt,
    )


def propagate_labels(
    target: Tensor,
    context: Tensor,
    context_labels: Tensor,
    grid: tuple[int, int],
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Tensor:
    """Propagate labels to the patches of a frame by cosine similarity (DINO, section 4.2.2, after Jabri et al. 2020).

    target [N, D], context [C, N, D], context_labels [C, K, h, w], grid (h, w) -> [K, h, w]. A vote of a context patch
    weighs exp(cosine / temperature), within a square window of `radius` patches (0: everywhere). Each target patch
    takes the mean of its `topk` largest votes over all context frames together, equal ones included. Features are
    normalized here; memory beyond the result is bounded.
    """
    height, width = grid
    unit = F.normalize(at_least_float32(target), dim=-1)
    sources = F.normalize(at_least_float32(context), dim=-1).flatten(0, 1)  # [C N, D]
    labels = context_labels.to(sources.dtype).transpose(0, 1).reshape(context_labels.shape[1], -1)  # [K, C N]
    y, x = (place.flatten() for place in torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij"))
    y, x = y.to(unit.device), x.to(unit.device)
    parts = []
    for rows in torch.arange(len(unit), device=unit.device).split(max(1, _CELLS // max(1, len(sources)))):
        votes = torch.exp(unit[rows] @ sources.T / temperature)
        if radius:
            inside = ((y[rows, None] - y).abs() <= radius) & ((x[rows, None] - x).abs() <= radius)
            votes = votes * inside.repeat(1, len(context))
        least = votes.topk(min(topk, votes.shape[1]), dim=1).values[:, -1:]
        votes = torch.where(votes >= least, votes, 0)
        parts.append(labels @ (votes / votes.sum(dim=1, keepdim=True)).T)
    return torch.cat(parts, dim=1).reshape(-1, height, width)


def predicted_masks(encoder, sequence, chosen: VideoOptions, corrupt: dict) -> list[Tensor]:
    """Propagate the first mask of a video -> uint8 [H, W] object ids of every frame, the first mask unchanged.

    The first frame and the last `previous` ones vote, with the soft labels that they got.
    Raises UserError for a frame that cannot be read.
    """
    first = sequence.mask(0).to(torch.uint8)
    predicted, anchor = [first], None
    queue: collections.deque = collections.deque(maxlen=chosen.previous)
    for patches, grid, size in frame_tokens(encoder, sequence, chosen.short_side, corrupt):
        if anchor is None:
            anchor = patches, patch_labels(first, grid).to(patches)
            continue
        context, labels = zip(anchor, *queue)
        soft = propagate_labels(
            patches,
            torch.stack(context),
            torch.stack(labels),
            grid,
            radius=chosen.radius,
            topk=chosen.topk,
            temperature=chosen.temperature,
        )
        queue.append((patches, soft))
        predicted.append(hard_labels(soft, size, tuple(first.shape)))
    if len(predicted) != len(sequence.frames):
        reason = next((f": {name}: {text}" for name, text in corrupt.items()), "")
        raise UserError(f"video: {sequence.name} has frames that cannot be read{reason}; unpack the dataset again")
    return predicted


def frame_tokens(
    encoder, sequence, short_side: int, corrupt: dict
) -> Iterator[tuple[Tensor, tuple[int, int], tuple[int, int]]]:
    """Yield the normalized patch tokens [N, D] of each frame, their grid and the size (h, w) of the resized frame."""
    view = ResizedFrame(short_side, views.patch_of(encoder), tuple(encoder.mean), tuple(encoder.std))
    for _, images, features in extract.stream(encoder, sequence.frames, view=view, batch_size=1, corrupt=corrupt):
        yield features.patches[0], features.grid, tuple(images.shape[-2:])


@dataclasses.dataclass(frozen=True)
class ResizedFrame:
    """Resize the short side, the long one down to a multiple of 64 pixels, and normalize with the script's deviation.

    Patches that do not divide 64 pixels make both sides multiples of their own.
    """

    short_side: int
    patch: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Tensor, index: int) -> Tensor:
        size = self.size(tuple(image.shape[-2:]))
        std = PROTOCOL_STD if self.std == IMAGENET_STD else self.std
        mean, deviation = (torch.tensor(values).reshape(-1, 1, 1) for values in (self.mean, std))
        return (resize_bilinear(image, size).float() / torch.iinfo(image.dtype).max - mean) / deviation

    def size(self, old: tuple[int, int]) -> tuple[int, int]:
        """Return the size (h, w) of a resized frame."""
        unit = [WIDTH_UNIT if WIDTH_UNIT % patch == 0 else patch for patch in self.patch]
        short = self.short_side // max(self.patch) * max(self.patch)
        height, width = old
        if height > width:
            return short * height // width // unit[0] * unit[0], short
        return short, short * width // height // unit[1] * unit[1]


def patch_labels(ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return object ids [H, W] on the grid by nearest pixel, one-hot: float32 [K, h, w].

    K is the largest id that is left plus 1: an object that vanishes at this size is lost, as in the released script.
    """
    height, width = grid
    small = Image.fromarray(ids.to(torch.uint8).numpy()).resize((width, height), Image.Resampling.NEAREST)
    return F.one_hot(torch.from_numpy(np.array(small)).long()).permute(2, 0, 1).float()


def hard_labels(soft: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Return the object ids of soft labels [K, h, w] at the original size: uint8 [H, W].

    Labels are interpolated to `size`, each scaled to 0..1, and the largest is taken; ids are resized by nearest pixel.
    """
    large = F.interpolate(soft[None], size=size, mode="bilinear", align_corners=False)[0]
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    ids = ((large - low) / torch.where(high > low, high - low, 1)).argmax(dim=0)
    picture = Image.fromarray(ids.cpu().numpy().astype(np.uint8))
    picture = picture.resize((original[1], original[0]), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(picture))


def object_scores(predicted: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[int, dict[str, list[float]]]:
    """Score masks of object ids, [H, W] for each frame, without the first and last frame -> {id: {"j", "f"}}.

    Objects are 1 to the largest id of the first true mask; one that is not predicted scores as an empty mask.
    Raises UserError for predicted ids beyond these.
    """
    count = int(truth[0].max())
    most = max(int(ids.max()) for ids in predicted)
    if most > count:
        raise UserError(
            f"video: predicted masks have object {most}, and the first mask has {count}; give ids 1 to {count}"
        )
    inner = range(1, len(truth) - 1)
    return {
        label: {
            name: [score(predicted[i] == label, truth[i] == label) for i in inner]
            for name, score in (("j", jaccard), ("f", boundary_f))
        }
        for label in range(1, count + 1)
        if len(inner)
    }


def statistics(values: Sequence[float]) -> dict[str, float]:
    """Return mean, recall (share of frames above 0.5) and decay of an object's scores (DAVIS, section 4.1).

    Decay is the mean of the first quarter of frames minus that of the last; a frame between quarters is in both.
    """
    scores = np.asarray(values, dtype=np.float64)
    edges = np.round(np.linspace(1, len(scores), 5) + 1e-10).astype(int) - 1
    first, last = scores[edges[0] : edges[1] + 1], scores[edges[3] : edges[4] + 1]
    return {
        "mean": float(scores.mean()),
        "recall": float((scores > 0.5).mean()),
        "decay": float(first.mean() - last.mean()),
    }


def object_means(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the means over objects of their scores, `jf_mean` being that of both means."""
    names = [f"{metric}_{kind}" for metric in ("j", "f") for kind in ("mean", "recall", "decay")]
    means = {name: float(np.mean([row[name] for row in scores.values()])) for name in names}
    return {"jf_mean": (means["j_mean"] + means["f_mean"]) / 2, **means}


def write_masks(folder: Path, sequence, predicted: Sequence[Tensor]) -> None:
    """Write the masks of a video as `<frame>.png`. Raises UserError if they cannot be written."""
    try:
        for path, ids in zip(sequence.masks, predicted):
            write_indexed_png(folder / path.name, ids.numpy())
    except OSError as error:
        raise UserError(write_error(f"the masks in {folder}", error)) from None
