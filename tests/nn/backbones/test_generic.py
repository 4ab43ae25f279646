"""Networks that run as a whole: timm parity, training steps, sizes, heads, norms, ranks, files; own modules."""

import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import maskwise
from maskwise.errors import UserError
from maskwise.export.convert import convert
from maskwise.export.folder.timm_layout import timm_layout
from maskwise.methods import METHODS
from maskwise.methods.masking import MASKINGS
from maskwise.nn import CLASSIFIERS, POOLINGS, Backbone, Encoder, ProjectionHead, encoder_from_spec
from maskwise.nn.backbones import timm_registry
from maskwise.nn.backbones.generic import GenericBackbone
from maskwise.nn.backbones.network_output import OutputForm, form_of, token_grid
from support.map_networks import images
from support.tiny_networks import part, run_ranks

TINY = {  # name, image size, timm's arguments
    "map": ("regnetx_002", 64, {}),
    "map, norm in the head": ("edgenext_xx_small", 64, {}),
    "map, channels last": ("mambaout_femto", 64, {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}),
    "map, layers before the classifier": ("mobilenetv3_small_050", 64, {}),
    "tokens": ("hiera_tiny_224", 64, {"embed_dim": 16, "stages": (1, 1, 1, 1)}),
    "tokens, class token": ("cait_xxs24_224", 32, {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "tokens, class token, norm in the head": (
        "beit_base_patch16_224",
        32,
        {"embed_dim": 24, "depth": 2, "num_heads": 3},
    ),
    "tokens, two prefix tokens": ("deit_tiny_distilled_patch16_224", 32, {"embed_dim": 24, "depth": 2}),
    "other blocks": ("vit_small_patch16_18x2_224", 32, {"embed_dim": 24, "depth": 2, "num_heads": 3}),
}
LARGE = ("mobilenetv5", "nasnet", "pnasnet")  # files without a small member
# the smallest member of every timm file whose models run as a whole, with arguments that make it smaller
MEMBERS = {
    "beit": ("beit_base_patch16_224", 64, {"depth": 2}),
    "byoanet": ("lambda_resnet26t", 128, {}),
    "byobnet": ("gernet_s", 64, {}),
    "cait": ("cait_xxs24_224", 64, {"depth": 2}),
    "convit": ("convit_tiny", 64, {}),
    "convmixer": ("convmixer_768_32", 32, {}),
    "cpubone": ("cpubone_t0", 64, {}),
    "csatv2": ("csatv2", 96, {}),
    "cspnet": ("darknet17", 64, {}),
    "cspnext": ("cspnext_s", 64, {}),
    "davit": ("davit_tiny", 64, {"depths": (1, 1, 1, 1)}),
    "deepseek_vit": ("deepseek_vit_412m", 546, {"depth": 1, "embed_dim": 32, "num_heads": 2}),
    "deit": ("deit_tiny_distilled_patch16_224", 64, {"depth": 2}),
    "densenet": ("densenet121", 64, {"block_config": (2, 2, 2, 2)}),
    "dla": ("dla46_c", 64, {}),
    "dpn": ("dpn48b", 64, {}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "efficientformer_v2": ("efficientformerv2_s0", 64, {}),
    "efficientnet": ("efficientnet_cc_b0_4e", 64, {}),
    "efficientvit_mit": ("efficientvit_b0", 64, {}),
    "efficientvit_msra": ("efficientvit_m0", 128, {}),
    "fasternet": ("fasternet_t0", 64, {}),
    "fastvit": ("fastvit_t8", 64, {}),
    "focalnet": ("focalnet_tiny_srf", 32, {}),
    "gcvit": ("gcvit_xxtiny", 64, {}),
    "gemma4_vit": ("gemma4_vit_167m", 64, {"depth": 1}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "hardcorenas": ("hardcorenas_a", 64, {}),
    "hgnet": ("hgnetv2_b0", 64, {}),
    "hiera": ("hiera_tiny_224", 64, {"stages": (1, 1, 1, 1)}),
    "hieradet_sam2": ("hieradet_small", 64, {}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "iformer": ("iformer_t", 64, {}),
    "inception_next": ("inception_next_atto", 64, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 96, {}),
    "inception_v3": ("inception_v3", 96, {}),
    "inception_v4": ("inception_v4", 96, {}),
    "lcnetv2": ("lcnetv2_small", 64, {}),
    "levit": ("levit_128s", 224, {}),
    "lowformer": ("lowformer_b0", 64, {}),
    "mambaout": ("mambaout_femto", 64, {}),
    "maxxvit": ("test_coatnet", 64, {}),
    "metaformer": ("poolformer_s12", 64, {}),
    "mlp_mixer": ("gmlp_ti16_224", 64, {}),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}),
    "mobilevit": ("mobilevitv2_050", 64, {}),
    "mobilenetv5": ("mobilenetv5_300m", 64, {}),
    "mvitv2": ("mvitv2_tiny", 64, {}),
    "naflexvit": ("naflexvit_base_patch16_gap", 64, {"depth": 1, "embed_dim": 64, "num_heads": 4}),
    "nasnet": ("nasnetalarge", 96, {}),
    "nest": ("nest_tiny_jx", 64, {}),
    "nextvit": ("nextvit_small", 64, {}),
    "nfnet": ("nfnet_l0", 64, {}),
    "pnasnet": ("pnasnet5large", 96, {}),
    "pvt_v2": ("pvt_v2_b0", 64, {}),
    "qwen3_vit": ("qwen3_vit_88m", 64, {"depth": 1}),
    "rdnet": ("rdnet_tiny", 64, {}),
    "regnet": ("regnetx_002", 64, {}),
    "repghost": ("repghostnet_050", 64, {}),
    "repvit": ("repvit_m0_9", 64, {}),
    "res2net": ("res2next50", 64, {}),
    "resnest": ("resnest14d", 64, {}),
    "resnetv2": ("resnetv2_18", 64, {}),
    "rexnet": ("rexnet_100", 64, {}),
    "selecsls": ("selecsls42", 96, {}),
    "senet": ("legacy_seresnet18", 64, {}),
    "sequencer": ("sequencer2d_s", 64, {"layers": (1, 1, 1, 1)}),
    "shvit": ("shvit_s1", 64, {}),
    "sknet": ("skresnet18", 64, {}),
    "starnet": ("starnet_s1", 64, {}),
    "swiftformer": ("swiftformer_xs", 64, {}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 64, {"depths": (1, 1, 1, 1)}),
    "tiny_vit": ("tiny_vit_5m_224", 64, {}),
    "tresnet": ("tresnet_m", 64, {}),
    "twins": ("twins_svt_small", 64, {}),
    "tnt": ("tnt_s_patch16_224", 64, {"depth": 2}),
    "vgg": ("vgg11", 64, {}),
    "visformer": ("visformer_tiny", 64, {}),
    "vision_transformer": ("vit_small_patch16_18x2_224", 64, {"depth": 2}),
    "vision_transformer_relpos": ("test_vit_relpos", 64, {}),
    "vision_transformer_sam": ("samvit_base_patch16", 64, {"depth": 1}),
    "volo": ("volo_d1_224", 64, {}),
    "vovnet": ("vovnet39a", 64, {}),
    "xception": ("legacy_xception", 64, {}),
    "xception_aligned": ("xception41", 64, {}),
    "xcit": ("xcit_nano_12_p8_224", 64, {}),
}


def tiny(kind, **options):
    name, size, arguments = TINY[kind]
    torch.manual_seed(0)
    return Backbone(name, **{"image_size": size, **arguments, **options})


def twin(backbone, name, size, arguments):
    """Build the timm model with a backbone's weights; layers of its head keep weights of their own."""
    family = timm_registry.family_of(name)
    own = {"img_size": size} if "image_size" in family.timm_names else {}
    own |= {"dynamic_img_size": True} if "dynamic_img_size" in family.timm_arguments else {}
    model = timm.create_model(name, num_classes=0, **own, **arguments).to(next(backbone.parameters()).dtype).eval()
    state = {key.removeprefix("model."): value for key, value in backbone.model.state_dict(prefix="model.").items()}
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    in_head = {*backbone.head_tensors, *(f"{backbone.norm_place}.{part}" for part in ("weight", "bias"))}
    assert set(missing.missing_keys) <= in_head
    return model


def flat(output, backbone):
    """Return a timm output as [B, T, D], its axes told apart by the width."""
    if output.ndim == 3:
        return output
    return output.flatten(1, 2) if output.shape[1] != backbone.dim else output.flatten(2).transpose(1, 2)


def dino(encoder):
    """Return the method on an encoder."""
    head = ProjectionHead(encoder.dim, 16, hidden=16, bottleneck=6)
    head.to(next(encoder.parameters()).dtype)
    return METHODS["dino"](encoder, head, masking=MASKINGS["none"]()).train()


def two_steps(method, size, local_size, dtype):
    """Train two steps on four images; returns the losses."""
    losses = []
    for step in range(2):
        global_crops = images(size, 8, dtype=dtype) + step
        local_crops = images(local_size or size, 8, dtype=dtype)[: 8 if local_size else 0]
        method.zero_grad()
        out = method(global_crops, local_crops, step=step, epoch=0, sample_ids=torch.arange(4))
        out["loss"].backward()
        for parameter in method.student.parameters():
            if parameter.requires_grad:
                parameter.data.sub_(0.01 * parameter.grad)
        method.update_teacher(0.9)
        losses.append(float(out["loss"].detach()))
    return losses


def assert_trains(backbone, size):
    """Check two steps of DINO and one supervised batch: gradients of all that trains, no draw from a generator."""
    dtype = next(backbone.parameters()).dtype
    method = dino(Encoder(backbone, POOLINGS["gap"](backbone.dim)))
    student = method.student.encoder
    state = torch.get_rng_state()
    assert all(map(torch.isfinite, map(torch.tensor, two_steps(method, size, None, dtype))))
    assert torch.equal(torch.get_rng_state(), state)
    teacher = method.teacher.encoder.state_dict()
    assert teacher.keys() == student.state_dict().keys()
    for name, parameter in student.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None and parameter.grad.isfinite().all(), name
    head = CLASSIFIERS["linear"](student, 5).to(dtype).train()
    targets = torch.eye(5, dtype=dtype)[:4]
    head.losses(student(images(size, 4, dtype=dtype)), targets, nn.functional.cross_entropy)["loss"].backward()


@pytest.mark.parametrize("kind", TINY)
def test_tokens_equal_timm_and_train(kind):
    backbone = tiny(kind, class_token=None).double()
    name, size, arguments = TINY[kind]
    assert isinstance(backbone, GenericBackbone) and backbone.image_size == (size, size)
    backbone.eval()
    tokens, theirs = backbone(images(size), layers=(0,)), twin(backbone, *TINY[kind]).forward_features(images(size))
    expected = flat(theirs, backbone)
    torch.testing.assert_close(torch.cat([tokens.prefix, tokens.patches], 1), expected, rtol=1e-12, atol=1e-12)
    assert tokens.prefix.shape[1] == backbone.num_prefix and tokens.grid == backbone.grid_for((size, size))
    assert torch.equal(tokens.stages[0].flatten(2).transpose(1, 2), tokens.patches)
    assert tokens.stages[0].shape[2:] == tokens.grid and backbone.stage_dims == (backbone.dim,)
    assert_trains(backbone, size)


@pytest.mark.long
def test_members_are_of_every_file():
    files = {file for file, runs in timm_registry.supported_models() if runs == "whole"}
    assert files - {"vision_transformer_hybrid", "vitamin"} <= {*MEMBERS}
    assert all(timm_registry.timm_file(name) == file for file, (name, _, _) in MEMBERS.items())


@pytest.mark.parametrize(
    "file", [pytest.param(file, marks=pytest.mark.long if file in LARGE else pytest.mark.slow) for file in MEMBERS]
)
def test_a_member_of_every_file(file):
    name, size, arguments = MEMBERS[file]
    torch.manual_seed(0)
    backbone = Backbone(name, image_size=size, **arguments).eval()
    assert isinstance(backbone, GenericBackbone)
    x = images(size, dtype=torch.float32)
    with torch.no_grad():
        tokens, theirs = backbone(x), twin(backbone, name, size, arguments).forward_features(x)
    torch.testing.assert_close(torch.cat([tokens.prefix, tokens.patches], 1), flat(theirs, backbone))
    assert_trains(backbone, size)


def test_two_ranks_are_one_process():
    """Loss, weights and teacher over two steps of a network without batch norm, float64."""

    def build():
        backbone = tiny("tokens, class token", class_token=False)
        return dino(Encoder(backbone, POOLINGS["simpool"](backbone.dim)).double())

    def train(rank, all_sum, ranks, method):
        method.all_sum, method.world_size = all_sum, ranks
        rows, losses = list(range(rank * 4 // ranks, (rank + 1) * 4 // ranks)), []
        for step in range(2):
            crops, ids = images(32, 8) + step, torch.arange(4)[rows]
            method.zero_grad()
            out = method(part(crops, rows, 4), crops[:0], step=step, epoch=0, sample_ids=ids)
            out["loss"].backward()
            for parameter in method.student.parameters():
                if parameter.requires_grad:
                    parameter.data.sub_(0.5 * all_sum(parameter.grad) / ranks)
            method.update_teacher(0.8)
            losses.append(float(all_sum(out["loss"].detach())) / ranks)
        return losses, {key: value.clone() for key, value in method.state_dict().items()}

    built = [build() for _ in range(2)]
    losses, state = train(0, lambda tensor: tensor.detach(), 1, build())
    for other_losses, other in run_ranks(2, lambda rank, all_sum: train(rank, all_sum, 2, built[rank])):
        assert other_losses == pytest.approx(losses, rel=1e-9)
        torch.testing.assert_close(other, state, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["map, norm in the head", "tokens, class token, norm in the head"])
def test_a_norm_in_the_head_is_the_final_norm(kind):
    """Pool, then norm: the vector is timm's own, computed by its head."""
    backbone = tiny(kind).double().eval()
    name, size, arguments = TINY[kind]
    norm = backbone.norm
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, backbone.dim))
        norm.bias.copy_(torch.linspace(-1, 1, backbone.dim))
    encoder, model = Encoder(backbone, POOLINGS["gap"](backbone.dim)).eval(), twin(backbone, name, size, arguments)
    model.get_submodule(backbone.norm_place).load_state_dict(norm.state_dict())
    torch.testing.assert_close(encoder(images(size)).pooled, model(images(size)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pooling", ["cls", "simpool", "gem", "max"])
def test_poolings(pooling):
    backbone = tiny("tokens, class token", class_token=None if pooling == "cls" else False)
    encoder = Encoder(backbone, POOLINGS[pooling](backbone.dim)).double().eval()
    features = encoder(images(32))
    assert features.pooled.shape == (2, 24) and features.patches.shape == (2, 4, 24)
    assert (features.attention is None) == (pooling != "simpool")
    if pooling == "cls":
        assert torch.equal(features.pooled, backbone(images(32)).prefix[:, 0])
    frozen = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    only = {name for name, _ in backbone.named_parameters() if "cls_token" in name or "blocks_token_only" in name}
    assert frozen == (set() if pooling == "cls" else only)


def test_dropout_and_drop_path_are_off():
    for name in ("nest_tiny_jx", "rexnet_100"):  # timm's defaults are a drop path of .5 and a dropout of .2
        with torch.device("meta"):
            backbone = Backbone(name)
        rates = [
            getattr(m, "p", getattr(m, "drop_prob", 0.0)) for m in backbone.modules() if "Drop" in type(m).__name__
        ]
        assert not any(rates)


def test_what_is_refused():
    fixed, any_size = tiny("tokens, class token"), tiny("map")
    with pytest.raises(UserError) as caught:
        fixed.check_size((48, 48))
    assert str(caught.value).startswith("images of 48x48 pixels do not fit cait_xxs24_224, built for 32x32 (Input ")
    assert str(caught.value).endswith("use no local crops (crops.local_number=0), or choose another network")
    assert any_size.grid_for((96, 64)) == (3, 2) == tuple(any_size(images(96, width=64).float()).grid)
    for options, words in (
        ({"drop_path": 0.1}, r"backbone.drop_path=0.1 cannot be set: the drop paths of regnetx_002 draw from"),
        ({"mask_token": True}, "regnetx_002 has no patch tokens to mask"),
        ({"class_token": True}, "backbone.class_token=True cannot be set: regnetx_002 has no class token"),
        ({"position": "size"}, "backbone.position=size cannot be set"),
        ({"patch_size": 8}, "backbone.patch_size=8 cannot be set: regnetx_002 has no patch size"),
        ({"num_classes": 3}, "backbone.num_classes cannot be set"),
        ({"depht": 3}, "timm cannot build regnetx_002 with depht=3"),
    ):
        with pytest.raises(UserError, match=words):
            tiny("map", **options)
    with pytest.raises(UserError, match="has no patch tokens to mask"):
        any_size(images().float(), torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(UserError, match="pooling cls needs a class token and regnetx_002 has none: choose pooling sim"):
        Encoder(any_size, POOLINGS["cls"](any_size.dim))
    with pytest.raises(UserError, match="supports neither speed.compile nor speed.checkpointing"):
        any_size.set_execution(checkpointing="blocks")


def test_grids_of_tokens():
    assert (
        token_grid(49, (224, 224)) == (7, 7) and token_grid(6, (64, 96)) == (2, 3) and token_grid(6, (96, 64)) == (3, 2)
    )
    assert token_grid(50, (224, 224)) is None and token_grid(0, (32, 32)) is None
    assert token_grid(12, (50, 66)) == (3, 4)  # strides that round up
    form = OutputForm(4, True, 5)
    assert form.grid((2, 3, 4, 5), (48, 64)) == (3, 4) and form.grid((2, 5, 3, 4), (48, 64)) is None
    with pytest.raises(UserError, match=r"^net returns \[2, 5\] for images of 32x32 pixels; a backbone returns a map"):
        form_of(torch.zeros(2, 5), nn.Linear(1, 1), "net", (32, 32))


def test_caches_of_a_trial_do_not_outlive_it():
    """LeViT caches attention biases in eval mode; weights loaded after the trial must count."""
    backbone = Backbone("levit_128s", image_size=224).eval()
    backbone.check_size((224, 224))
    with pytest.raises(UserError):
        backbone.check_size((96, 96))
    assert not any(getattr(module, "attention_bias_cache", None) for module in backbone.modules())


@pytest.mark.parametrize("kind", ["map, layers before the classifier", "map, norm in the head"])
def test_files_of_timm_load(kind, tmp_path):
    name, size, arguments = TINY[kind]
    model = timm.create_model(name, **arguments)  # with its classifier
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    backbone = tiny(kind, weights=tmp_path / "timm.safetensors").eval()
    tokens = backbone(images(size).float()).patches
    torch.testing.assert_close(tokens, flat(model.eval().forward_features(images(size).float()), backbone))
    if backbone.norm_place != "norm":
        assert torch.equal(backbone.norm.weight, model.get_submodule(backbone.norm_place).weight)
    save_file({"stem.conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not fit this backbone"):
        tiny(kind, weights=tmp_path / "other.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
def test_export_loads_in_every_library(kind, tmp_path):
    """Export verifies the folder in timm and transformers; layers of timm's head are zeros; loading is bit-exact."""
    backbone, size = tiny(kind), TINY[kind][1]
    pooling = "cls" if backbone.has_class_token else "simpool"
    encoder = Encoder(backbone, POOLINGS[pooling](backbone.dim)).eval()
    maskwise.export(encoder, tmp_path / "out", say=None)
    loaded, x = maskwise.load(tmp_path / "out"), images(size).float()
    assert loaded.spec() == encoder.spec() and torch.equal(loaded(x).pooled, encoder(x).pooled)
    rebuilt = encoder_from_spec(encoder.spec()).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt(x).pooled, encoder(x).pooled)


def own_module(tmp_path, monkeypatch, text):
    (tmp_path / "own_network.py").write_text("import torch\nfrom torch import nn\n" + text)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("own_network", None)


NETWORK = """
class Small(nn.Module):
    def __init__(self, width: int = 8, depth: int = 1):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*(nn.Conv2d(width, width, 1) for _ in range(depth)))
        self.head = nn.Linear(width, 10)
    def forward(self, images):
        return self.blocks(self.stem(images).relu())
class Tokens(Small):
    num_prefix_tokens = 1
    def forward(self, images):
        tokens = super().forward(images).flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
class Dropping(Small):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)
class Pooled(Small):
    def forward(self, images):
        return super().forward(images).mean((2, 3))
class Failing(Small):
    def __init__(self):
        raise RuntimeError("no such file")
class Other:
    pass
"""


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    own_module(tmp_path, monkeypatch, NETWORK)
    backbone = Backbone("own_network:Small", image_size=32, width=12)
    tokens, x = backbone(images(32).float()), images(32).float()
    assert backbone.dim == 12 and tokens.grid == (8, 8) and backbone.patch_size == (4, 4)
    assert torch.equal(tokens.patches, backbone.model(x).flatten(2).transpose(1, 2))
    assert {n for n, p in backbone.named_parameters() if not p.requires_grad} == {
        "model.head.weight",
        "model.head.bias",
    }
    assert_trains(backbone, 32)
    with_prefix = Backbone("own_network:Tokens", image_size=32)
    tokens = with_prefix(x)
    assert tokens.prefix.shape == (2, 1, 8) and tokens.patches.shape == (2, 64, 8) and with_prefix.has_class_token
    encoder = Encoder(with_prefix, POOLINGS["cls"](8)).eval()
    assert torch.equal(encoder(x).pooled, tokens.prefix[:, 0])
    rebuilt = encoder_from_spec(encoder.spec())
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt(x).pooled, encoder(x).pooled)
    for name, options, words in (
        ("own_network:Small", {"widht": 3}, "backbone.widht cannot be set: own_network:Small takes depth, width"),
        ("own_network:Small", {"patch_size": 4}, "backbone.patch_size=4 cannot be set"),
        ("own_network:Small", {"drop_path": 0.1}, "backbone.drop_path=0.1 cannot be set"),
        ("own_network:Dropping", {}, "own_network:Dropping holds a Dropout of 0.1, which draws from the global gen"),
        ("own_network:Pooled", {}, r"own_network:Pooled returns \[2, 8\] for images of 32x32 pixels"),
        ("own_network:Failing", {}, r"own_network:Failing\(\) cannot be built: no such file"),
        ("own_network:Other", {}, "`own_network:Other` is no torch.nn.Module"),
        ("own_network:Absent", {}, "`own_network:Absent` cannot be imported"),
    ):
        with pytest.raises(UserError, match=words):
            Backbone(name, image_size=32, **options)
    with pytest.raises(UserError, match="own_network:Tokens is no timm model and cannot be exported: share its run"):
        maskwise.export(encoder, tmp_path / "out", say=None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["map, norm in the head", "tokens, two prefix tokens"])
def test_a_timm_file_is_timms_own(kind, tmp_path):
    backbone, (name, size, arguments) = tiny(kind), TINY[kind]
    encoder = Encoder(backbone, POOLINGS["gap"](backbone.dim)).eval()
    maskwise.export(encoder, tmp_path / "out", say=None)
    convert(tmp_path / "out", tmp_path / "timm.safetensors", layout="timm")
    model = timm.create_model(name, num_classes=0, **timm_layout(encoder).arguments)
    model.load_state_dict(load_file(tmp_path / "timm.safetensors"))
    again = Backbone(name, image_size=size, weights=tmp_path / "timm.safetensors", **arguments)
    own = {key.removeprefix("backbone."): value for key, value in encoder.state_dict().items()}
    assert all(torch.equal(value, own[key]) for key, value in again.state_dict().items())
