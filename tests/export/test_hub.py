"""The Hub: pushed through huggingface_hub's own client to a stand-in on loopback, loaded from there and from the cache alone."""

import json
import os

import huggingface_hub
import pytest
import torch
from export.hub_stand_in import TOKEN, standing_in
from export.test_folder import X, build, run_folder
from huggingface_hub import constants

import maskwise
from maskwise import cli
from maskwise.evaluation.report import Report
from maskwise.export import hub as hubs
from maskwise.export.hub_encoder import HubEncoder
from maskwise.functional.errors import UserError


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """No token, an empty cache, and no address but the loopback's."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own beside the Hub's
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    at(monkeypatch, "http://127.0.0.1:9")  # where nobody listens


def at(monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)


@pytest.fixture
def hub(monkeypatch):
    with standing_in() as (hub, address):
        at(monkeypatch, address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_push_and_load(hub, monkeypatch):
    encoder = build("simpool", class_token=False)
    report = Report({"top1": 41.5}, {"evaluation": "knn"}, "ab" * 8, {})
    address = maskwise.push_to_hub(encoder, "me/birds", reports=[report], licence="mit", say=None)
    files = hub.files("me/birds", "main")
    assert {"config.json", "model.safetensors", "maskwise.safetensors", "README.md", "preprocessor_config.json", "reports/knn.json", "attention.png"} <= set(files)
    assert {"model.safetensors", "maskwise.safetensors", "attention.png"} <= hub.lfs and "config.json" not in hub.lfs
    assert len(hub.commits) == 1 and address.endswith(f"/me/birds/commit/{hub.sha('me/birds', 'main')}")
    card = files["README.md"].decode()
    assert 'maskwise.load("me/birds")' in card and '"hf-hub:me/birds"' in card and "value: 41.5" in card
    for name in ("me/birds", "hub:me/birds", f"hub:me/birds@{hub.sha('me/birds', 'main')}"):
        assert torch.equal(maskwise.load(name)(X).pooled, encoder(X).pooled)
    asked = len(hub.seen)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(maskwise.load("me/birds")(X).attention, encoder(X).attention)
    assert len(hub.seen) == asked


def test_the_cache_serves_where_there_is_no_network(hub, monkeypatch):
    maskwise.push_to_hub(build(), "me/birds", say=None)
    maskwise.load("me/birds")
    at(monkeypatch, "http://127.0.0.1:9")
    assert torch.equal(maskwise.load("me/birds")(X).pooled, build()(X).pooled)


def test_timm_and_transformers_open_it_from_there(hub, monkeypatch):
    import timm

    maskwise.push_to_hub(build(), "me/birds", say=None)
    model = timm.create_model("hf-hub:me/birds", pretrained=True).eval()
    assert (model(X) - build()(X).pooled).abs().max() < 1e-5
    assert ("HEAD", "/me/birds/resolve/main/backbone.safetensors") in hub.seen
    transformers = pytest.importorskip("transformers")
    got = transformers.AutoModel.from_pretrained("me/birds").eval()(pixel_values=X)
    assert (got.pooler_output - build()(X).pooled).abs().max() < 1e-5


def test_private_and_a_branch(hub):
    maskwise.push_to_hub(build(), "me/secret", private=True, revision="v1", say=None)
    assert hub.repositories["me/secret"]["private"] and set(hub.files("me/secret", "main")) == {".gitattributes"}
    assert "config.json" in hub.files("me/secret", "v1") and hub.commits == [("me/secret", "v1", hub.commits[0][2])]
    assert torch.equal(maskwise.load("hub:me/secret@v1")(X).pooled, build()(X).pooled)
    with pytest.raises(UserError, match="me/secret@v2 is no path here, and the Hub does not give it"):
        maskwise.load("hub:me/secret@v2")
    maskwise.push_to_hub(build(), "me/open", say=None)
    with pytest.raises(UserError, match="is public: make it private"):
        maskwise.push_to_hub(build(), "me/open", private=True, say=None)


def test_a_second_push_leaves_no_file_of_the_first(hub):
    """A model.safetensors left beside backbone.safetensors would be what transformers and timm open."""
    maskwise.push_to_hub(build("simpool", class_token=False), "me/birds", say=None)
    maskwise.push_to_hub(build(), "me/birds", say=None)
    files = hub.files("me/birds", "main")
    assert "model.safetensors" not in files and "backbone.safetensors" in files and "maskwise.safetensors" not in files
    assert torch.equal(maskwise.load("me/birds")(X).pooled, build()(X).pooled)


def test_the_command_and_its_dry_run(hub, tmp_path, capsys):
    run_folder(tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), "--to", "hub:me/birds", "--dry-run", "--licence", "mit"]) == 0
    out = capsys.readouterr().out
    assert "dry run:" in out and "backbone.safetensors" in out and out.splitlines()[-1].startswith("would be pushed: http://127.0.0.1") and not hub.seen
    assert cli.main(["export", str(tmp_path / "run"), "--to", "hub:me/birds", "--licence", "mit", "--revision", "v1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("pushed: http://127.0.0.1")
    files = hub.files("me/birds", "v1")
    assert json.loads(files["config.json"])["pretrained_cfg"]["license"] == "mit"
    assert files["attention.png"] != b"\x89PNG of the run"  # a public page shows embedded images, not those of the data
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


def test_what_is_refused_is_one_line(monkeypatch):
    assert refusal() == "cannot push to the Hub: there is no token; `hf auth login`, or HF_TOKEN in the environment, gives one with write access"
    assert "is no name on the Hub" in refusal("me/birds/again")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    text = refusal()
    assert text.startswith("cannot push to the Hub (") and text.endswith("): check the network, and `hf auth login`")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids it" in refusal()


def test_a_token_that_the_hub_refuses(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert "the token is refused" in refusal()
    assert not hub.repositories


def test_a_name_that_is_nowhere_is_one_line(hub, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="nobody/nothing is no path here, and the Hub does not give it") as caught:
        maskwise.load("nobody/nothing")
    assert os.linesep not in str(caught.value)
    hub.seen.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/mine", "nowhere", "a/b/c", "weights/best.pth", str(tmp_path / "x")):  # these are paths: nobody is asked
        with pytest.raises(UserError, match="does not exist"):
            maskwise.load(path)
    assert not hub.seen
    assert hubs.named("hub:me/x@v1") == ("me/x", "v1") and hubs.named("me/x") == ("me/x", None)
