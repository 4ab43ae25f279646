"""Which of timm's models are backbones here: all of them asked, on the meta device, and the counts pinned."""

from collections import Counter

import pytest

from maskwise.functional.errors import UserError
from maskwise.nn import timm_models

import timm  # after maskwise.nn, which readies it

PINNED = "1.0.31"
SUPPORTED = {"VisionTransformer": 165, "Eva": 65, "ResNet": 81, "ConvNeXt": 31, "SwinTransformer": 9, "PoolingVisionTransformer": 8, "MlpMixer": 12, "EfficientNet": 109, "MaxxVit": 27, "SwinTransformerV2": 12}
REFUSED = {
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
}
OTHER_FILES = {  # models of other families, by the file of timm that holds their classes
    "beit": 7, "byoanet": 15, "byobnet": 53, "cait": 10, "coat": 8, "convit": 3, "convmixer": 3, "cpubone": 9, "crossvit": 11,
    "csatv2": 2, "cspnet": 23, "cspnext": 5, "davit": 8, "deepseek_vit": 3, "densenet": 6, "dla": 12, "dpn": 7, "edgenext": 5, "efficientformer": 3,
    "efficientformer_v2": 4, "efficientvim": 8, "efficientvit_mit": 7, "efficientvit_msra": 6, "fasternet": 6, "fastvit": 12,
    "focalnet": 12, "gcvit": 5, "gemma4_vit": 4, "ghostnet": 10, "hardcorenas": 6, "hgnet": 10, "hiera": 8, "hieradet_sam2": 5, "hrnet": 11,
    "iformer": 9, "inception_next": 4, "inception_resnet_v2": 1, "inception_v3": 1, "inception_v4": 1, "lcnetv2": 3, "levit": 20, "lowformer": 8,
    "mambaout": 11, "metaformer": 18, "mobilenetv3": 33, "mobilenetv5": 3, "mobilevit": 10, "mvitv2": 8, "naflexvit":
    14, "nasnet": 1, "nest": 6, "nextvit": 3, "nfnet": 36, "pnasnet": 1, "pvt_v2": 7, "qwen3_vit": 9, "rdnet": 4, "regnet": 36, "repghost":
    8, "repvit": 8, "res2net": 9, "resnest": 8, "resnetv2": 20, "rexnet": 10, "selecsls": 5, "senet": 9, "sequencer": 3, "shvit": 4,
    "sknet": 5, "starnet": 7, "swiftformer": 4, "swin_transformer_v2_cr": 16, "tiny_vit": 5, "tnt":
    3, "tresnet": 4, "twins": 6, "vgg": 8, "visformer": 2, "vision_transformer_hybrid": 14, "vision_transformer_relpos": 14, "vision_transformer_sam":
    4, "vitamin": 13, "volo": 11, "vovnet": 10, "xception": 1, "xception_aligned": 5, "xcit": 28,
}  # fmt: skip


def asked():
    """Counts of supported and refused models of the files that hold our classes, refused by what keeps them out."""
    supported, refused = Counter(), Counter()
    for name in timm_models.candidates():
        model = timm_models.shallow(name)
        reason = timm_models.misfit(model)
        if reason is None:
            supported[type(model).__name__] += 1
        else:
            refused[reason] += 1
    return supported, refused


@pytest.mark.slow
def test_the_whole_list_is_asked():
    supported, refused = asked()
    assert set(supported) == set(SUPPORTED)
    if timm.__version__ == PINNED:
        assert dict(supported) == SUPPORTED
        assert dict(refused) == REFUSED
        others = set(timm.list_models()) - set(timm_models.candidates())
        assert Counter(timm_models.source(name).rpartition(".")[2] for name in others) == OTHER_FILES
    else:  # another timm has other models, but should not lose any of a kind we know
        assert all(supported[kind] >= count for kind, count in SUPPORTED.items())


@pytest.mark.slow
def test_other_files_are_refused_without_being_built_and_name_one_that_is_not():
    for name in ("swinv2_cr_tiny_224", "res2net50d", "regnety_004", "beit_base_patch16_224", "xcit_small_12_p16_224", "cait_s24_224"):
        with pytest.raises(UserError, match=f"{name} is not supported: its (class is|blocks are) .*the nearest is ") as caught:
            timm_models.build(name, None, None, None, {})
        nearest = str(caught.value).rpartition(" ")[2]
        assert timm_models.misfit(timm_models.shallow(nearest)) is None


def test_each_kind_of_refusal_says_what_it_is():
    for name, words in (
        ("deit_tiny_distilled_patch16_224", "its class is VisionTransformerDistilled"),
        ("vit_small_r26_s32_224", "its stem is HybridEmbed"),
        ("vit_small_patch16_18x2_224", "its blocks are ParallelThingsBlock"),
    ):
        assert timm_models.misfit(timm_models.shallow(name)) == words
