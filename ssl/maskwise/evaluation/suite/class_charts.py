"""Pictures of a classification: accuracy by class, confusion matrix, nearest neighbors, feature map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.data.class_matching import class_names
from maskwise.errors import UserError
from maskwise.evaluation.knn import knn_classify, nearest
from maskwise.evaluation.scoring.library_metrics import confusion
from maskwise.evaluation.suite.attention_sheets import visible
from maskwise.imaging import drawing
from maskwise.imaging.charts import bar_chart, confusion_chart, scatter_chart

SAME_CLASS, OTHER_CLASS = (38, 133, 78), (200, 40, 40)


def class_pictures(
    train, test, data: dict, uint8_crop, *, feature: str = "pooled", k: int = 20, shown: int = 8, neighbors: int = 7
) -> dict[str, np.ndarray]:
    """Draw all four pictures of two labeled feature banks -> {"classes", "confusion", "neighbors", "map"}.

    train and test: the banks of data["train"] and data["test"], whose classes are numbered alike (`labeled_sets`).
    """
    names = class_titles(data["train"], int(max(train.labels.max(), test.labels.max())) + 1)
    k = min(k, len(train))
    ranking = knn_classify(train[feature], train.labels, test[feature], k, num_classes=len(names))
    predicted = ranking[:, 0].cpu()
    table = confusion(predicted, test.labels, len(names))
    accuracy = 100 * table.diag().double() / table.sum(1).clamp(min=1)
    overall = 100 * float((predicted == test.labels).double().mean())
    shown = min(shown, len(test))
    rows = torch.arange(shown) * len(test) // shown
    return {
        "classes": bar_chart(accuracy.numpy(), names, f"k-NN top-1 by class (%), overall {overall:.1f}"),
        "confusion": confusion_chart(table.numpy(), names, f"confusion matrix of k-NN, k = {k}"),
        "neighbors": neighbor_sheet(train, test, data, rows, uint8_crop, feature=feature, count=neighbors),
        "map": feature_map(test[feature], test.labels, names),
    }


def neighbor_sheet(
    train, test, data: dict, rows: Tensor, uint8_crop, *, feature: str = "pooled", count: int = 7
) -> np.ndarray:
    """Draw test images with their nearest training images, framed green for the same class, else red -> [H, W, 3]."""
    count = min(count, len(train))
    _, index = nearest(train[feature], test[feature][rows], count)
    sheet = []
    for row, neighbors in zip(rows.tolist(), index.tolist()):
        pictures = [cropped(data["test"], int(test.index[row]), uint8_crop)]
        for neighbor in neighbors:
            same = int(train.labels[neighbor]) == int(test.labels[row])
            picture = cropped(data["train"], int(train.index[neighbor]), uint8_crop)
            pictures.append(drawing.framed(picture, SAME_CLASS if same else OTHER_CLASS))
        sheet.append(pictures)
    return drawing.sheet(sheet, ["image", *(f"nearest {i + 1}" for i in range(count))])


def feature_map(
    features: Tensor, labels: Tensor, names: Sequence[str], method: str = "pca", limit: int = 2000
) -> np.ndarray:
    """Draw L2-normalized features in the plane by PCA or t-SNE (scikit-learn) -> uint8 [H, W, 3].

    At most `limit` evenly spaced images are drawn. Raises UserError for another method or without scikit-learn.
    """
    if method not in ("pca", "tsne"):
        raise UserError(f"no map method {method!r}; choose pca or tsne")
    limit = min(limit, len(features))
    rows = torch.arange(limit) * len(features) // limit
    centered = F.normalize(features[rows].float(), dim=1)
    centered = centered - centered.mean(dim=0)
    if method == "pca":
        _, _, axes = torch.linalg.svd(centered, full_matrices=False)
        points = (centered @ axes[:2].T).numpy() if len(axes) > 1 else np.zeros((len(rows), 2))
        title = f"features of {len(rows)} images (PCA)"
    else:
        points = tsne(centered)
        title = f"features of {len(rows)} images (t-SNE)"
    return scatter_chart(points, labels[rows].numpy(), names, title)


def tsne(centered: Tensor) -> np.ndarray:
    """Embed [n, D] in the plane by t-SNE -> [n, 2]. Raises UserError without scikit-learn."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("a t-SNE map needs scikit-learn: pip install 'maskwise[eval]', or method=pca") from None
    perplexity = min(30.0, max(1.0, len(centered) / 4))
    return TSNE(init="pca", random_state=0, perplexity=perplexity).fit_transform(centered.numpy())


def cropped(dataset, index: int, uint8_crop) -> np.ndarray:
    """Return the encoder's crop of one image, uint8 [H, W, 3]."""
    return visible(uint8_crop(dataset.image(index))[None])[0].permute(1, 2, 0).numpy()


def class_titles(dataset, count: int) -> list[str]:
    """Return the class names; a class without a name gets its number."""
    names = class_names(dataset) or []
    return [names[i] if i < len(names) else str(i) for i in range(count)]
