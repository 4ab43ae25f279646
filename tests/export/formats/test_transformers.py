"""transformers' folders: features equal to those of the library, for every model that is read."""

import json

import pytest
import torch

from maskwise.errors import UserError
from maskwise.export import load

transformers = pytest.importorskip("transformers")

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
MLP = {**SHAPE, "intermediate_size": 48}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
MODELS = {  # name -> model class, configuration class, arguments
    "dinov2": ("Dinov2Model", "Dinov2Config", {**SHAPE, "mlp_ratio": 2}),
    "dinov2 gated": ("Dinov2Model", "Dinov2Config", {**SHAPE, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2 classifier": ("Dinov2ForImageClassification", "Dinov2Config", {**SHAPE, "mlp_ratio": 2}),
    "dinov2 registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {**SHAPE, "mlp_ratio": 2}),
    "vit": ("ViTModel", "ViTConfig", MLP),
    "vit classifier": ("ViTForImageClassification", "ViTConfig", MLP),
    "vit msn": ("ViTMSNModel", "ViTMSNConfig", MLP),
    "mae": ("ViTMAEModel", "ViTMAEConfig", {**MLP, **DECODER, "mask_ratio": 0.0}),
    "mae with decoder": ("ViTMAEForPreTraining", "ViTMAEConfig", {**MLP, **DECODER, "mask_ratio": 0.0}),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**MLP, "num_register_tokens": 3}),
    "dinov3 gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**MLP, "num_register_tokens": 3, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
}


def saved(name, folder, **options):
    """Save a model with random weights, its biases and layer scales included; return it."""
    model, config, arguments = MODELS[name]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**{**arguments, **options})).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    built.save_pretrained(folder)
    return built


def tokens_of(model, images):
    """Return the normalized tokens of a model's backbone [B, T, D]; MAE's in the order of the patches."""
    base = getattr(model, model.base_model_prefix) if "For" in type(model).__name__ else model
    noise = {}
    if model.config.model_type == "vit_mae":
        noise = {"noise": torch.arange(16.0).expand(len(images), -1)}
    with torch.no_grad():
        return base(images, **noise).last_hidden_state


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_transformers(tmp_path, capfd, name):
    model = saved(name, tmp_path)
    encoder = load.load(tmp_path)
    tokens, output = tokens_of(model, X), encoder(X)
    torch.testing.assert_close(output.pooled, tokens[:, 0], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(output.patches, tokens[:, -16:], atol=2e-6, rtol=1e-5)
    line = next(line for line in capfd.readouterr().err.splitlines() if "read as transformers" in line)
    for part in ("classifier", "decoder", "pooler"):
        assert (f"{part} " in line.partition("unused")[2]) == any(
            key.partition(".")[0] == part for key in model.state_dict()
        ), line


def test_an_image_of_another_size_resamples_positions_as_transformers_does(tmp_path):
    model = saved("vit", tmp_path)
    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        tokens = model(images, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(load.load(tmp_path)(images).patches, tokens[:, 1:], atol=2e-6, rtol=1e-5)


def test_the_image_processor_gives_statistics_and_crop(tmp_path, capfd):
    saved("dinov2", tmp_path)
    processor = {
        "do_center_crop": True,
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 24, "width": 24},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    assert load.load(tmp_path).mean == (0.485, 0.456, 0.406)
    assert "are assumed" in capfd.readouterr().err
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    transform = load.load(tmp_path).transform
    assert (transform.size, transform.crop_pct) == ((24, 24), 0.75)
    assert (transform.mean, transform.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert "are assumed" not in capfd.readouterr().err


def test_a_gray_model_is_read(tmp_path):
    model = saved("vit", tmp_path, num_channels=1)
    encoder = load.load(tmp_path)
    images = X[:, :1]
    torch.testing.assert_close(encoder(images).pooled, tokens_of(model, images)[:, 0], atol=2e-6, rtol=1e-5)
    assert len(encoder.mean) == 1


def test_a_model_in_several_files_is_read(tmp_path):
    model = saved("vit", tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert torch.equal(load.load(tmp_path / "parts")(X).pooled, load.load(tmp_path / "whole")(X).pooled)


def test_settings_that_are_not_computed_here_are_refused(tmp_path):
    saved("vit", tmp_path / "act", hidden_act="relu")
    saved("dinov3", tmp_path / "eps", layer_norm_eps=1e-6)
    transformers.CLIPVisionConfig().save_pretrained(tmp_path / "clip")
    for name, words in (("act", "hidden_act=relu"), ("eps", "layer_norm_eps=1e-06"), ("clip", "clip_vision_model")):
        with pytest.raises(UserError, match=words) as caught:
            load.load(tmp_path / name)
        assert "\n" not in str(caught.value)
