"""A supervised MAP run, whole and light, through the verbs."""

import pytest
import torch
from maskwise import build, verbs
from maskwise.functional.errors import UserError
from maskwise.labelled import classifier_of
from maskwise.recipe import read_recipe

SMALL = ("data.count=16", "train.epochs=1", "train.steps=2", "train.batch_size=4", "optimizer.warmup_epochs=0", "evaluate.top1_every=0")
MAP = ("classifier=map", "classifier.dim=16", "classifier.tokens=2", "classifier.heads=2", "classifier.gram_groups=2")


def test_a_map_run_is_scored_whole_and_light(tmp_path):
    build.train(read_recipe("debug/tiny_supervised", *SMALL, *MAP), tmp_path / "run", quiet=True)
    encoder = verbs.layouts.load(tmp_path / "run")
    whole, light = (classifier_of(tmp_path / "run", encoder, light=light) for light in (False, True))
    kept = {key: value for key, value in whole.state_dict().items() if ".head.heads." not in key}
    assert kept.keys() == light.state_dict().keys() and len(kept) < len(whole.state_dict())
    assert all(torch.equal(value, kept[key]) for key, value in light.state_dict().items())
    seen = torch.randn(3, 3, 32, 32)
    assert not torch.allclose(whole.eval()(seen), light.eval()(seen))
    report = verbs.evaluate("top1", tmp_path / "run", light=True)
    assert report.protocol["classifier"] == "the run's own, light" and set(report.numbers) == {"top1", "top5"}
    tokens = verbs.evaluate("analysis", tmp_path / "run", parts=["tokens"])
    assert len(tokens.curves["token_error"]) == 4 and (tmp_path / "run" / "reports" / "analysis_tokens.png").is_file()


def test_light_is_for_map_alone(tmp_path):
    build.train(read_recipe("debug/tiny_supervised", *SMALL), tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="classifier linear of .* has no light form"):
        verbs.evaluate("top1", tmp_path / "run", light=True)
