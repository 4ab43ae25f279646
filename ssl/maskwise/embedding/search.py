"""Search of the images of an embedding file that are nearest to given images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from maskwise.embedding.pages import Figure, page
from maskwise.embedding.reader import Embeddings
from maskwise.engine.atomic_file import write_atomic
from maskwise.evaluation.features import extract
from maskwise.evaluation.knn import nearest


class Queries:
    """Given images as a dataset."""

    labels = None

    def __init__(self, images: Sequence[Tensor], names: Sequence[str]):
        self.images, self.names = images, names

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        """Return one image."""
        return self.images[index]

    def name(self, index: int) -> str:
        """Return the name of one image."""
        return self.names[index]


@dataclass(frozen=True)
class Neighbors:
    """The nearest rows of an embedding file for each query: cosine [Q, k], rows int64 [Q, k]."""

    queries: Queries
    embeddings: Embeddings
    cosine: Tensor
    rows: Tensor

    def table(self) -> list[dict]:
        """Return the neighbors of each query, nearest first."""
        paths, labels = self.embeddings.paths, self.embeddings.labels
        return [
            {
                "query": self.queries.name(q),
                "neighbors": [
                    {
                        "rank": rank,
                        "cosine": round(cosine, 6),
                        "row": row,
                        "path": paths[row],
                        **({} if labels is None else {"label": int(labels[row])}),
                    }
                    for rank, (cosine, row) in enumerate(zip(self.cosine[q].tolist(), self.rows[q].tolist()), 1)
                ],
            }
            for q in range(len(self.queries))
        ]


def search(encoder, queries: Queries, embeddings: Embeddings, feature: str, k: int = 10) -> Neighbors:
    """Return the k rows of largest cosine for each query, by exact search; equal cosines in the order of the rows.

    The queries are embedded with the precision of the file.
    """
    options = {"precision": embeddings.meta["precision"], "batch_size": 32}
    values, _, _ = extract.extract_rows(encoder, queries, [feature], torch.arange(len(queries)), **options)
    cosine, rows = nearest(embeddings.vectors, values[feature].float(), min(k, len(embeddings)))
    order = torch.argsort(rows, dim=1)  # equal cosines in the order of the rows
    cosine, rows = cosine.gather(1, order), rows.gather(1, order)
    order = torch.argsort(cosine, dim=1, descending=True, stable=True)
    return Neighbors(queries, embeddings, cosine.gather(1, order), rows.gather(1, order))


def write_page(found: Neighbors, path: Path, title: str) -> None:
    """Write queries and neighbors as an HTML page with thumbnails."""
    sections = []
    for q, entry in enumerate(found.table()):
        figures = [Figure(found.queries.image(q), ["the image searched for"], marked=True)]
        for item in entry["neighbors"]:
            label = f", label {item['label']}" if "label" in item else ""
            lines = [item["path"], f"{item['rank']}: {item['cosine']:.4f}{label}"]
            figures.append(Figure(found.embeddings.picture(item["row"]), lines))
        sections.append((entry["query"], figures))
    meta = found.embeddings.meta
    remark = f"Nearest of {len(found.embeddings)} images by the cosine of {meta['name']}'s vectors."
    write_atomic(path, page(title, [remark], sections))
