"""Folders that several libraries write: the weights that were saved last, or an error that names the files."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from maskwise.errors import UserError
from maskwise.export import load, write
from maskwise.nn import POOLINGS, Backbone, Encoder

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def build(pooling="cls", pool=None, **options):
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    encoder = Encoder(Backbone("vit_tiny_patch16_224", **{**shape, **options}), POOLINGS[pooling](48, **(pool or {})))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.eval()


def fine_tuned(folder, kind="AutoModel", **options):
    """Open an export in transformers and change its weights, as fine-tuning does."""
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, kind).from_pretrained(folder, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True}], ids=str)
def test_a_model_fine_tuned_in_transformers_is_loaded(tmp_path, options):
    write.write(build(**options), tmp_path / "exported")
    model = fine_tuned(tmp_path / "exported")
    model.save_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        tokens = model(X).last_hidden_state
    output = load.load(tmp_path / "tuned")(X)
    torch.testing.assert_close(output.pooled, tokens[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.patches, tokens[:, -16:], atol=1e-5, rtol=1e-5)


def test_a_fine_tuned_classifier_keeps_the_exported_input_settings(tmp_path):
    encoder = build()
    encoder.mean, encoder.std, encoder.crop_pct = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1.0
    write.write(encoder, tmp_path / "exported")
    model = fine_tuned(tmp_path / "exported", "AutoModelForImageClassification", num_labels=3)
    model.save_pretrained(tmp_path / "tuned")
    loaded = load.load(tmp_path / "tuned")
    with torch.no_grad():
        tokens = model.dinov2(X).last_hidden_state
    torch.testing.assert_close(loaded(X).pooled, tokens[:, 0], atol=1e-5, rtol=1e-5)
    assert loaded.transform == encoder.transform


def test_a_pooling_without_weights_is_kept_and_one_with_weights_is_named(tmp_path, capfd):
    for pooling, options in (("gap", {}), ("gem", {})):
        write.write(build(pooling, options), tmp_path / pooling)
        model = fine_tuned(tmp_path / pooling)
        model.save_pretrained(tmp_path / f"{pooling} tuned")
        with torch.no_grad():
            tokens = model(X).last_hidden_state
        pooled = load.load(tmp_path / f"{pooling} tuned")(X).pooled
        if not list(build(pooling).pooling.parameters()):
            assert load.load(tmp_path / f"{pooling} tuned").pooling.__class__ is POOLINGS[pooling]
        else:
            torch.testing.assert_close(pooled, tokens[:, 0], atol=1e-5, rtol=1e-5)
            assert f"pooling {pooling} were not saved" in capfd.readouterr().err


def test_weights_saved_into_the_export_disagree_and_are_named(tmp_path):
    """transformers' file is new and maskwise's is old: neither is loaded silently."""
    write.write(build(), tmp_path / "x")
    assert torch.equal(load.load(tmp_path / "x")(X).pooled, build()(X).pooled)
    model = fine_tuned(tmp_path / "x")
    model.save_pretrained(tmp_path / "x")
    with pytest.raises(UserError, match=r"backbone.safetensors and model.safetensors hold different weights") as caught:
        load.load(tmp_path / "x")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="hold different weights"):
        load.load(tmp_path / "x" / "model.safetensors")
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    (tmp_path / "x" / "backbone.safetensors").unlink()
    with torch.no_grad():
        torch.testing.assert_close(load.load(tmp_path / "x")(X).pooled, model(X).pooler_output, atol=1e-5, rtol=1e-5)
    (tmp_path / "y" / "model.safetensors").unlink()
    assert torch.equal(load.load(tmp_path / "y")(X).pooled, build()(X).pooled)


def test_an_export_saved_again_without_a_change_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, encoder in (
        ("plain", build()),
        ("scaled", build(init_values=0.5, reg_tokens=4)),
        ("bare", build(qkv_bias=False, pos_embed="none")),
    ):
        write.write(encoder, tmp_path / name)
        transformers.AutoModel.from_pretrained(tmp_path / name).save_pretrained(tmp_path / name)
        assert torch.equal(load.load(tmp_path / name)(X).pooled, encoder(X).pooled), name


def test_weights_under_the_timm_wrapper(tmp_path, capfd):
    """A SimPool export saved by transformers lacks SimPool: it is pooled as timm pools it, or its parts are named."""
    write.write(build("simpool", {"gamma": 2.0}, class_token=False), tmp_path / "x")
    model = fine_tuned(tmp_path / "x")
    model.save_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        wanted = model(X).pooler_output
    torch.testing.assert_close(load.load(tmp_path / "tuned")(X).pooled, wanted, atol=1e-5, rtol=1e-5)
    assert "pooling simpool were not saved" in capfd.readouterr().err
    model.save_pretrained(tmp_path / "x")
    with pytest.raises(UserError, match=r"model.safetensors was saved by transformers and maskwise.safetensors by an"):
        load.load(tmp_path / "x")
    (tmp_path / "x" / "maskwise.safetensors").unlink()
    torch.testing.assert_close(load.load(tmp_path / "x")(X).pooled, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("safe", [True, False])
def test_a_model_saved_by_timm_is_loaded(tmp_path, safe):
    write.write(build(), tmp_path / "x")
    model = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    timm.models.save_for_hf(model, tmp_path / "tuned", safe_serialization=safe)
    output = load.load(tmp_path / "tuned")(X)
    with torch.no_grad():
        torch.testing.assert_close(output.pooled, model(X), atol=1e-5, rtol=1e-5)
    timm.models.save_for_hf(model, tmp_path / "x", safe_serialization=safe)
    name = "model.safetensors" if safe else "pytorch_model.bin"
    with pytest.raises(UserError, match=f"backbone.safetensors and {name} hold different weights"):
        load.load(tmp_path / "x")


def test_a_weights_file_is_read_with_the_description_beside_it(tmp_path):
    """A file beside a config.json that says 3 heads has 3 heads; elsewhere the number is asked for."""
    encoder = build()
    write.write(encoder, tmp_path / "x")
    assert torch.equal(load.load(tmp_path / "x" / "backbone.safetensors")(X).pooled, encoder(X).pooled)
    shutil.copy(tmp_path / "x" / "backbone.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match=r"width 48, depth 2.* give num_heads="):
        load.load(tmp_path / "alone.safetensors")
    assert torch.equal(load.load(tmp_path / "alone.safetensors", num_heads=3)(X).pooled, encoder(X).pooled)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(
        json.dumps({key: config[key] for key in ("architecture", "model_args", "pretrained_cfg")})
    )
    shutil.copy(tmp_path / "alone.safetensors", foreign / "backbone.safetensors")
    assert load.load(foreign / "backbone.safetensors").backbone.num_heads == 3


def test_a_checkpoints_own_file_is_read_as_the_checkpoint(tmp_path):
    encoder, step = build(), tmp_path / "run" / "checkpoints" / "step_00000002"
    step.mkdir(parents=True)
    tensors = {
        f"{role}.encoder.{key}": v.clone() for role in ("teacher", "student") for key, v in encoder.state_dict().items()
    }
    save_file(tensors, step / "model.safetensors")
    (step / "encoder.json").write_text(json.dumps(encoder.spec()))
    assert torch.equal(load.load(step / "model.safetensors")(X).pooled, encoder(X).pooled)


def test_folders_without_a_model_say_what_they_hold(tmp_path):
    for name in ("empty", "shards", "no weights"):
        (tmp_path / name).mkdir()
    (tmp_path / "shards" / "__0_0.distcp").write_bytes(b"x")
    write.write(build(), tmp_path / "x")
    shutil.copy(tmp_path / "x" / "config.json", tmp_path / "no weights" / "config.json")
    for name, words in (
        ("empty", "neither a run folder nor an exported one"),
        ("shards", "dcp_to_torch_save"),
        ("no weights", "no weights: it needs one of backbone.safetensors"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert load_file(tmp_path / "x" / "backbone.safetensors").keys()
