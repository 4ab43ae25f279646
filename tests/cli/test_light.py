"""A supervised MAP run, whole and light, through the verbs."""

import json

import pytest
import torch
from safetensors.torch import load_file

import maskwise
from maskwise import api, build
from maskwise.build.classifiers import classifier_of
from maskwise.cli.main import main
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe

SMALL = (
    "data.count=16",
    "train.epochs=1",
    "train.steps=2",
    "train.batch_size=4",
    "optimizer.warmup_epochs=0",
    "evaluate.top1_every=0",
)
MAP = ("classifier=map", "classifier.dim=16", "classifier.tokens=2", "classifier.heads=2", "classifier.gram_groups=2")


def test_map_run_is_evaluated_full_and_light(tmp_path):
    build.train(read_recipe("debug/tiny_supervised", *SMALL, *MAP), tmp_path / "run", quiet=True)
    encoder = maskwise.load(tmp_path / "run")
    whole, light = (classifier_of(tmp_path / "run", encoder, light=light) for light in (False, True))
    without_token_heads = {key: value for key, value in whole.state_dict().items() if ".head.heads." not in key}
    assert without_token_heads.keys() == light.state_dict().keys() and len(without_token_heads) < len(
        whole.state_dict()
    )
    assert all(torch.equal(value, without_token_heads[key]) for key, value in light.state_dict().items())
    seen = torch.randn(3, 3, 32, 32)
    assert not torch.allclose(whole.eval()(seen), light.eval()(seen))
    report = api.evaluate("top1", tmp_path / "run", light=True)
    assert report.protocol["classifier"] == "the run's own, light" and set(report.numbers) == {"top1", "top5"}
    tokens = api.evaluate("analysis", tmp_path / "run", parts=["tokens"])
    assert len(tokens.curves["token_error"]) == 4 and (tmp_path / "run" / "reports" / "analysis_tokens.png").is_file()


def test_light_requires_map(tmp_path):
    build.train(read_recipe("debug/tiny_supervised", *SMALL), tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="classifier linear of .* has no light form"):
        api.evaluate("top1", tmp_path / "run", light=True)
    with pytest.raises(UserError, match="classifier linear of .* has no light form"):
        maskwise.export(tmp_path / "run", tmp_path / "out", light=True, say=None)
    assert not (tmp_path / "out").exists()
    maskwise.export(tmp_path / "run", tmp_path / "out", say=None)
    here, there = (api.evaluate("top1", tmp_path / name, test=scored_images()).numbers for name in ("run", "out"))
    assert here == there
    card = (tmp_path / "out" / "README.md").read_text()
    count = json.loads((tmp_path / "out" / "config.json").read_text())["maskwise"]["classifier"]["count"]
    assert f"Its classifier `linear` of {count} classes is in `classifier.safetensors`" in card


def scored_images():
    """Labeled images."""
    return build.dataset(read_recipe("debug/tiny_supervised", *SMALL))


@pytest.fixture(scope="module")
def map_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("map") / "run"
    build.train(read_recipe("debug/tiny_supervised", *SMALL, *MAP), run, quiet=True)
    return run


def test_export_carries_its_full_or_light_classifier(map_run, tmp_path):
    """Logits of the exported folder equal those of the run; a light export has no token heads."""
    maskwise.export(map_run, tmp_path / "whole", say=None)
    assert main(["export", str(map_run), "--to", str(tmp_path / "light"), "--light"]) == 0
    maskwise.export(tmp_path / "whole", tmp_path / "lightened", light=True, say=None)  # an export of an export
    maskwise.export(tmp_path / "light", tmp_path / "again", say=None)
    seen, encoder = torch.randn(3, 3, 32, 32), maskwise.load(map_run)
    wanted = {light: classifier_of(map_run, encoder, light=light)(seen) for light in (False, True)}
    for name, light in (("whole", False), ("light", True), ("lightened", True), ("again", True)):
        folder = tmp_path / name
        names = set(load_file(folder / "classifier.safetensors"))
        assert (
            any(key.startswith("head.averaged_heads.") for key in names)
            and any(key.startswith("head.heads.") for key in names) != light
        )
        classifier = classifier_of(folder, maskwise.load(folder))
        assert torch.equal(classifier(seen), wanted[light]) and classifier.kind == "the run's own" + ", light" * light
        assert torch.equal(classifier_of(folder, maskwise.load(folder), light=True)(seen), wanted[True])
        of_folder, of_run = (
            api.evaluate("top1", folder, test=scored_images()),
            api.evaluate("top1", map_run, test=scored_images(), light=light),
        )
        assert of_folder.numbers == of_run.numbers and of_folder.protocol["classifier"] == of_run.protocol["classifier"]
    sizes = [(tmp_path / name / "classifier.safetensors").stat().st_size for name in ("light", "whole")]
    assert sizes[0] < sizes[1]


def test_light_without_a_classifier_is_a_one_line_error(map_run, tmp_path):
    encoder = maskwise.load(map_run)
    with pytest.raises(
        UserError,
        match="an encoder in memory has no classifier: light is for a supervised run with classifier map; leave it out",
    ):
        maskwise.export(encoder, tmp_path / "out", light=True, say=None)
    maskwise.export(encoder, tmp_path / "out", say=None)
    assert (
        not (tmp_path / "out" / "classifier.safetensors").exists() and classifier_of(tmp_path / "out", encoder) is None
    )
    assert "has no classifier" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="has no classifier: light is for a supervised run"):
        maskwise.export(tmp_path / "out", tmp_path / "other", light=True, say=None)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"name": "os.system"}, "unknown classifier 'os.system'; choose one of linear, map"),
        ({"count": 7, "classes": None}, "its classifier does not fit"),
        ({"count": "many"}, "does not describe an encoder that can be built"),
        ({"options": {"dim": 1 << 30}}, "dim=1073741824 is out of range"),
        ({"options": {"strange": 1}}, "strange"),
    ],
)
def test_inconsistent_exported_folder_is_a_one_line_error(map_run, tmp_path, change, words):
    maskwise.export(map_run, tmp_path / "out", say=None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["maskwise"]["classifier"] |= change
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words) as caught:
        classifier_of(tmp_path / "out", maskwise.load(tmp_path / "out"))
    assert "\n" not in str(caught.value)
