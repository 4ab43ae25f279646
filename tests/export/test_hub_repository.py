"""The Hub: upload through huggingface_hub's client to a fake Hub on loopback, loading from it and from the cache."""

import json
import os

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import maskwise
from export.folder.test_folder import X, build, run_folder
from maskwise import cli
from maskwise.errors import UserError
from maskwise.evaluation.report import Report
from maskwise.export import hub_repository
from maskwise.export.hub_encoder import HubEncoder
from support.hub_server import TOKEN, running_hub


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """No token, an empty cache, and no address but loopback."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a separate protocol
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    at(monkeypatch, "http://127.0.0.1:9")  # a closed port


def at(monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)


@pytest.fixture
def hub(monkeypatch):
    with running_hub() as (hub, address):
        at(monkeypatch, address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_push_and_load(hub, monkeypatch):
    encoder = build("simpool", class_token=False)
    report = Report({"top1": 41.5}, {"evaluation": "knn"}, "ab" * 8, {})
    address = maskwise.push_to_hub(encoder, "me/birds", reports=[report], license="mit", say=None)
    files = hub.files("me/birds", "main")
    assert {
        "config.json",
        "model.safetensors",
        "maskwise.safetensors",
        "README.md",
        "preprocessor_config.json",
        "reports/knn.json",
        "attention.png",
    } <= set(files)
    assert {"model.safetensors", "maskwise.safetensors", "attention.png"} <= hub.lfs and "config.json" not in hub.lfs
    assert len(hub.commits) == 1 and address.endswith(f"/me/birds/commit/{hub.sha('me/birds', 'main')}")
    card = files["README.md"].decode()
    assert 'maskwise.load("me/birds")' in card and '"hf-hub:me/birds"' in card and "value: 41.5" in card
    for name in ("me/birds", "hub:me/birds", f"hub:me/birds@{hub.sha('me/birds', 'main')}"):
        assert torch.equal(maskwise.load(name)(X).pooled, encoder(X).pooled)
    num_requests = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(maskwise.load("me/birds")(X).attention, encoder(X).attention)
    assert len(hub.requests) == num_requests


def test_the_cache_is_used_offline(hub, monkeypatch):
    maskwise.push_to_hub(build(), "me/birds", say=None)
    maskwise.load("me/birds")
    at(monkeypatch, "http://127.0.0.1:9")
    assert torch.equal(maskwise.load("me/birds")(X).pooled, build()(X).pooled)


def test_timm_and_transformers_open_it_from_the_hub(hub, monkeypatch):
    import timm

    maskwise.push_to_hub(build(), "me/birds", say=None)
    model = timm.create_model("hf-hub:me/birds", pretrained=True).eval()
    assert (model(X) - build()(X).pooled).abs().max() < 1e-5
    assert ("HEAD", "/me/birds/resolve/main/backbone.safetensors") in hub.requests
    transformers = pytest.importorskip("transformers")
    got = transformers.AutoModel.from_pretrained("me/birds").eval()(pixel_values=X)
    assert (got.pooler_output - build()(X).pooled).abs().max() < 1e-5


def test_private_and_a_branch(hub):
    maskwise.push_to_hub(build(), "me/secret", private=True, revision="v1", say=None)
    assert hub.repositories["me/secret"]["private"] and set(hub.files("me/secret", "main")) == {".gitattributes"}
    assert "config.json" in hub.files("me/secret", "v1") and hub.commits == [("me/secret", "v1", hub.commits[0][2])]
    assert torch.equal(maskwise.load("hub:me/secret@v1")(X).pooled, build()(X).pooled)
    with pytest.raises(UserError, match="me/secret@v2 is no local path, and cannot be downloaded from the Hub"):
        maskwise.load("hub:me/secret@v2")
    maskwise.push_to_hub(build(), "me/open", say=None)
    with pytest.raises(UserError, match="is public: make it private"):
        maskwise.push_to_hub(build(), "me/open", private=True, say=None)


def test_a_second_push_leaves_no_file_of_the_first(hub):
    """transformers and timm would open a stale model.safetensors instead of backbone.safetensors."""
    maskwise.push_to_hub(build("simpool", class_token=False), "me/birds", say=None)
    maskwise.push_to_hub(build(), "me/birds", say=None)
    files = hub.files("me/birds", "main")
    assert "model.safetensors" not in files and "backbone.safetensors" in files and "maskwise.safetensors" not in files
    assert torch.equal(maskwise.load("me/birds")(X).pooled, build()(X).pooled)


def test_the_command_and_its_dry_run(hub, tmp_path, capsys):
    run_folder(tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), "--to", "hub:me/birds", "--dry-run", "--license", "mit"]) == 0
    out = capsys.readouterr().out
    assert (
        "dry run:" in out
        and "backbone.safetensors" in out
        and out.splitlines()[-1].startswith("would be pushed: http://127.0.0.1")
        and not hub.requests
    )
    assert (
        cli.main(["export", str(tmp_path / "run"), "--to", "hub:me/birds", "--license", "mit", "--revision", "v1"]) == 0
    )
    assert capsys.readouterr().out.splitlines()[-1].startswith("pushed: http://127.0.0.1")
    files = hub.files("me/birds", "v1")
    assert json.loads(files["config.json"])["pretrained_cfg"]["license"] == "mit"
    assert files["attention.png"] != b"\x89PNG of the run"  # a public repository shows embedded images
    maskwise.push_to_hub(tmp_path / "run", "me/own", private=True, say=None)
    assert hub.files("me/own", "main")["attention.png"] == b"\x89PNG of the run"


def test_hub_encoder(hub, tmp_path):
    encoder = HubEncoder(build("simpool", class_token=False))
    encoder.save_pretrained(tmp_path / "saved")
    encoder.save_pretrained(tmp_path / "saved")
    assert torch.equal(HubEncoder.from_pretrained(tmp_path / "saved")(X).pooled, encoder(X).pooled)
    assert torch.equal(maskwise.load(tmp_path / "saved")(X).pooled, encoder(X).pooled)
    encoder.push_to_hub("me/mixed")
    assert torch.equal(HubEncoder.from_pretrained("me/mixed")(X).attention, encoder(X).attention)
    assert encoder.transform == encoder.encoder.transform


def refusal(name="me/birds", **options):
    with pytest.raises(UserError) as caught:
        maskwise.push_to_hub(build(), name, say=None, **options)
    assert os.linesep not in str(caught.value)
    return str(caught.value)


def test_refusals_are_one_line(monkeypatch):
    assert (
        refusal()
        == "cannot push to the Hub: there is no token; get one with write access by `hf auth login`, or set HF_TOKEN"
    )
    assert "is not a valid Hub name" in refusal("me/birds/again")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    text = refusal()
    assert text.startswith("cannot push to the Hub (") and text.endswith("): check the network, and `hf auth login`")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids it" in refusal()


def test_a_refused_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_another_user")
    assert "the token is refused" in refusal()
    assert not hub.repositories


def test_an_unknown_name_is_one_line(hub, monkeypatch, tmp_path):
    with pytest.raises(
        UserError, match="noone/nothing is no local path, and cannot be downloaded from the Hub"
    ) as caught:
        maskwise.load("noone/nothing")
    assert os.linesep not in str(caught.value)
    hub.requests.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/mine", "nowhere", "a/b/c", "weights/best.pth", str(tmp_path / "x")):  # paths cause no request
        with pytest.raises(UserError, match="does not exist"):
            maskwise.load(path)
    assert not hub.requests
    assert hub_repository.parse_name("hub:me/x@v1") == ("me/x", "v1") and hub_repository.parse_name("me/x") == (
        "me/x",
        None,
    )
