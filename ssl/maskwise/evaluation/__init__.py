"""Evaluations: (encoder, data, world, **options) -> Report, each a function of extracted features."""

from maskwise.evaluation import attentive, finetune, knn, linear, logistic

EVALUATIONS = {
    "knn": knn.knn,
    "linear": linear.linear,
    "logistic": logistic.logistic,
    "attentive": attentive.attentive,
    "finetune": finetune.finetune,
}
