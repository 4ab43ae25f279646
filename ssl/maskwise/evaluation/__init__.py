"""Evaluations: (encoder, data, world, **options) -> Report, each a function of extracted features."""

from maskwise.evaluation import knn, linear

EVALUATIONS = {"knn": knn.knn, "linear": linear.linear}
