"""Evaluations: (encoder, data, world, **options) -> Report, each a function of extracted features."""

from maskwise.evaluation import knn

EVALUATIONS = {"knn": knn.knn}
