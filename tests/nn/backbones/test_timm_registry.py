"""Supported timm models: every model is checked on the meta device, and the counts are pinned."""

from collections import Counter

import pytest
import timm

from maskwise.errors import UserError
from maskwise.nn.backbones import timm_registry

PINNED = "1.0.31"
SUPPORTED = {
    "VisionTransformer": 188,
    "Eva": 65,
    "ResNet": 81,
    "ConvNeXt": 31,
    "SwinTransformer": 9,
    "PoolingVisionTransformer": 8,
    "MlpMixer": 12,
    "EfficientNet": 109,
    "MaxxVit": 27,
    "SwinTransformerV2": 12,
}
WHOLE = {  # models in the same files that run as a whole, because ...
    "its class is VisionTransformerDistilled": 4,
    "its blocks are ParallelThingsBlock": 2,
    "its blocks are ResPostBlock": 1,
    "its blocks are ParallelScalingBlock": 4,
    "its blocks are DiffParallelScalingBlock": 1,
    "its attention is DiffAttention": 2,
    "its blocks are SpatialGatingBlock": 3,
    "its blocks are MbConvBlock": 22,
    "its blocks are made of ConvNeXtBlock": 7,
    "its blocks are ConvNeXtBlock": 1,
    "its blocks are ParallelMaxxVitBlock": 1,
    "its blocks are CondConvResidual": 6,
    "timm cannot open it without downloading a ResNet for its stem": 4,
}
WHOLE_FILES = {  # files whose models all run as a whole
    "beit": 7,
    "byoanet": 15,
    "byobnet": 53,
    "cait": 10,
    "convit": 3,
    "convmixer": 3,
    "cpubone": 9,
    "csatv2": 2,
    "cspnet": 23,
    "cspnext": 5,
    "davit": 8,
    "deepseek_vit": 3,
    "densenet": 6,
    "dla": 12,
    "dpn": 7,
    "edgenext": 5,
    "efficientformer": 3,
    "efficientformer_v2": 4,
    "efficientvit_mit": 7,
    "efficientvit_msra": 6,
    "fasternet": 6,
    "fastvit": 12,
    "focalnet": 12,
    "gcvit": 5,
    "gemma4_vit": 4,
    "ghostnet": 10,
    "hardcorenas": 6,
    "hgnet": 10,
    "hiera": 8,
    "hieradet_sam2": 5,
    "hrnet": 11,
    "iformer": 9,
    "inception_next": 4,
    "inception_resnet_v2": 1,
    "inception_v3": 1,
    "inception_v4": 1,
    "lcnetv2": 3,
    "levit": 20,
    "lowformer": 8,
    "mambaout": 11,
    "metaformer": 18,
    "mobilenetv3": 33,
    "mobilenetv5": 3,
    "mobilevit": 10,
    "mvitv2": 8,
    "naflexvit": 14,
    "nasnet": 1,
    "nest": 6,
    "nextvit": 3,
    "nfnet": 36,
    "pnasnet": 1,
    "pvt_v2": 7,
    "qwen3_vit": 9,
    "rdnet": 4,
    "regnet": 36,
    "repghost": 8,
    "repvit": 8,
    "res2net": 9,
    "resnest": 8,
    "resnetv2": 20,
    "rexnet": 10,
    "selecsls": 5,
    "senet": 9,
    "sequencer": 3,
    "shvit": 4,
    "sknet": 5,
    "starnet": 7,
    "swiftformer": 4,
    "swin_transformer_v2_cr": 16,
    "tiny_vit": 5,
    "tnt": 3,
    "tresnet": 4,
    "twins": 6,
    "vgg": 8,
    "visformer": 2,
    "vision_transformer_relpos": 14,
    "vision_transformer_sam": 4,
    "volo": 11,
    "vovnet": 10,
    "xception": 1,
    "xception_aligned": 5,
    "xcit": 28,
}
REFUSED_FILES = {"coat": 8, "crossvit": 11, "efficientvim": 8}


def count_models():
    """Count models by the class of their family, and by the reason those that run as a whole."""
    supported, whole = Counter(), Counter()
    for name in timm_registry.candidate_names():
        model = timm_registry.build_shallow(name)
        reason = timm_registry.unsupported_reason(model)
        if reason is None:
            supported[type(model).__name__] += 1
        else:
            whole[reason] += 1
    return supported, whole


@pytest.mark.slow
def test_all_models_of_timm():
    supported, whole = count_models()
    assert set(supported) == set(SUPPORTED)
    if timm.__version__ == PINNED:
        assert dict(supported) == SUPPORTED
        assert dict(whole) == WHOLE
    else:  # other timm versions have other models, but no fewer of any class
        assert all(supported[kind] >= count for kind, count in SUPPORTED.items())


def test_count_of_all_files():
    """Of timm's models 542 run by blocks and 798 as a whole; the rest is refused with its reason."""
    others = Counter(map(timm_registry.timm_file, set(timm.list_models()) - set(timm_registry.candidate_names())))
    names = [name for name in timm.list_models() if timm_registry.refusal(name) is not None]
    assert timm_registry.REFUSED.keys() == {*REFUSED_FILES, *(name for name in names if name.startswith("vit_"))}
    assert all(timm.is_model(name) or name in REFUSED_FILES for name in timm_registry.REFUSED)
    counts = {
        "by blocks": sum(SUPPORTED.values()),
        "whole": sum(WHOLE.values()) - WHOLE[timm_registry.DOWNLOADS] + sum(WHOLE_FILES.values()),
        "refused": sum(REFUSED_FILES.values()) + WHOLE[timm_registry.DOWNLOADS],
    }
    assert counts == {"by blocks": 542, "whole": 798, "refused": 31} and sum(counts.values()) == 1371
    if timm.__version__ == PINNED:
        assert others == {**WHOLE_FILES, **REFUSED_FILES}
        assert len(timm.list_models()) == 1371 and len(names) == counts["refused"]


def test_a_model_that_cannot_run_is_refused_with_its_reason_and_an_alternative():
    for name, words in (
        ("coat_tiny", "the tokens of several scales"),
        ("crossvit_9_240", "the tokens of two patch sizes"),
        ("efficientvim_m1", "a list of maps"),
    ):
        with pytest.raises(
            UserError, match=f"^{name} is not supported: it returns {words}.*; the nearest is "
        ) as caught:
            timm_registry.build_timm_model(name, None, None, None, {})
        nearest = str(caught.value).rpartition(" ")[2]
        assert timm.is_model(nearest) and timm_registry.refusal(nearest) is None


def test_reason_for_running_whole():
    for name, words in (
        ("deit_tiny_distilled_patch16_224", "its class is VisionTransformerDistilled"),
        ("vit_small_resnet26d_224", "timm cannot open it without downloading a ResNet for its stem"),
        ("vit_small_patch16_18x2_224", "its blocks are ParallelThingsBlock"),
    ):
        assert timm_registry.unsupported_reason(timm_registry.build_shallow(name)) == words
