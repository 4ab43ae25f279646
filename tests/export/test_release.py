"""`maskwise.export`: what it takes."""

import pytest
import torch

import maskwise
from export.folder.test_folder import X, build
from maskwise.errors import UserError


@pytest.mark.parametrize("wrap", ["compiled", "data parallel", "for the Hub", "compiled in place"])
def test_wrapped_encoders_are_exported(tmp_path, wrap):
    from maskwise.export.hub_encoder import HubEncoder

    encoder = build()
    if wrap == "compiled in place":
        encoder.compile()
    model = {"compiled": torch.compile, "data parallel": torch.nn.DataParallel, "for the Hub": HubEncoder}.get(
        wrap, lambda encoder: encoder
    )(encoder)
    maskwise.export(model, tmp_path / "out", say=None)
    assert torch.equal(maskwise.load(tmp_path / "out")(X).pooled, build()(X).pooled)


def test_other_models_are_refused_in_one_line(tmp_path):
    import timm

    others = [timm.create_model("resnet10t"), {"status": "complete"}, None, torch.nn.Linear(2, 2)]
    for model, kind in zip(others, ("ResNet", "dict: give the folder of the run", "NoneType", "Linear")):
        with pytest.raises(UserError, match=f"export takes an Encoder, .* this is a {kind}"):
            maskwise.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
