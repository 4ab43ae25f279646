"""Evaluations: (encoder, data, world, **options) -> Report, each a function of extracted features."""

from maskwise.evaluation import (
    analysis, attentive, background, clustering, copy_detection, few_shot, finetune, knn, linear, logistic, masked, recall, retrieval, robustness,
    top1,
)  # fmt: skip

EVALUATIONS = {
    "knn": knn.knn,
    "few_shot": few_shot.few_shot,
    "linear": linear.linear,
    "logistic": logistic.logistic,
    "attentive": attentive.attentive,
    "finetune": finetune.finetune,
    "clustering": clustering.clustering,
    "backgrounds": background.backgrounds,
    "masked": masked.masked,
    "analysis": analysis.analysis,
    "robustness": robustness.robustness,
    "recall": recall.recall,
    "retrieval": retrieval.retrieval,
    "copy_detection": copy_detection.copy_detection,
    "top1": top1.top1,
}
