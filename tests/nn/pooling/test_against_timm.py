"""Poolings against the modules of timm, averaged over patches, and the attention of torch."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers.cbam import CbamModule
from timm.layers.gather_excite import GatherExcite
from timm.layers.mlp import ConvMlp
from timm.layers.squeeze_excite import SEModule
from timm.models.cait import LayerScaleBlockClassAttn
from torch import nn

from maskwise.nn import POOLINGS
from support.poolings import build, map_of, patches


def copy_gate(ours, theirs, *names):
    with torch.no_grad():
        for layer, name in zip((ours.mlp[0], ours.mlp[2]), names):
            target = theirs.get_submodule(name)
            target.weight.copy_(layer.weight[:, :, None, None])
            if layer.bias is not None:
                target.bias.copy_(layer.bias)


def test_squeeze_and_excitation():
    x, ours = patches(dim=128), build("se", 128)
    theirs = SEModule(128).double()
    copy_gate(ours, theirs, "fc1", "fc2")
    torch.testing.assert_close(ours(x).vector, theirs(map_of(x)).mean((2, 3)))
    released = build("se", 128, variant="released")
    released.load_state_dict(ours.state_dict())
    torch.testing.assert_close(released(x).vector, F.relu(map_of(x) + theirs(map_of(x))).mean((2, 3)))
    positive = x.abs()
    q = torch.sigmoid(ours.mlp(positive.mean(1)))
    torch.testing.assert_close(released(positive).vector, (1 + q) * positive.mean(1))


@pytest.mark.parametrize("side", [7, 6, 1])
def test_gather_excite(side):
    x, ours = patches(dim=128, count=side**2), build("ge", 128)
    theirs = GatherExcite(128, extent=2, use_mlp=False)  # timm 1.0.31 cannot build its learned gather
    theirs.gather, theirs.mlp = (
        nn.Sequential(nn.Conv2d(128, 128, 3, 2, 1, groups=128, bias=False), nn.BatchNorm2d(128)),
        ConvMlp(128, 8),
    )
    theirs = theirs.double().eval()
    with torch.no_grad():
        theirs.gather[0].weight.copy_(ours.conv.weight)
        theirs.gather[1].load_state_dict(ours.norm.state_dict())
    copy_gate(ours, theirs, "mlp.fc1", "mlp.fc2")
    torch.testing.assert_close(ours(x).vector, theirs(map_of(x)).mean((2, 3)))
    released = build("ge", 128, variant="released")
    released.load_state_dict(ours.state_dict())
    torch.testing.assert_close(released(x).vector, F.relu(map_of(x) + theirs(map_of(x))).mean((2, 3)))


def test_cbam():
    x, ours = patches(dim=128), build("cbam", 128)
    theirs = CbamModule(128, rd_ratio=1 / 16).double().eval()
    copy_gate(ours, theirs, "channel.fc1", "channel.fc2")
    with torch.no_grad():
        theirs.spatial.conv.conv.weight.copy_(ours.conv.weight)
    theirs.spatial.conv.bn.load_state_dict(ours.norm.state_dict())
    torch.testing.assert_close(ours(x).vector, theirs(map_of(x)).mean((2, 3)))


def test_class_attention():
    x, ours = patches(dim=32), build("cait", 32)
    theirs = (
        LayerScaleBlockClassAttn(
            32, num_heads=4, qkv_bias=True, norm_layer=lambda dim, **_: nn.LayerNorm(dim, eps=1e-6)
        )
        .double()
        .eval()
    )
    layer = ours.layers[0]
    names = {
        "wq": "attn.q",
        "wk": "attn.k",
        "wv": "attn.v",
        "proj": "attn.proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
        "norm1": "norm1",
        "norm2": "norm2",
    }
    state = {
        f"{timm_name}.{key}": value
        for name, timm_name in names.items()
        for key, value in layer.get_submodule(name).state_dict().items()
    }
    theirs.load_state_dict({**state, "gamma_1": layer.gamma_1, "gamma_2": layer.gamma_2})
    token = theirs(x, ours.cls_token.expand(3, -1, -1))
    torch.testing.assert_close(ours(x).vector, ours.norm(token)[:, 0])
    torch.testing.assert_close(
        ours.norm(torch.cat([token, x], 1))[:, 0], ours.norm(token)[:, 0]
    )  # with or without the patches in the last norm


def test_vit_is_the_attention_of_a_class_token():
    x, ours = patches(dim=32), build("vit", 32)
    tokens = torch.cat([ours.query.expand(3, -1, -1), x], 1)
    q, k, v = (layer(tokens).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (ours.wq, ours.wk, ours.wv))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours(x).vector, mixed[:, 0])
    assert torch.equal(POOLINGS["vit"](32).query, torch.zeros(1, 1, 32))
