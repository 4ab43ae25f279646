"""Pictures of a classification: accuracy of each class, who is taken for whom, nearest neighbours, a map of the features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.evaluation.knn import knn_classify, nearest
from maskwise.evaluation.metrics import confusion
from maskwise.functional import draw, plots
from maskwise.functional.errors import UserError

GOOD, BAD = (38, 133, 78), (200, 40, 40)


def class_pictures(train, test, data: dict, uncoloured, *, feature: str = "pooled", k: int = 20, shown: int = 8, neighbours: int = 7) -> dict[str, np.ndarray]:
    """All four for banks of two labelled sets (features.extract) -> {"classes", "confusion", "neighbours", "map"}, uint8 [H, W, 3]."""
    names = names_of(data["test"], int(max(train.labels.max(), test.labels.max())) + 1)
    predicted = knn_classify(train[feature], train.labels, test[feature], min(k, len(train)), num_classes=len(names))[:, 0].cpu()
    table = confusion(predicted, test.labels, len(names))
    accuracy = 100 * table.diag().double() / table.sum(1).clamp(min=1)
    overall = 100 * float((predicted == test.labels).double().mean())
    rows = torch.arange(min(shown, len(test))) * len(test) // min(shown, len(test))
    return {
        "classes": plots.bars(accuracy.numpy(), names, f"k-nn top-1 of each class (all {overall:.1f})"),
        "confusion": plots.matrix(table.numpy(), names, f"k-nn, k = {min(k, len(train))}: who is taken for whom"),
        "neighbours": neighbour_sheet(train, test, data, rows, uncoloured, feature=feature, count=neighbours),
        "map": feature_map(test[feature], test.labels, names),
    }


def neighbour_sheet(train, test, data: dict, rows: Tensor, uncoloured, *, feature: str = "pooled", count: int = 7) -> np.ndarray:
    """One row a test image: itself, then its nearest training images, framed green where the class is the same -> uint8 [H, W, 3]."""
    _, index = nearest(train[feature], test[feature][rows], min(count, len(train)))
    sheet = []
    for row, near in zip(rows.tolist(), index.tolist()):
        pictures = [look(data["test"], int(test.index[row]), uncoloured)]
        for one in near:
            same = int(train.labels[one]) == int(test.labels[row])
            pictures.append(plots.framed(look(data["train"], int(train.index[one]), uncoloured), GOOD if same else BAD))
        sheet.append(pictures)
    return draw.sheet(sheet, ["image", *(f"nearest {i + 1}" for i in range(min(count, len(train))))])


def feature_map(features: Tensor, labels: Tensor, names: Sequence[str], method: str = "pca", limit: int = 2000) -> np.ndarray:
    """L2-normalised features on a plane: the first two principal axes, or t-SNE (scikit-learn) -> uint8 [H, W, 3].

    At most `limit` evenly spread images are drawn. Raises UserError for another method and where scikit-learn is absent.
    """
    if method not in ("pca", "tsne"):
        raise UserError(f"no map method {method!r}; choose pca or tsne")
    rows = torch.arange(min(limit, len(features))) * len(features) // min(limit, len(features))
    centred = F.normalize(features[rows].float(), dim=1)
    centred = centred - centred.mean(dim=0)
    if method == "pca":
        _, _, axes = torch.linalg.svd(centred, full_matrices=False)
        points = (centred @ axes[:2].T).numpy() if len(axes) > 1 else np.zeros((len(rows), 2))
    else:
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            raise UserError("a t-SNE map needs scikit-learn: pip install 'maskwise[eval]', or method=pca") from None
        points = TSNE(init="pca", random_state=0, perplexity=min(30.0, max(1.0, len(rows) / 4))).fit_transform(centred.numpy())
    return plots.scatter(points, labels[rows].numpy(), names, f"features of {len(rows)} images, {'principal axes' if method == 'pca' else 't-SNE'}")


def look(dataset, index: int, uncoloured) -> np.ndarray:
    """What the encoder sees of one image, as uint8 [H, W, 3]."""
    return uncoloured(dataset.image(index)).permute(1, 2, 0).numpy()


def names_of(dataset, count: int) -> list[str]:
    """Class names, or numbers where there are none."""
    known = list(getattr(dataset, "classes", None) or ())
    return [known[i] if i < len(known) else str(i) for i in range(count)]
