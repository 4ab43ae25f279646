"""Test recipes with ResNet, ConvNeXt and Swin: keys, masks, continued runs with batch norm."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import maskwise
from maskwise.engine.trainer import Trainer
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe

SMALL = (
    "data.count=24",
    "train.epochs=2",
    "train.save_every=2",
    "evaluate.pictures_every=0",
    "evaluate.knn_every=0",
    "head.norm=batch",
    "pooling=simpool",
    "train.log_every=1",
)
RESNET = (
    "method=dino",
    "masking=none",
    "backbone=resnet18",
    "backbone.layers=[1, 1, 1]",
    "backbone.channels=[4, 8, 8]",
    "backbone.small_stem=true",
)
SWIN = (
    "backbone=swin_tiny_patch4_window7_224",
    "backbone.embed_dim=4",
    "backbone.depths=[2, 1]",
    "backbone.num_heads=[1, 2]",
    "backbone.patch_size=4",
    "backbone.window_size=2",
)


def tiny(*overrides):
    return read_recipe("debug/tiny", *overrides)


def refused(*overrides):
    with pytest.raises(UserError) as caught:
        tiny(*overrides)
    return str(caught.value)


def test_family_reads_only_its_own_keys():
    recipe = tiny(*SMALL, *RESNET)
    assert not {"backbone.patch_size", "backbone.class_token", "backbone.position", "backbone.embed_dim"} & set(
        recipe.values
    )
    assert recipe.backbone.keywords()["small_stem"] is True and recipe.backbone.keywords()["channels"] == (4, 8, 8)
    assert "backbone.position=size cannot be set: resnet18 has no position table" in refused(
        *SMALL, *RESNET, "backbone.position=size"
    )
    assert "backbone.patch_size=4 cannot be set: resnet18 has no patch size" in refused(
        *SMALL, *RESNET, "backbone.patch_size=4"
    )
    assert tiny(*SMALL, *RESNET, "backbone.patch_size=null").backbone.keywords()["patch_size"] is None
    text = refused(*SMALL, *RESNET, "backbone.position_=1")
    assert "nothing reads this key" in text and text.endswith(
        "section backbone accepts name, image_size, drop_path, weights and the arguments of timm's ResNet"
    )


@pytest.mark.parametrize("masking", ["random", "block", "attmask_hint"])
def test_masking_on_a_convnet_is_refused_when_the_recipe_is_read(masking):
    words = [word for word in RESNET if "masking" not in word]
    assert "resnet18 has no patch tokens to mask: choose a Vision Transformer or a Swin, or masking none" in refused(
        *SMALL, *words, f"masking={masking}"
    )


def test_attmask_on_swin_needs_a_pooling_with_attention():
    assert tiny(*SMALL, *SWIN).masking.name == "attmask_hint"
    assert "`attmask_hint` hides what the teacher attends to, and pooling `gap` has no attention" in refused(
        *SMALL, *SWIN, "pooling=gap"
    )
    assert "needs a class token and swin_tiny_patch4_window7_224 has none: choose" in refused(
        *SMALL, *SWIN, "pooling=cls"
    )


def test_unsupported_crop_sizes_are_refused_when_the_recipe_is_read():
    words = [word for word in RESNET if "small_stem" not in word]
    assert "images of 12x12 pixels are smaller than the stride 16 of resnet18" in refused(
        *SMALL, *words, "crops.local_size=12"
    )
    assert tiny(*SMALL, *words, "crops.local_size=12", "crops.local_number=0").crops.local_number == 0


@pytest.mark.parametrize("network", [RESNET, SWIN], ids=["resnet", "swin"])
def test_run_with_batch_norm_continues_bit_equal_and_loads(network, tmp_path, monkeypatch):
    recipe, step = tiny(*SMALL, *network), Trainer.step
    assert maskwise.train(recipe, out=tmp_path / "whole", quiet=True)["status"] == "complete"

    def interrupted(trainer, *arguments, **options):
        if trainer.step_index == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert maskwise.train(recipe, out=tmp_path / "parts", quiet=True)["status"] == "preempted"
    torch.manual_seed(99)
    assert maskwise.train(recipe, out=tmp_path / "parts", quiet=True)["status"] == "complete"
    states = []
    for run in ("whole", "parts"):
        last = tmp_path / run / "checkpoints" / (tmp_path / run / "checkpoints" / "last").read_text().strip()
        states.append(
            {
                f"{part}/{key}": value
                for part in ("model", "optimizer")
                for key, value in load_file(last / f"{part}.safetensors").items()
            }
        )
    assert states[0].keys() == states[1].keys() and not [
        key for key in states[0] if not torch.equal(states[0][key], states[1][key])
    ]
    statistics = {key for key in states[0] if "running_var" in key}
    assert {key.split("/")[1].split(".")[0] for key in statistics} == {"student", "teacher"}
    encoder = maskwise.load(tmp_path / "whole").eval()
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, states[0][f"model/teacher.encoder.{key}"]), key
    assert encoder(torch.zeros(2, 3, 32, 32)).pooled.shape == (2, encoder.dim)


def test_simpool_on_resnet_has_the_reference_init():
    """W_Q and W_K are uniform in +-1/sqrt(D) on a ResNet and truncated normal with std .02 elsewhere (SimPool code)."""
    from maskwise import build

    encoder = build.encoder(
        tiny(
            *SMALL,
            *(word for word in RESNET if "patch_size" not in word and "channels" not in word),
            "backbone.channels=[8, 8, 256]",
        )
    )
    weight = encoder.pooling.wq.weight
    assert weight.abs().max() <= 256**-0.5 and weight.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.02)
    encoder = build.encoder(tiny(*SMALL, *SWIN, "backbone.embed_dim=32"))
    assert encoder.pooling.wq.weight.std().item() == pytest.approx(0.02, rel=0.1)
