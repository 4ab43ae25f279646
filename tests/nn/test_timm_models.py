"""Which of timm's models are backbones here: all of them asked, on the meta device, and the counts pinned."""

from collections import Counter

import pytest

from maskwise.functional.errors import UserError
from maskwise.nn import timm_models

import timm  # after maskwise.nn, which readies it

PINNED = "1.0.31"
SUPPORTED = {"VisionTransformer": 165, "Eva": 65}
REFUSED = {
    "its class is VisionTransformerDistilled": 4,
    "its blocks are ParallelThingsBlock": 2,
    "its blocks are ResPostBlock": 1,
    "its blocks are ParallelScalingBlock": 4,
    "its blocks are DiffParallelScalingBlock": 1,
    "its attention is DiffAttention": 2,
}
OTHER_FILES = 1127  # models of other families: convolutional, hierarchical, BEiT, XCiT ...


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
    assert set(supported) == {"VisionTransformer", "Eva"}
    if timm.__version__ == PINNED:
        assert dict(supported) == SUPPORTED
        assert dict(refused) == REFUSED
        assert len(timm.list_models()) - len(timm_models.candidates()) == OTHER_FILES
    else:  # another timm has other models, but should not lose any of a kind we know
        assert all(supported[kind] >= count for kind, count in SUPPORTED.items())


@pytest.mark.slow
def test_other_files_are_refused_without_being_built_and_name_one_that_is_not():
    for name in ("swin_tiny_patch4_window7_224", "convnext_tiny", "resnet50", "beit_base_patch16_224", "xcit_small_12_p16_224", "cait_s24_224"):
        with pytest.raises(UserError, match=f"{name} is not supported: its class is .*the nearest is ") as caught:
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
