"""Exact search for pairs of similar rows, in blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.errors import UserError

BLOCK = 2048  # rows of each side of a block: 16 MiB of float32 similarities
SLACK = 1e-4  # by which products may differ between engines and blocks; pairs that near are computed again in float64
ENGINES = ("auto", "torch", "faiss")


def pairs_above(
    left: Tensor, right: Tensor | None, threshold: float, *, engine: str = "auto", device=None, block: int = BLOCK
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield all pairs of rows with a cosine of at least `threshold`, by left row, then by right row.

    left [n, D], right [m, D], or None for pairs i < j within `left`. Yields (i int64 [p], j int64 [p], cosine float64
    [p]) per block of left rows. The cosine is computed in float64 from float32 unit vectors, so that it depends neither
    on blocks nor on the engine: torch's matrix products, or faiss (by default where it is installed, on a CPU).
    Rows of zeros have no pairs.
    """
    left = unit(left)
    within = right is None
    right = left if within else unit(right)
    engine = chosen_engine(engine, device)
    search = faiss_search(right, threshold - SLACK) if engine == "faiss" else torch_search
    for start in range(0, len(left), block):
        rows = left[start : start + block]
        if engine == "faiss":
            i, j = search(rows)
        else:
            i, j = search(rows, right, threshold - SLACK, start if within else 0, device, block)
        i = i + start
        if within:
            keep = i < j
            i, j = i[keep], j[keep]
        order = torch.argsort(i * len(right) + j)
        i, j = i[order], j[order]
        cosine = row_products(left, i, right, j)
        keep = cosine >= threshold
        if bool(keep.any()):
            yield i[keep], j[keep], cosine[keep]


def row_products(left: Tensor, i: Tensor, right: Tensor, j: Tensor, at_a_time: int = 65536) -> Tensor:
    """Multiply rows i of `left` with rows j of `right` in float64 -> [p]."""
    parts = [(left[a].double() * right[b].double()).sum(dim=1) for a, b in zip(i.split(at_a_time), j.split(at_a_time))]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def torch_search(rows: Tensor, right: Tensor, least: float, first: int, device, block: int) -> tuple[Tensor, Tensor]:
    """Find pairs of rows [b, D] and right [m, D] from row `first` on whose product is at least `least`."""
    found_i, found_j = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    rows = rows.to(device) if device is not None else rows
    for start in range(first, len(right), block):
        part = right[start : start + block]
        part = part.to(device) if device is not None else part
        i, j = ((rows @ part.T) >= least).nonzero(as_tuple=True)
        found_i.append(i.cpu())
        found_j.append(j.cpu() + start)
    return torch.cat(found_i), torch.cat(found_j)


def faiss_search(right: Tensor, least: float):
    """Return a function that finds pairs of rows [b, D] and right [m, D] by faiss' exact range search."""
    import faiss  # of the extra embed

    index = faiss.IndexFlatIP(right.shape[1])
    index.add(np.ascontiguousarray(right.numpy()))

    def search(rows: Tensor) -> tuple[Tensor, Tensor]:
        limits, _, found = index.range_search(np.ascontiguousarray(rows.numpy()), float(least))
        counts = torch.from_numpy(np.diff(limits.astype(np.int64)))
        return torch.repeat_interleave(torch.arange(len(rows)), counts), torch.from_numpy(found.astype(np.int64))

    return search


def chosen_engine(engine: str, device=None) -> str:
    """Return "torch" or "faiss" for an engine's name. Raises UserError for another, and for one not installed."""
    if engine not in ENGINES:
        raise UserError(f"engine={engine} is unknown; choose {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    if engine == "auto" and device is not None and torch.device(device).type != "cpu":
        return "torch"
    if engine != "torch":
        try:
            import faiss  # noqa: F401

            return "faiss"
        except ImportError:
            if engine == "faiss":
                raise UserError(
                    "engine=faiss needs faiss: pip install faiss-cpu (extra embed), or leave engine out"
                ) from None
    return "torch"


def unit(rows: Tensor) -> Tensor:
    """Return rows [n, D] of length 1, float32; rows of zeros stay zero."""
    return F.normalize(rows.float(), dim=1)


def components(count: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Return the connected components with at least two members, each ascending, in the order of their first.

    count: of nodes; pairs: edges between them.
    """
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in pairs:
        a, b = root(a), root(b)
        parent[max(a, b)] = min(a, b)
    members: dict[int, list[int]] = {}
    for node in sorted({node for pair in pairs for node in pair}):
        members.setdefault(root(node), []).append(node)
    return list(members.values())
