"""Plain timm models are evaluated by their own features."""

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from maskwise import api
from maskwise.errors import UserError
from maskwise.evaluation.features.extract import extract
from maskwise.evaluation.features.timm_model import TimmModel, is_timm_model
from support.benchmark_folders import revisited
from support.tiny_sets import Colors, sets

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 5}
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)}
MODELS = {
    "vit": ("vit_tiny_patch16_224", VIT, 24, 16),
    "vit with registers, averaged": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg", "reg_tokens": 2}, 24, 16),
    "swin, channels last": ("swin_tiny_patch4_window7_224", SWIN, 24, 16),
    "mobilenet, wider after pooling": ("mobilenetv3_small_050", {}, 1024, 49),
}


def built(name):
    torch.manual_seed(0)
    return timm.create_model(MODELS[name][0], **MODELS[name][1]).eval()


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_timm(name):
    model, images = built(name), Colors(4)
    encoder = TimmModel(model)
    bank = extract(encoder, images, ("pooled", "patches"))
    batch = torch.stack([encoder.transform(images.image(i)) for i in range(4)])
    with torch.no_grad():
        output = model.forward_features(batch)
        expected = model.forward_head(output, pre_logits=True)
    assert torch.allclose(bank["pooled"], expected, atol=1e-5) and expected.shape[1] == encoder.dim == MODELS[name][2]
    assert bank["patches"].shape == (4, MODELS[name][3], encoder.patch_dim)
    whole = output.flatten(2).movedim(1, -1) if output.ndim == 4 and output.shape[-1] != encoder.patch_dim else output
    assert torch.allclose(bank["patches"], whole.reshape(4, -1, encoder.patch_dim)[:, -MODELS[name][3] :], atol=1e-5)


def test_transform_is_that_of_the_pretrained_tag():
    encoder = TimmModel(built("vit"))
    assert encoder.mean == (0.5, 0.5, 0.5) and encoder.crop_pct == 0.9 and encoder.image_size == (32, 32)
    assert encoder.transform(Image.new("RGB", (50, 40), "white")).unique().tolist() == [1.0]


def test_evaluations_of_a_timm_model():
    model, data = built("vit"), sets(24, 9)
    report = api.evaluate("knn", model, **data, k=[1])
    bank, queries = (extract(TimmModel(model), data[role], "pooled") for role in ("train", "test"))
    cosine = nn.functional.normalize(queries.pooled) @ nn.functional.normalize(bank.pooled).T
    right = bank.labels[cosine.argmax(dim=1)] == queries.labels
    assert report.numbers["top1"] == pytest.approx(100 * float(right.double().mean()))
    assert api.evaluate("linear", model, **data, epochs=2, augment=False).protocol["feature"] == "pooled"
    for name, options in (
        ("attentive", {"epochs": 1, "warmup_epochs": 0}),
        ("finetune", {"epochs": 1, "warmup_epochs": 0, "batch_size": 8, "repeats": 1}),
        ("few_shot", {"per_class": 1}),
        ("logistic", {}),
    ):
        assert 0 <= next(iter(api.evaluate(name, model, **data, **options).numbers.values())) <= 100
    wide = built("mobilenet, wider after pooling")
    assert api.evaluate("attentive", wide, **sets(6, 3), epochs=1, warmup_epochs=0).numbers["top1"] >= 0
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_what_a_timm_model_cannot_give_is_one_line(tmp_path):
    model, data = built("vit"), sets(6, 3)
    for name, options, line in (
        (
            "linear",
            {"feature": "cls4"},
            "feature 'cls4' is not available from this model; choose from pooled, patch_mean",
        ),
        ("masked", {}, "computes no attention; give guide=MODEL"),
        ("analysis", {}, "needs the layers of a network"),
    ):
        with pytest.raises(UserError, match=line):
            api.evaluate(name, model, **data, **options)
    with pytest.raises(UserError, match="takes images of 32x32 pixels only; create it with dynamic_img_size=True"):
        api.evaluate("retrieval", model, test=revisited(tmp_path))
    with pytest.raises(UserError, match="PoolingVisionTransformer returns no patches; give its weights file"):
        TimmModel(timm.create_model("pit_ti_224"))
    with pytest.raises(UserError, match="takes 1 channels and its pretrained_cfg has a mean of 3"):
        TimmModel(timm.create_model("vit_tiny_patch16_224", in_chans=1, **VIT))
    with pytest.raises(UserError, match="look: this model gives no attention to draw"):
        api.look(model, [tmp_path / "a.png"], tmp_path / "sheet.png", masking="attmask_high")


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, 3, {"a": 1}])
def test_other_objects_are_refused_in_one_line(model):
    assert not is_timm_model(model)
    with pytest.raises(UserError, match="is not a model that can be evaluated; give the path of a run") as caught:
        api.evaluate("knn", model, **sets(6, 3))
    assert "\n" not in str(caught.value)
