"""Evaluations: (encoder, data, world, **options) -> Report."""

from maskwise.data.benchmark_sets import boxed, copydays, in9, revisited
from maskwise.evaluation import (
    attentive,
    backgrounds,
    clustering,
    copy_detection,
    discovery,
    few_shot,
    finetune,
    knn,
    linear,
    localization,
    logistic,
    mask_overlap,
    masked,
    recall,
    retrieval,
    robustness,
    top1,
    video,
)
from maskwise.evaluation.dense import (
    detection,
    knn_segmentation,
    label_sets,
    linear_segmentation,
    unsupervised_segmentation,
)
from maskwise.evaluation.multi_token import analysis
from maskwise.evaluation.protocol import Evaluation

TEST = ("test",)
LABEL_MAPS = {"train": label_sets.read_train, "test": label_sets.read}

EVALUATIONS = {
    "knn": Evaluation(knn.knn, knn.KNNOptions),
    "few_shot": Evaluation(few_shot.few_shot, few_shot.FewShotOptions),
    "linear": Evaluation(linear.linear, linear.LinearOptions),
    "logistic": Evaluation(logistic.logistic, logistic.LogisticOptions),
    "attentive": Evaluation(attentive.attentive, attentive.AttentiveOptions),
    "finetune": Evaluation(finetune.finetune, finetune.FinetuneOptions),
    "clustering": Evaluation(clustering.clustering, clustering.ClusteringOptions, TEST),
    "backgrounds": Evaluation(backgrounds.backgrounds, backgrounds.BackgroundsOptions, (), readers={"test": in9.read}),
    "masked": Evaluation(masked.masked, masked.MaskedOptions, TEST),
    "analysis": Evaluation(analysis.analysis, analysis.AnalysisOptions, TEST, labels=False),
    "robustness": Evaluation(robustness.robustness, robustness.RobustnessOptions, TEST),
    "recall": Evaluation(recall.recall, recall.RecallOptions, TEST, readers={"test": recall.read}),
    "retrieval": Evaluation(retrieval.retrieval, retrieval.RetrievalOptions, (), readers={"test": revisited.read}),
    "copy_detection": Evaluation(
        copy_detection.copy_detection, copy_detection.CopyDetectionOptions, (), readers={"test": copydays.read}
    ),
    "localization": Evaluation(
        localization.localization, localization.LocalizationOptions, TEST, labels=False, readers={"test": boxed.read}
    ),
    "discovery": Evaluation(
        discovery.discovery, discovery.DiscoveryOptions, TEST, labels=False, readers={"test": boxed.read}
    ),
    "mask_overlap": Evaluation(
        mask_overlap.mask_overlap, mask_overlap.MaskOverlapOptions, TEST, labels=False, readers={"test": boxed.read}
    ),
    "top1": Evaluation(top1.top1, top1.Top1Options, TEST),
    "linear_segmentation": Evaluation(
        linear_segmentation.linear_segmentation,
        linear_segmentation.LinearSegmentationOptions,
        labels=False,
        readers=LABEL_MAPS,
    ),
    "knn_segmentation": Evaluation(
        knn_segmentation.knn_segmentation, knn_segmentation.KNNSegmentationOptions, labels=False, readers=LABEL_MAPS
    ),
    "unsupervised_segmentation": Evaluation(
        unsupervised_segmentation.unsupervised_segmentation,
        unsupervised_segmentation.UnsupervisedSegmentationOptions,
        TEST,
        labels=False,
        readers=LABEL_MAPS,
    ),
    "detection": Evaluation(
        detection.detection, detection.DetectionOptions, labels=False, readers={"test": detection.read}
    ),
    "video": Evaluation(video.video, video.VideoOptions, TEST, labels=False, readers={"test": video.read}),
}
