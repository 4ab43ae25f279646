"""ResMLP and MLP-Mixer backbones: timm parity, counts, fixed size, drop path, masks, gradients, files."""

import pytest
import timm
import torch
from safetensors.torch import save_file

import maskwise
from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.nn import CLASSIFIERS, POOLINGS, Backbone, Encoder, encoder_from_spec
from maskwise.recipe.reading import read_recipe

FAMILIES = {
    "resmlp": ("resmlp_12_224", {}),
    "mixer": ("mixer_s32_224", {}),
    "gated mixer": ("gmixer_12_224", {}),
    "normed stem": ("mixer_s32_224", {"stem_norm": True}),
}
RECIPE = ("backbone=resmlp_12_224", "masking=none", "pooling=simpool")


def tiny(family="resmlp", depth=3, **options):
    """Build a float64 network of `depth` blocks with perturbed weights for images of 64 x 96."""
    name, arguments = FAMILIES[family]
    torch.manual_seed(0)
    backbone = Backbone(name, image_size=(64, 96), **arguments, **options)
    backbone.blocks, backbone.depth, backbone.drop_path.depth = backbone.blocks[:depth], depth, depth
    with torch.no_grad():
        for value in backbone.parameters():
            value.add_(torch.rand_like(value) * 0.02)
    return backbone.double().eval()


def images(count=2):
    return torch.randn(count, 3, 64, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_stages_equal_timm(family):
    backbone, x = tiny(family), images()
    name, arguments = FAMILIES[family]
    theirs = timm.create_model(name, num_classes=0, img_size=(64, 96), **arguments)
    theirs.blocks = theirs.blocks[:3]
    theirs.double().eval()
    grid = (64 // backbone.patch_size[0], 96 // backbone.patch_size[0])
    theirs.load_state_dict(backbone.state_dict())
    tokens = backbone(x, layers=(0, 1, -1))
    torch.testing.assert_close(backbone.norm(tokens.patches), theirs.forward_features(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        tokens.stages[0], theirs.stem(x).transpose(1, 2).unflatten(2, grid), rtol=1e-11, atol=1e-11
    )
    torch.testing.assert_close(
        tokens.stages[1],
        theirs.forward_intermediates(x, indices=[2], intermediates_only=True)[0],
        rtol=1e-11,
        atol=1e-11,
    )
    assert (
        tokens.stages[2] is tokens.stages[1]
        and tokens.grid == grid == backbone.grid_for((64, 96))
        and tokens.prefix.shape == (2, 0, backbone.dim)
    )
    vector = backbone.norm(tokens.patches.mean(1))
    assert vector.shape == (2, backbone.dim)
    if family == "resmlp":  # an affine map and a mean commute
        torch.testing.assert_close(vector, theirs(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(backbone(x[1:]).patches[0], tokens.patches[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name, count", [("resmlp_12_224", 14_965_872), ("resmlp_24_224", 29_635_680), ("mixer_b16_224", 59_111_472)]
)
def test_parameter_counts(name, count):
    """By hand: stem, blocks of two norms, layers over the positions, layers over the channels, and a last norm."""
    depth, dim, positions = {
        "resmlp_12_224": (12, 384, 196),
        "resmlp_24_224": (24, 384, 196),
        "mixer_b16_224": (12, 768, 196),
    }[name]
    mlp = dim * 4 * dim * 2 + 5 * dim
    if name.startswith("resmlp"):
        block = 2 * 2 * dim + positions * (positions + 1) + mlp + 2 * dim
    else:
        block = 2 * 2 * dim + (positions * dim // 2 * 2 + dim // 2 + positions) + mlp
    expected = 16 * 16 * 3 * dim + dim + depth * block + 2 * dim
    with torch.device("meta"):
        backbone = Backbone(name)
    assert sum(p.numel() for p in backbone.parameters()) == expected == count
    assert (
        backbone.image_size == (224, 224)
        and backbone.patch_size == (16, 16)
        and backbone.stage_dims == (dim, dim)
        and backbone.depth == depth
    )


def test_other_sizes_are_refused():
    backbone = tiny()
    with pytest.raises(UserError, match="^images of 64x64 pixels do not fit resmlp_12_224, which takes 64x96 only: "):
        backbone(images()[..., :64])
    with pytest.raises(UserError, match="do not divide into patches of 16x16"):
        Backbone("resmlp_12_224", image_size=72)
    with pytest.raises(UserError, match="backbone.class_token=True cannot be set: resmlp_12_224 has no class token"):
        tiny(class_token=True)
    with pytest.raises(
        UserError,
        match="^backbone.num_blocks cannot be set: it is part of the name resmlp_12_224; choose another name$",
    ):
        tiny(num_blocks=2)


def test_local_crops_are_refused_when_the_recipe_is_read():
    with pytest.raises(
        UserError,
        match="images of 16x16 pixels do not fit resmlp_12_224.* and use no local crops \\(crops.local_number=0\\)",
    ) as caught:
        read_recipe("debug/tiny", *RECIPE)
    assert "\n" not in str(caught.value)
    recipe = read_recipe("debug/tiny", *RECIPE, "crops.local_number=0")
    assert recipe.backbone.name == "resmlp_12_224" and "backbone.position" not in recipe.values
    with pytest.raises(UserError, match="nothing reads this key"):
        read_recipe("debug/tiny", *RECIPE, "crops.local_number=0", "backbone.num_blocks=2")


def test_drop_path_is_keyed_by_sample_and_leaves_the_shortcut(monkeypatch):
    for family in ("resmlp", "mixer"):
        backbone, x, keys = tiny(family, drop_path=0.5).train(), images(6), keyed_random.make_key(1, torch.arange(6))
        whole = backbone(x, drop_key=keys).patches
        parts = torch.cat([backbone(x[:2], drop_key=keys[:2]).patches, backbone(x[2:], drop_key=keys[2:]).patches])
        torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
        assert (whole != backbone(x, drop_key=keys + 1).patches).flatten(1).any(1).sum() >= 4
        monkeypatch.setattr(
            backbone.drop_path,
            "forward",
            lambda batch, like, key=None, depth=3: torch.zeros(depth, 2, batch, 1, 1, dtype=like.dtype),
        )
        torch.testing.assert_close(backbone(x).patches, backbone.stem.proj(x).flatten(2).transpose(1, 2))


def test_masked_patches_are_replaced_and_affect_all_others():
    backbone, x, mask = tiny(mask_token=True), images(), torch.zeros(2, 24, dtype=torch.bool)
    mask[0, 7] = True
    plain, masked = backbone(x), backbone(x, mask, layers=(0,))
    assert torch.equal(masked.stages[0].flatten(2)[0, :, 7], backbone.mask_token[0]) and torch.equal(
        masked.patches[1], plain.patches[1]
    )
    assert (masked.patches[0] != plain.patches[0]).any(1).all()  # layers over the positions spread it everywhere


@pytest.mark.parametrize("family", ["resmlp", "mixer"])
@pytest.mark.parametrize(
    "classifier, options",
    [
        ("linear", {}),
        ("map", {"dim": 16, "tokens": 2, "heads": 2}),
        ("map", {"dim": 16, "tokens": 2, "heads": 2, "layers": (0, 1)}),
    ],
)
def test_every_parameter_gets_a_gradient(family, classifier, options):
    backbone = tiny(family, drop_path=0.1)
    encoder = Encoder(backbone, POOLINGS["gap"](backbone.dim), norm="before").double().train()
    head = CLASSIFIERS[classifier](encoder, 5, **options).double().train()
    features = encoder(images(4), layers=head.layers, drop_key=torch.arange(4))
    targets = torch.eye(5, dtype=torch.float64)[[0, 1, 2, 3]]
    head.losses(features, targets, torch.nn.functional.cross_entropy, drop_key=torch.arange(4))["loss"].backward()
    for name, parameter in [*encoder.named_parameters(), *head.named_parameters()]:
        assert not parameter.requires_grad or parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(parameter.grad.abs().max() > 0 for parameter in backbone.blocks.parameters())
    assert any(parameter.requires_grad for parameter in encoder.norm.parameters()) == ("layers" not in options)


def test_spec_rebuilds_the_encoder():
    backbone = tiny(depth=12, drop_path=0.2, mask_token=True)
    encoder = Encoder(backbone, POOLINGS["simpool"](backbone.dim)).double().eval()
    rebuilt = encoder_from_spec(encoder.spec()).double().eval()
    assert rebuilt.spec() == encoder.spec()
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt(images()).pooled, encoder(images()).pooled)


def test_files_of_timm_and_of_the_authors_load(tmp_path):
    backbone = tiny(depth=12).float()
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    save_file({**state, "head.weight": torch.zeros(7, 384), "head.bias": torch.zeros(7)}, tmp_path / "timm.safetensors")
    renamed = {}
    for key, value in state.items():
        for ours, theirs in (
            ("stem.", "patch_embed."),
            ("linear_tokens.", "attn."),
            ("mlp_channels.", "mlp."),
            (".ls1", ".gamma_1"),
            (".ls2", ".gamma_2"),
        ):
            key = key.replace(ours, theirs)
        renamed[key] = value.flatten() if key.endswith((".alpha", ".beta")) else value
    save_file(renamed, tmp_path / "authors.safetensors")
    for name in ("timm", "authors"):
        loaded = Backbone("resmlp_12_224", image_size=(64, 96), weights=tmp_path / f"{name}.safetensors").state_dict()
        assert loaded.keys() == state.keys() and all(torch.equal(value, state[key]) for key, value in loaded.items())
    with pytest.raises(UserError, match="does not fit this backbone"):
        Backbone("resmlp_12_224", image_size=64, weights=tmp_path / "timm.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resmlp_12_224", "mixer_s32_224"])
def test_export_loads_in_every_library(name, tmp_path):
    """Export verifies the folder in timm and transformers; loading it is bit-exact."""
    torch.manual_seed(0)
    backbone = Backbone(name, image_size=64)
    encoder = Encoder(backbone, POOLINGS["gap"](backbone.dim), norm="before").eval()
    maskwise.export(encoder, tmp_path / "out", say=None)
    loaded, x = maskwise.load(tmp_path / "out"), images().float()[..., :64]
    assert loaded.spec() == encoder.spec() and torch.equal(loaded(x).pooled, encoder(x).pooled)
    with pytest.raises(UserError, match="images of 96x96 pixels do not fit"):
        maskwise.load(tmp_path / "out", image_size=96)
