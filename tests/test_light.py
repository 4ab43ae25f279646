"""A supervised MAP run, whole and light, through the verbs."""

import json

import maskwise
import pytest
import torch
from maskwise import build, verbs
from maskwise.cli import main
from maskwise.functional.errors import UserError
from maskwise.labelled import classifier_of
from maskwise.recipe import read_recipe
from safetensors.torch import load_file

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
    with pytest.raises(UserError, match="classifier linear of .* has no light form"):
        maskwise.export(tmp_path / "run", tmp_path / "out", light=True, say=None)
    assert not (tmp_path / "out").exists()
    maskwise.export(tmp_path / "run", tmp_path / "out", say=None)
    here, there = (verbs.evaluate("top1", tmp_path / name, test=scored_images()).numbers for name in ("run", "out"))
    assert here == there
    card = (tmp_path / "out" / "README.md").read_text()
    count = json.loads((tmp_path / "out" / "config.json").read_text())["maskwise"]["classifier"]["count"]
    assert f"Its classifier `linear` of {count} classes stands in `classifier.safetensors`" in card


def scored_images():
    """Labelled images."""
    return build.dataset(read_recipe("debug/tiny_supervised", *SMALL))


@pytest.fixture(scope="module")
def map_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("map") / "run"
    build.train(read_recipe("debug/tiny_supervised", *SMALL, *MAP), run, quiet=True)
    return run


def test_an_export_carries_its_classifier_whole_or_light(map_run, tmp_path):
    """Logits of the folder alone are those of the run, bit for bit; of a light one the tokens' heads are not in the file."""
    maskwise.export(map_run, tmp_path / "whole", say=None)
    assert main(["export", str(map_run), "--to", str(tmp_path / "light"), "--light"]) == 0
    maskwise.export(tmp_path / "whole", tmp_path / "lightened", light=True, say=None)  # an export of an export
    maskwise.export(tmp_path / "light", tmp_path / "again", say=None)
    seen, encoder = torch.randn(3, 3, 32, 32), verbs.layouts.load(map_run)
    wanted = {light: classifier_of(map_run, encoder, light=light)(seen) for light in (False, True)}
    for name, light in (("whole", False), ("light", True), ("lightened", True), ("again", True)):
        folder = tmp_path / name
        names = set(load_file(folder / "classifier.safetensors"))
        assert any(key.startswith("head.averaged_heads.") for key in names) and any(key.startswith("head.heads.") for key in names) != light
        found = classifier_of(folder, verbs.layouts.load(folder))
        assert torch.equal(found(seen), wanted[light]) and found.kind == "the run's own" + ", light" * light
        assert torch.equal(classifier_of(folder, verbs.layouts.load(folder), light=True)(seen), wanted[True])
        of_folder, of_run = verbs.evaluate("top1", folder, test=scored_images()), verbs.evaluate("top1", map_run, test=scored_images(), light=light)
        assert of_folder.numbers == of_run.numbers and of_folder.protocol["classifier"] == of_run.protocol["classifier"]
    sizes = [(tmp_path / name / "classifier.safetensors").stat().st_size for name in ("light", "whole")]
    assert sizes[0] < sizes[1]


def test_light_of_what_has_no_classifier_is_one_line(map_run, tmp_path):
    encoder = verbs.layouts.load(map_run)
    with pytest.raises(UserError, match="an encoder in memory has no classifier: light is for a run that has learnt labels with classifier map; leave it out"):
        maskwise.export(encoder, tmp_path / "out", light=True, say=None)
    maskwise.export(encoder, tmp_path / "out", say=None)
    assert not (tmp_path / "out" / "classifier.safetensors").exists() and classifier_of(tmp_path / "out", encoder) is None
    assert "has no classifier" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="has no classifier: light is for a run"):
        maskwise.export(tmp_path / "out", tmp_path / "other", light=True, say=None)


@pytest.mark.parametrize("change, words", [
    ({"name": "os.system"}, "no classifier 'os.system'; there are linear, map"),
    ({"count": 7, "classes": None}, "its classifier does not fit"),
    ({"count": "many"}, "describes no encoder that can be built"),
    ({"options": {"dim": 1 << 30}}, "is of no network"),
    ({"options": {"strange": 1}}, "strange"),
])  # fmt: skip
def test_a_folder_that_tells_something_else_ends_in_one_line(map_run, tmp_path, change, words):
    maskwise.export(map_run, tmp_path / "out", say=None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["maskwise"]["classifier"] |= change
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words) as caught:
        classifier_of(tmp_path / "out", verbs.layouts.load(tmp_path / "out"))
    assert "\n" not in str(caught.value)
