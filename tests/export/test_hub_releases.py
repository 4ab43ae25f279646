"""Repositories of other projects on the Hub: SimPool's ten self-supervised models, and pickled weights in general."""

import os
import pickle
import subprocess

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

import maskwise
from export.test_hub_repository import at, hub, no_network  # noqa: F401
from maskwise.errors import UserError
from maskwise.export import load
from maskwise.export.hub_encoder import HubEncoder
from maskwise.export.initial_model import InitialModel
from support.released_repositories import GAMMAS, OWNER, Released, saved
from support.research_files import prefixed, simpool, vit

X = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(3))


def fetched(hub, name=""):  # noqa: F811
    """Return the names of the downloaded files of a repository, or of all."""
    return {path.rpartition("/")[2] for _, path in hub.requests if path.startswith(f"/{name}") and "/resolve/" in path}


def assert_equal_features(encoder, released):
    with torch.no_grad():
        pooled = encoder(X).pooled
    torch.testing.assert_close(pooled.double(), released.vector(X), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", GAMMAS)
def test_simpools_released_models(hub, monkeypatch, capfd, name):  # noqa: F811
    released = Released(name)
    hub.add(f"{OWNER}/{name}", released.files())
    encoder = maskwise.load(f"{OWNER}/{name}")
    assert fetched(hub) == {"configs.yaml", f"{name}.pth"}
    assert "released model of this name" not in capfd.readouterr().err
    assert_equal_features(encoder, released)
    kinds = {"vit_small": "VisionTransformer", "resnet50": "ResNet", "convnext_small": "ConvNeXt"}
    assert encoder.backbone.kind == kinds[released.arch] and encoder.image_size == (224, 224)
    if released.arch == "vit_small":
        assert encoder.backbone.num_heads == 6 and encoder.backbone.patch_size == (16, 16)
        assert encoder.backbone.has_class_token == (released.mode == "official")
    if released.mode == "simpool":
        pooling = encoder.pooling
        assert pooling.gamma == released.gamma and pooling.num_heads == 1 and pooling.min_scope == "batch"
        assert (pooling.beta is not None) == (released.arch == "vit_small" and released.gamma is not None)
    requests = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with torch.no_grad():
        assert torch.equal(maskwise.load(f"hub:{OWNER}/{name}")(X).pooled, encoder(X).pooled)
    assert len(hub.requests) == requests


@pytest.mark.parametrize("name", [name for name, gamma in GAMMAS.items() if gamma != "official"])
def test_the_name_tells_gamma_where_no_file_does(hub, tmp_path, capfd, name):  # noqa: F811
    """configs.yaml of the first commits has no gamma, and their weights are called checkpoint.pth."""
    released = Released(name)
    files = released.files(gamma=False)
    files["checkpoint.pth"] = files.pop(f"{name}.pth")
    hub.add(f"{OWNER}/{name}", files, branch="first")
    assert_equal_features(maskwise.load(f"hub:{OWNER}/{name}@first"), released)
    assert f"gamma={released.gamma}, that of the released model of this name" in capfd.readouterr().err
    (tmp_path / f"{name}.pth").write_bytes(files["checkpoint.pth"])
    assert maskwise.load(tmp_path / f"{name}.pth").pooling.gamma == released.gamma
    (tmp_path / "mine.pth").write_bytes(files["checkpoint.pth"])
    with pytest.raises(UserError, match="mine.pth does not say which gamma its SimPool had"):
        maskwise.load(tmp_path / "mine.pth")


def test_configs_yaml_takes_precedence_over_the_name(hub):  # noqa: F811
    released = Released("vits_dino_simpool_ep100")
    files = released.files()
    files["configs.yaml"] = b"gamma: 1.75\nhook: !!python/object/apply:os.system ['touch harm']\n"
    hub.add(f"{OWNER}/vits_dino_simpool_ep100", files)
    assert maskwise.load(f"{OWNER}/vits_dino_simpool_ep100").pooling.gamma == 1.75
    assert not os.path.exists("harm")
    assert maskwise.load(f"{OWNER}/vits_dino_simpool_ep100", gamma=None).pooling.gamma is None


def test_a_clone_is_loaded_as_a_folder(tmp_path):
    released = Released("vits_dino_simpool_ep100")
    for name, content in released.files().items():
        (tmp_path / name).write_bytes(content)
    encoder = maskwise.load(tmp_path)
    assert_equal_features(encoder, released)
    (tmp_path / "checkpoint.pth").write_bytes(b"another")
    with pytest.raises(UserError, match=r"holds 2 weights files: give one of them \(checkpoint.pth, vits_dino"):
        maskwise.load(tmp_path)


def test_a_run_continues_from_a_released_model(hub):  # noqa: F811
    hub.add(f"{OWNER}/vits_dino_simpool_ep300", Released("vits_dino_simpool_ep300").files())
    initial = InitialModel.open(f"hub:{OWNER}/vits_dino_simpool_ep300", backbone="vit_small_patch16_224", gamma=2.0)
    assert initial.spec["pooling"]["gamma"] == 1.25  # the recipe's is for files that do not tell it
    assert initial.source.networks.keys() == {"teacher", "student"} and initial.source.head is not None


def test_the_cache_is_used_without_network(hub, monkeypatch):  # noqa: F811
    released = Released("convnext_small_dino_simpool_ep100")
    hub.add(f"{OWNER}/{released.name}", released.files())
    maskwise.load(f"{OWNER}/{released.name}")
    at(monkeypatch, "http://127.0.0.1:9")
    assert_equal_features(maskwise.load(f"{OWNER}/{released.name}"), released)
    with pytest.raises(UserError, match="cannot be downloaded from the Hub"):
        maskwise.load(f"{OWNER}/convnext_small_dino_official_ep100")


def test_hub_encoder_reads_them(hub):  # noqa: F811
    released = Released("resnet50_dino_simpool_ep100")
    hub.add(f"{OWNER}/{released.name}", released.files())
    assert_equal_features(HubEncoder.from_pretrained(f"{OWNER}/{released.name}").encoder, released)


class Harm:
    def __reduce__(self):
        return subprocess.call, (["touch", "harm"],)


def test_code_in_a_repository_is_not_executed(hub, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for name, content in (
        ("zip", saved({"teacher": vit(), "args": Harm()})),
        ("pickle", pickle.dumps({"teacher": Harm()}, protocol=2)),
    ):
        hub.add(f"me/{name}", {"checkpoint.pth": content})
        with pytest.raises(UserError, match="cannot read weights from .*checkpoint.pth") as caught:
            maskwise.load(f"me/{name}")
        assert "\n" not in str(caught.value) and not (tmp_path / "harm").exists()


def test_what_a_repository_lacks_is_one_line(hub, monkeypatch):  # noqa: F811
    hub.add("me/empty", {"README.md": b"", "log.txt": b""})
    hub.add("me/many", {"checkpoint.pth": b"a", "checkpoint0080.pth": b"b"})
    for name, text in (
        ("me/empty", "me/empty holds no weights: it needs *.safetensors, pytorch_model.bin or *.pth"),
        (
            "hub:me/many@main",
            "me/many@main holds 2 weights files (checkpoint.pth, checkpoint0080.pth): download one, and give its path",
        ),
    ):
        with pytest.raises(UserError) as caught:
            maskwise.load(name)
        assert str(caught.value) == text
    assert not fetched(hub)
    tensors = {**vit(cls=False), **prefixed(simpool(), "simpool.")}
    hub.add("me/wrong", {"a.pth": saved(tensors), "configs.yaml": b"gamma: [1, 2]"})
    with pytest.raises(UserError, match=r"gamma='\[1, 2\]' in its arguments is no positive number: give gamma="):
        maskwise.load("me/wrong", num_heads=1)


def test_pickled_weights_beside_a_config(hub):  # noqa: F811
    """Repositories of transformers before safetensors."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    files = {"config.json": config.to_json_string(use_diff=False).encode()}
    hub.add("me/vit", {**files, "pytorch_model.bin": saved(model.state_dict()), "tf_model.h5": b""})
    with torch.no_grad():
        expected = model(X).last_hidden_state[:, 0]
        torch.testing.assert_close(maskwise.load("me/vit")(X).pooled, expected, rtol=1e-4, atol=1e-4)
        encoder = HubEncoder.from_pretrained("me/vit", local_files_only=True)
        torch.testing.assert_close(encoder(X).pooled, expected, rtol=1e-4, atol=1e-4)
    assert fetched(hub) == {"config.json", "pytorch_model.bin"}
    hub.add("me/both", {**files, "pytorch_model.bin": b"", "model.safetensors": save(model.state_dict())})
    assert load.read("me/both").networks.keys() == {"only"} and "pytorch_model.bin" not in fetched(hub, "me/both")
