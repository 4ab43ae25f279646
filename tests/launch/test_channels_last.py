"""The comparison of memory layouts: both sides are the same network, and the ratio is that of their times."""

import json
import statistics

import pytest
import torch

from launch.reproduce import channels_last
from maskwise.distributed.world import World
from maskwise.recipe.reading import read_recipe

TINY = ("data.size=48", "backbone.channels=[16,16,16,16]", "backbone.layers=[1,1,1,1]", "train.batch_size=4")


def test_both_sides_have_the_same_weights_in_two_layouts():
    recipe = read_recipe(channels_last.RECIPE, *channels_last.COMMON, *TINY)
    both = channels_last.trainers(recipe, World.start())
    last, contiguous = (
        dict(both[name].method.student.encoder.backbone.named_parameters())
        for name in (channels_last.CHANNELS_LAST, channels_last.CONTIGUOUS)
    )
    kernels = [
        name for name, weight in last.items() if weight.ndim == 4 and weight.shape[1] > 1 and weight.shape[2] > 1
    ]
    assert len(kernels) > 4
    for name, weight in last.items():
        assert torch.equal(weight, contiguous[name])
        if name in kernels:
            assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
            assert contiguous[name].is_contiguous()


@pytest.mark.parametrize("name", channels_last.CASES)
def test_every_network_is_a_valid_recipe(name):
    recipe = read_recipe(channels_last.RECIPE, *channels_last.COMMON, *channels_last.CASES[name])
    assert recipe.masking.name == "none" and not recipe.learns_labels


def test_the_ratio_is_that_of_the_medians(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(channels_last, "CASES", {"tiny": TINY})
    assert channels_last.main(["--steps", "2", "--json", str(tmp_path / "cl.json")]) == 0
    stored = json.loads((tmp_path / "cl.json").read_text())
    found, times = stored["networks"]["tiny"], stored["networks"]["tiny"]["cpu_seconds"]
    assert all(len(part) == stored["steps"] == 2 for part in times.values())
    assert found["ratio"] == pytest.approx(
        statistics.median(times["contiguous"]) / statistics.median(times["channels_last"])
    )
    assert found["first_loss"]["contiguous"] == pytest.approx(found["first_loss"]["channels_last"], rel=0.02)
    assert f"tiny: channels-last {found['ratio']:.2f} times as fast" in capsys.readouterr().out
