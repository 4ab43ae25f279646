"""Distribution of the logits of a classifier's tokens (MAP, fig. 5)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.functional.metrics import group_scatter
from maskwise.imaging.charts import scatter_chart

PICTURED = 100  # images whose tokens are drawn, evenly spaced


def token_logits(encoder, network, dataset, world=None, batch_size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (index [b], logits float64 [b, groups, tokens, classes]) of this rank's images, the last one empty.

    network: a classifier with tokens, see nn.classifiers; its encoder is given.
    """
    rows = extract.rank_share(len(dataset), world, batch_size)
    stream = extract.stream(encoder, dataset, rows=rows, batch_size=batch_size, layers=network.layers)
    with extract.evaluating(network), torch.no_grad():
        for index, _, features in stream:
            yield index, network.token_logits(features).double().cpu().unflatten(1, (network.groups, -1))
    empty = torch.zeros(0, network.groups, network.tokens // network.groups, network.classes, dtype=torch.float64)
    yield torch.zeros(0, dtype=torch.int64), empty


def distribution(encoder, network, dataset, world=None, batch_size: int = 64) -> tuple[dict, dict, dict]:
    """Measure the spread of the tokens' logits within and between groups -> numbers, curves, protocol.

    Curves: points in the plane of the two directions of largest variance, for PICTURED images. Raises UserError if no
    image can be read.
    """
    drawn = torch.arange(min(PICTURED, len(dataset))) * len(dataset) // max(1, min(PICTURED, len(dataset)))
    scatters, kept = [], []
    for index, logits in token_logits(encoder, network, dataset, world, batch_size):
        scatters.append(torch.stack(group_scatter(logits), dim=1))
        chosen = torch.isin(index, drawn)
        kept.append((index[chosen], logits[chosen]))
    table, index, logits = torch.cat(scatters), *(torch.cat(part) for part in zip(*kept))
    if world is not None:
        table, index, logits = world.gather(table), world.gather(index), world.gather(logits)
    if not len(table):
        raise UserError(f"none of the {len(dataset)} images can be read; give images")
    within, between = table.mean(dim=0).tolist()
    curves = {name: [tuple(point) for point in points.tolist()] for name, points in plane(logits[index.argsort()])}
    about = {"groups": network.groups, "tokens_per_group": network.tokens // network.groups, "images": len(table)}
    return {"logit_within": within, "logit_between": between}, curves, {"logits": {**about, "drawn": len(index)}}


def plane(logits: Tensor) -> list[tuple[str, Tensor]]:
    """Project logits [n, G, T, C], less those of each image's mean token, on their two main directions.

    Returns [("logits_group_1", [n T, 2]), ..., ("logits_centers", [G, 2], means over images)].
    """
    centered = logits - logits.mean(dim=(1, 2), keepdim=True)
    _, _, axes = torch.linalg.svd(centered.flatten(0, 2), full_matrices=False)
    axes = axes[:2] * torch.where(axes[:2].sum(dim=1) < 0, -1.0, 1.0)[:, None]  # the sign of a direction is free
    points = torch.nn.functional.pad(centered @ axes.T, (0, 2 - len(axes)))
    groups = [(f"logits_group_{g + 1}", group.flatten(0, 1)) for g, group in enumerate(points.unbind(1))]
    return [*groups, ("logits_centers", points.mean(dim=(0, 2)))]


def chart(name: str, curves: dict) -> np.ndarray | None:
    """Draw the tokens of an analysis, the centers of the groups and the joint logits; None without them."""
    groups = [points for key, points in curves.items() if key.startswith("logits_group_")]
    if not groups:
        return None
    labels = [g for g, points in enumerate(groups) for _ in points]
    triangles = {"center of a group": curves["logits_centers"], "joint logits": [(0.0, 0.0)]}
    return scatter_chart(
        [point for points in groups for point in points],
        labels,
        [f"group {g + 1}" for g in range(len(groups))],
        f"logits of single tokens, {name}",
        triangles=triangles,
    )
