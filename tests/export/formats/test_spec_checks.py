"""Untrusted encoder descriptions: nothing is imported, opened or allocated, and an invalid one is a one-line error."""

import json
import shutil
import sys

import pytest

import maskwise
from maskwise import build, cli
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe

EVIL = "import pathlib; pathlib.Path(__file__).with_name('imported').write_text('yes')\nclass Evil: pass\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exported folder, in a folder with a module that leaves a file when imported."""
    place = tmp_path_factory.mktemp("specs")
    (place / "evil_code.py").write_text(EVIL)
    maskwise.export(build.encoder(read_recipe("debug/tiny")), place / "export", say=None)
    return place / "export"


def encoder(config):
    return config["maskwise"]["encoder"]


CHANGES = {
    "a pooling that is code": lambda c: encoder(c)["pooling"].update(name="evil_code:Evil"),
    "a pooling that is a function": lambda c: encoder(c)["pooling"].update(name="os:system"),
    "an unknown argument": lambda c: encoder(c)["pooling"].update(command="touch x"),
    "a backbone that is code": lambda c: encoder(c)["backbone"].update(name="evil_code:Evil"),
    "a backbone on the Hub": lambda c: encoder(c)["backbone"].update(name="hf-hub:evil/model"),
    "a local backbone": lambda c: encoder(c)["backbone"].update(name="local-dir:/tmp"),
    "a norm that is code": lambda c: encoder(c)["backbone"].update(norm_layer="evil_code:Evil"),
    "an activation that is code": lambda c: encoder(c)["backbone"].update(act_layer="os.system"),
    "blocks that are code": lambda c: encoder(c)["backbone"].update(block_fn="evil_code.Evil"),
    "a further file": lambda c: encoder(c)["backbone"].update(weights="/dev/zero"),
    "no backbone": lambda c: encoder(c).pop("backbone"),
    "no pooling": lambda c: encoder(c).pop("pooling"),
    "no mean": lambda c: encoder(c).pop("mean"),
    "a mean of words": lambda c: encoder(c).update(mean="abc"),
    "no dictionary": lambda c: encoder(c).update(backbone=5),
    "a billion blocks": lambda c: encoder(c)["backbone"].update(depth=10**9),
    "a billion wide": lambda c: encoder(c)["backbone"].update(embed_dim=3 * 10**9),
    "another width": lambda c: (
        encoder(c)["backbone"].update(embed_dim=49152),
        encoder(c)["pooling"].update(dim=49152),
    ),
    "no number": lambda c: encoder(c)["backbone"].update(depth="x"),
    "a depth that is none": lambda c: encoder(c)["backbone"].update(depth=float("nan")),
    "no crop": lambda c: encoder(c).update(crop_pct=0),
    "no encoder": lambda c: c["maskwise"].update(encoder=5),
    "neither teacher nor student": lambda c: c["maskwise"].update(weights="../x"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_export_is_not_trusted(exported, tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(str(exported.parent))
    folder = tmp_path / "bad"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text())
    CHANGES[name](config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        maskwise.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert "evil_code" not in sys.modules and not (exported.parent / "imported").exists()


def test_code_for_transformers_is_ignored(exported, tmp_path):
    folder = tmp_path / "hub"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(auto_map={"AutoModel": "evil_code.Evil"}, custom_pipelines={"x": {"impl": "evil_code.Evil"}})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil_code.py").write_text(EVIL)
    assert maskwise.load(folder).dim == maskwise.load(exported).dim
    assert not (folder / "imported").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["pooling"].update(name="evil_code:Evil"),
        lambda spec: spec["backbone"].update(depth=10**9),
        lambda spec: spec.pop("pooling"),
    ],
)
def test_a_run_folder_is_not_trusted(exported, tmp_path, monkeypatch, capsys, change):
    monkeypatch.syspath_prepend(str(exported.parent))
    words = [
        "data.count=64",
        "evaluate.knn_every=0",
        "train.steps=1",
        "optimizer.warmup_epochs=0",
        "teacher.warmup_temp_epochs=0",
    ]
    assert cli.main(["train", "debug/tiny", "--out", str(tmp_path / "run"), *words]) == 0
    file = next((tmp_path / "run" / "checkpoints").glob("step_*/encoder.json"))
    spec = json.loads(file.read_text())
    change(spec)
    file.write_text(json.dumps(spec))
    capsys.readouterr()
    assert cli.main(["evaluate", "knn", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "encoder.json" in error and "evil_code" not in sys.modules


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 10**9}},
        {"architecture": "vit_tiny_patch16_224", "model_args": {"weights": "/dev/zero"}},
        {"architecture": "vit_tiny_patch16_224", "model_args": {"norm_layer": "os.system"}},
        {"architecture": "hf-hub:evil/model"},
        {"architecture": "os:system"},
        {"architecture": "vit_tiny_patch16_224", "model_args": [1]},
    ],
)
def test_a_timm_folder_is_not_trusted(exported, tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(exported / "backbone.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        maskwise.load(tmp_path)
    assert "\n" not in str(caught.value)
