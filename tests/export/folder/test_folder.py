"""Exported folders in every library: equal features and attention, the model card, refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import maskwise
from maskwise.engine.checkpoint import Checkpoints
from maskwise.errors import UserError
from maskwise.evaluation.report import Report
from maskwise.export import load, release, write
from maskwise.export.folder import format, timm_layout, transformers_layout, verify
from maskwise.export.folder.provenance import Provenance
from maskwise.nn import POOLINGS, Backbone, Encoder
from maskwise.nn.transform import Transform

X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
DINOV2 = {"backbone.safetensors", "transformers.safetensors", "model.safetensors.index.json"}
CASES = {
    "class token": ("cls", {}, DINOV2),
    "layer scale, mask token": ("cls", {"init_values": 0.3, "mask_token": True}, DINOV2),
    "registers under the table": ("cls", {"reg_tokens": 2}, DINOV2),
    "registers outside the table": ("cls", {"reg_tokens": 2, "no_embed_class": True}, DINOV2),
    "no bias, no table": ("cls", {"qkv_bias": False, "pos_embed": "none"}, DINOV2),
    "simpool with a class token": ("simpool", {"class_token": True}, DINOV2),
    "simpool": ("simpool", {"class_token": False}, {"model.safetensors"}),
    "released simpool": ("simpool", {"class_token": False, "position": "offset_always"}, {"model.safetensors"}),
    "normalized keys": ("cls", {"qk_norm": True}, {"model.safetensors"}),
    "norm before": ("cls", {"pre_norm": True}, {"model.safetensors"}),
    "oblong": ("cls", {"image_size": (32, 48)}, {"model.safetensors"}),
    "rotary positions": ("cls", {"name": "vit_small_patch16_dinov3", "num_heads": 2}, {"model.safetensors"}),
    "five channels": ("cls", {"mean": (0.5,) * 5, "std": (0.2,) * 5}, {"model.safetensors"}),
    "odd width of the MLP": ("cls", {"mlp_ratio": 2.5}, {"model.safetensors"}),
}  # fmt: skip


def build(pooling="cls", **options):
    """Return a small encoder with random values in every tensor, norms and biases included."""
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    backbone = Backbone(options.pop("name", "vit_tiny_patch16_224"), **{**shape, **options})
    encoder = Encoder(backbone, POOLINGS[pooling](64)).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


def pixels(encoder):
    return torch.randn(3, len(encoder.mean), *encoder.image_size, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request, tmp_path_factory):
    pooling, options, files = CASES[request.param]
    encoder, lines = build(pooling, **options), []
    folder = tmp_path_factory.mktemp("exports") / "folder"
    write.write(encoder, folder, say=lines.append)
    return encoder, folder, files, lines


def test_maskwise_loads_it_bit_for_bit(case):
    encoder, folder, files, _ = case
    assert files <= {path.name for path in folder.iterdir()}
    assert ("model.safetensors" in files) == (folder / "model.safetensors").exists()
    back, x = maskwise.load(folder), pixels(encoder)
    assert back.spec() == encoder.spec() and not back.training
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in encoder.state_dict().items())
    mask = torch.rand(3, encoder(x).patches.shape[1], generator=torch.Generator().manual_seed(1)) < 0.5
    for option in (None, mask):
        assert torch.equal(back(x, option).pooled, encoder(x, option).pooled)


def test_timm_gives_the_same(case):
    import timm

    encoder, folder, *_ = case
    model, x = timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), pixels(encoder)
    expected = encoder(x)
    with torch.no_grad():
        tokens = model.forward_features(x)
        assert (tokens[:, model.num_prefix_tokens :] - expected.patches).abs().max() < 1e-5
        pooled = (
            expected.pooled if verify.pools_class_token(encoder) else expected.patches.mean(1)
        )  # timm has no simpool
        assert (model(x) - pooled).abs().max() < 1e-5
    assert model.num_classes == 0 and tuple(model.pretrained_cfg["mean"]) == encoder.mean


def test_transformers_gives_the_same(case):
    transformers = pytest.importorskip("transformers")
    encoder, folder, files, _ = case
    options = {"attn_implementation": "eager"} if files == DINOV2 else {}
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    x, prefix = pixels(encoder), encoder.backbone.num_prefix
    expected = encoder(x)
    with torch.no_grad():
        got = model.eval()(pixel_values=x, **({"output_attentions": True} if files == DINOV2 else {}))
    assert (got.last_hidden_state[:, prefix:] - expected.patches).abs().max() < 1e-5
    if verify.pools_class_token(encoder):
        assert (got.pooler_output - expected.pooled).abs().max() < 1e-5
        if files == DINOV2:
            assert (got.attentions[-1][:, :, 0, prefix:] - expected.attention).abs().max() < 1e-6
    assert type(model).__name__.startswith("Dinov2" if files == DINOV2 else "TimmWrapper")


def test_every_library_is_reported(case):
    _, _, files, lines = case
    assert lines[0] == "opened again, largest differences:"
    assert [line.split()[0] for line in lines[1:3]] == ["maskwise", "timm"]
    assert "features 0.0e+00   attention 0.0e+00" in lines[1]
    with_attention = [
        line for line in lines if "transformers" in line and "attention " in line and "no attention" not in line
    ]
    assert not with_attention or files == DINOV2


def test_an_overridden_image_size_is_exported(tmp_path):
    """timm gets the position table resampled as in maskwise; maskwise keeps the table as trained."""
    import timm

    encoder = build(position="offset")
    encoder.image_size = (48, 48)
    write.write(encoder, tmp_path / "out")
    back, x = maskwise.load(tmp_path / "out"), pixels(encoder)
    assert back.image_size == (48, 48) and torch.equal(back.backbone.pos_embed, encoder.backbone.pos_embed)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        assert (model(x) - encoder(x).pooled).abs().max() < 1e-5


def test_fine_tuning_in_timm_and_transformers(tmp_path):
    import timm

    write.write(build(), tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=5)
    assert model(X).shape == (3, 5) and torch.equal(
        model.blocks[1].mlp.fc1.weight, build().backbone.blocks[1].mlp.fc1.weight
    )
    transformers = pytest.importorskip("transformers")
    tuned = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out", num_labels=5)
    assert tuned(pixel_values=X, labels=torch.tensor([0, 1, 2])).loss.requires_grad
    weight = tuned.state_dict()["dinov2.encoder.layer.1.mlp.fc1.weight"]
    assert torch.equal(weight, build().backbone.blocks[1].mlp.fc1.weight)


def test_timm_inherits_nothing_from_its_pretrained_weights(tmp_path):
    encoder = build()
    encoder.mean = encoder.backbone.mean = (0.1, 0.2, 0.3)
    write.write(
        encoder,
        tmp_path / "out",
        provenance=Provenance(license="mit", recipe="method: {name: ibot}\nmasking: {name: attmask_high}\n"),
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    data = config["pretrained_cfg"]
    assert (data["tag"], data["license"], data["mean"]) == ("ibot_attmask_high", "mit", [0.1, 0.2, 0.3])
    assert "num_classes" not in config["model_args"]
    opened = verify.open_timm(tmp_path / "out").pretrained_cfg
    assert (
        opened["tag"] == "ibot_attmask_high"
        and opened["license"] == "mit"
        and not opened.get("url")
        and not opened.get("origin_url")
    )


def test_without_transformers_it_is_reported(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    write.write(build(), tmp_path / "out", say=lines.append)
    assert lines[-1] == "  transformers           not installed, not tried"
    assert "- transformers: not installed, not tried" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet18", {}),
        ("convnext_atto", {}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)}),
    ],
)
def test_the_timm_layout_holds_any_timm_model(name, options, tmp_path):
    """config.json and one weights file of a plain timm model open in timm and in transformers."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, global_pool="avg", **options).eval()
    transform = Transform((64, 64), 1.0, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    settings = {"image_size": (64, 64), "crop_pct": 1.0, "mean": transform.mean, "std": transform.std}
    stand_in = type("Encoder", (), {**settings, "transform": transform})()
    arguments = {"global_pool": "avg", **options}
    layout = timm_layout.TimmLayout(
        name, arguments, {}, {}, {}, {"first_conv": None, "classifier": None, "num_features": model.num_features}
    )
    config = timm_layout.timm_config(layout, stand_in, tag="own", license="mit", filename="model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(transformers_layout.preprocessor(stand_in)))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        opened = verify.open_timm(tmp_path)
        assert torch.equal(opened(x), expected) and tuple(opened.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
        patches = verify.timm_patches(opened, x)
        assert patches.shape == (2, 4, model.num_features)
        if name != "convnext_atto":  # its norm comes after the mean
            assert (patches.mean(1) - expected).abs().max() < 1e-5
        pytest.importorskip("transformers")
        wrapped = transformers_layout.open_transformers(tmp_path)
        assert (wrapped(pixel_values=x).pooler_output - expected).abs().max() < 1e-5


def test_renaming_uses_the_norm_s_name_in_each_family():
    own = {
        "norm.weight": 0,
        "norm.bias": 0,
        "backbone.stem.weight": 0,
        "backbone.mask_token": 0,
        "pooling.wq.weight": 0,
    }
    network = Backbone("resnet18", layers=(1, 1, 1, 1))
    assert timm_layout.renaming(own, {"stem.weight": 0, "head.norm.weight": 0, "head.norm.bias": 0}, network) == {
        "norm.weight": "head.norm.weight",
        "norm.bias": "head.norm.bias",
        "backbone.stem.weight": "stem.weight",
    }
    assert timm_layout.renaming({"backbone.model.stem.weight": 0}, {"stem.weight": 0}, network) == {
        "backbone.model.stem.weight": "stem.weight"
    }


def run_folder(folder, **more):
    """Write a small run folder as training does; `more` are sections of its recipe. Returns teacher and student."""
    teacher, student = build(), build(mask_token=True)
    torch.nn.init.normal_(student.norm.weight)
    head = {
        "mlp.0.weight": torch.randn(4, 64),
        "last_layer.weight_g": torch.ones(8, 1),
        "last_layer.weight_v": torch.randn(8, 4),
    }
    parts = {
        "teacher.encoder.": teacher.state_dict(),
        "student.encoder.": student.state_dict(),
        "teacher.head.": head,
        "student.head.": head,
    }
    tensors = {f"{front}{key}": value for front, state in parts.items() for key, value in state.items()}
    Checkpoints(folder).save(12, {**tensors, "center": torch.ones(1, 8)}, {}, encoder_spec=teacher.spec())
    recipe = {
        "seed": 5,
        "data": {"name": "folder", "path": "/secret/of/mine/birds"},
        "method": {"name": "ibot"},
        "masking": {"name": "attmask_hint"},
        **more,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "run.json").write_text(
        json.dumps(
            {"commit": "abc", "images": 7, "command": "maskwise train /secret/of/mine/r.yaml", "precision": "fp32"}
        )
    )
    for name, value in (("knn_step_00000006", 10.0), ("knn_step_00000012", 20.5), ("linear", 30.25)):
        kind = name.partition("_")[0]
        Report(
            {"top1": value, "note": "words"},
            {"evaluation": kind, "train": "/secret/of/mine/birds/train"},
            "feed" * 4,
            {},
        ).save(folder / "reports" / f"{name}.json")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "attention_and_masks_step_00000012.png").write_bytes(b"\x89PNG of the run")
    return teacher, student


def test_the_card_of_a_run(tmp_path):
    from huggingface_hub import ModelCard

    run_folder(tmp_path / "run")
    release.export(tmp_path / "run", tmp_path / "out", license="cc-by-4.0", say=None)
    written = ModelCard.load(tmp_path / "out" / "README.md")
    data = written.data
    assert (data.library_name, data.pipeline_tag, data.license, data.datasets) == (
        "transformers",
        "image-feature-extraction",
        "cc-by-4.0",
        ["birds"],
    )
    assert {"maskwise", "self-supervised-learning", "ibot", "attmask_hint", "cls"} <= set(data.tags)
    measured = {
        (result.metric_name, result.metric_value, result.metric_type, result.dataset_name)
        for result in data.eval_results
    }
    assert measured == {
        ("knn top1", 20.5, "accuracy", "birds"),
        ("linear top1", 30.25, "accuracy", "birds"),
    }  # not step 6: other weights
    assert (
        data.model_name == "run"
        and "after 12 steps" in written.text
        and "abc" in written.text
        and "Nothing has been measured" not in written.text
    )
    assert (tmp_path / "out" / "attention.png").read_bytes() == b"\x89PNG of the run"
    assert sorted(path.name for path in (tmp_path / "out" / "reports").iterdir()) == ["knn.json", "linear.json"]
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert "path: birds" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_student_heads_and_a_base_model(tmp_path):
    _, student = run_folder(tmp_path / "run", method={"name": "dino", "start_from": "timm/vit_small_patch16_224.dino"})
    release.export(tmp_path / "run", tmp_path / "out", weights="student", heads=True, picture="shapes", say=None)
    back = maskwise.load(tmp_path / "out")
    assert torch.equal(back(X).pooled, student(X).pooled) and back.backbone.has_mask_token
    spec, state, training = format.read(tmp_path / "out")
    assert sorted(training) == [
        "center",
        "student.head.last_layer.weight_g",
        "student.head.last_layer.weight_v",
        "student.head.mlp.0.weight",
    ]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: timm/vit_small_patch16_224.dino" in text and "student of a run of dino" in text
    assert np.asarray(Image.open(tmp_path / "out" / "attention.png")).ndim == 3
    assert format.description(tmp_path / "out")["weights"] == "student"


def test_the_card_of_an_encoder_in_memory(tmp_path, capsys):
    encoder = build("simpool", class_token=False).train()
    report = Report({"top1": 50.0}, {"evaluation": "knn"}, "0" * 16, {})
    assert maskwise.export(encoder, tmp_path / "out", reports=[report], datasets=["cifar10"]) == tmp_path / "out"
    assert "opened again" in capsys.readouterr().out and encoder.training
    text = (tmp_path / "out" / "README.md").read_text()
    assert "value: 50.0" in text and "license: unknown" in text and "No license has been stated" in text
    assert "through its timm wrapper, which gives no attentions" in text and "simpool" in text
    maskwise.export(build(), tmp_path / "plain", say=None)
    assert "model-index" not in (tmp_path / "plain" / "README.md").read_text()
    assert "Nothing has been measured" in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"license": "apache2"}, "no license identifier of the Hub: did you mean apache-2.0"),
        ({"license": "my own"}, "give one such as apache-2.0, mit or cc-by-nc-4.0"),
        ({"onnx": ["onnyx"]}, "choose from onnx, onnx-attention, pt2"),
        ({"picture": "cat"}, "choose run or shapes"),
        ({"heads": True}, "holds no projection head of the teacher"),
    ],
)
def test_refused_options(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        release.export(build(), tmp_path / "out", say=None, **options)
    assert not list(tmp_path.iterdir())


def test_a_damaged_folder_is_refused(tmp_path):
    write.write(build("simpool", class_token=False), tmp_path / "out")
    folder = tmp_path / "out" / "model.safetensors"
    weights = load_file(folder)
    save_file({**weights, "extra.weight": torch.zeros(1)}, folder)
    with pytest.raises(UserError, match="unknown extra.weight"):
        load.load(tmp_path / "out")
    save_file({key: value for key, value in weights.items() if key != "norm.bias"}, folder)
    with pytest.raises(UserError, match="lacks norm.bias"):
        load.load(tmp_path / "out")
    (tmp_path / "out" / "maskwise.safetensors").unlink()
    save_file(weights, folder)
    with pytest.raises(UserError, match="lacks pooling"):
        load.load(tmp_path / "out")
