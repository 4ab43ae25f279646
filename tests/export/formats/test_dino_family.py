"""Files of DINO, iBOT, AttMask and SimPool in their published layouts: read completely, written back bit for bit."""

import argparse
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from maskwise.errors import UserError
from maskwise.export import load
from maskwise.export.convert import convert
from maskwise.export.formats import dino_family
from maskwise.export.initial_model import InitialModel
from maskwise.nn import ProjectionHead
from support.research_files import DIM, K, X, features, head, network, prefixed, randn, simpool, training_file, vit


def stripped(network):
    keys = {key.removeprefix("module."): value for key, value in network.items()}
    return {key.removeprefix("backbone."): value for key, value in keys.items() if not key.startswith("head.")}


def saved(content, path):
    torch.save(content, path)
    return path


def assert_same_features(encoder, tensors, **options):
    """Compare pooled vector and attention with a float64 forward from the file's tensors."""
    pooled, attention = features(tensors, X, **options)
    output = encoder(X)
    assert torch.allclose(output.pooled.double(), pooled, atol=1e-5)
    assert torch.allclose(output.attention.double(), attention, atol=1e-6)


def assert_equal(first, second):
    """Compare nested dicts: the same keys and bit-equal tensors."""
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    for key, value in first.items():
        if isinstance(value, dict):
            assert_equal(value, second[key])
        elif isinstance(value, torch.Tensor):
            assert value.dtype == second[key].dtype and torch.equal(value, second[key]), key


@pytest.mark.parametrize("layout", ["dino", "ibot", "attmask", "dino_bn"])
@pytest.mark.parametrize("weights", ["teacher", "student"])
def test_training_files_give_equal_features(tmp_path, layout, weights):
    content = training_file(layout)
    assert_same_features(
        load.load(saved(content, tmp_path / "checkpoint.pth"), weights=weights, num_heads=1), stripped(content[weights])
    )


@pytest.mark.parametrize("gamma, beta", [(1.25, True), (2.0, True), (None, True)])
def test_simpool_files_give_equal_features(tmp_path, gamma, beta):
    content = training_file("simpool", gamma=gamma)
    encoder = load.load(saved(content, tmp_path / "simpool.pth"), num_heads=1)
    tensors = stripped(content["teacher"])
    if gamma is None:
        tensors.pop("simpool.beta")
    assert_same_features(encoder, tensors, pool="simpool", gamma=gamma)


@pytest.mark.parametrize("layout", ["dino", "ibot", "attmask", "dino_bn", "simpool"])
def test_conversion_there_and_back_is_bit_exact(tmp_path, layout):
    """File -> folder -> file: networks, heads with the repeated last layer, and centers."""
    content = training_file(layout, gamma=1.25)
    path = saved(content, tmp_path / "theirs.pth")
    lines = convert(path, tmp_path / "ours", num_heads=1)
    assert (
        lines[0].startswith("read")
        and any(line.startswith("matched") for line in lines)
        and any(line == "missing  none" for line in lines)
    )
    assert any("optimizer" in line for line in lines if line.startswith("unused"))
    target = layout.removesuffix("_bn")
    convert(tmp_path / "ours", tmp_path / "back.pth", layout=target)
    with torch.serialization.safe_globals([argparse.Namespace]):  # SimPool's files hold their arguments
        back = torch.load(tmp_path / "back.pth", weights_only=True)
    loss = "ibot_loss" if layout in ("ibot", "attmask") else "dino_loss"
    for part in ("student", "teacher", loss):
        assert_equal(content[part], back[part])
    assert torch.equal(
        load.load(tmp_path / "ours")(X).pooled,
        load.load(path, num_heads=1, **({"gamma": 1.25} if layout == "simpool" else {}))(X).pooled,
    )


def test_counts_of_a_published_ibot_file(tmp_path):
    """ViT-S/16 with a shared head: 161 student and 160 teacher entries; the repeated last layer counts once."""
    torch.manual_seed(0)
    networks = {
        "student": network(vit(mask=True, depth=12), head(alias=True), "module."),
        "teacher": network(vit(depth=12), head(alias=True)),
    }
    assert (len(networks["student"]), len(networks["teacher"])) == (161, 160)
    source = load.read(saved(networks, tmp_path / "ibot.pth"), num_heads=1)
    assert len(source.networks["student"]) + len(source.heads["student"]) == 159
    assert len(source.networks["teacher"]) + len(source.heads["teacher"]) == 158
    assert source.head == {
        "dim": DIM,
        "prototypes": K,
        "hidden": 16,
        "bottleneck": 8,
        "layers": 3,
        "norm": None,
        "patch_prototypes": None,
    }


def test_prefixes(tmp_path):
    """`module.` on the student, on both networks with batch norm; compiled and doubly wrapped networks too."""
    for name, wraps in {
        "plain": ("module.", ""),
        "bn": ("module.", "module."),
        "compiled": ("_orig_mod.module.", "module._orig_mod."),
    }.items():
        torch.manual_seed(0)
        networks = {role: network(vit(), head(), wrap) for role, wrap in zip(("student", "teacher"), wraps)}
        source = load.read(saved(networks, tmp_path / f"{name}.pth"))
        for role in networks:
            plain = stripped({key.replace("_orig_mod.", ""): value for key, value in networks[role].items()})
            assert torch.equal(source.networks[role]["backbone.pos_embed"], plain["pos_embed"])
            assert len(source.heads[role]) == 8


def test_only_prefixes_are_stripped(tmp_path):
    """`module.` inside a key is not removed, so the key is unknown."""
    state = {**vit(), "blocks.0.module.attn.extra": torch.zeros(2)}
    with pytest.raises(UserError, match="has unknown backbone.blocks.0.module.attn.extra"):
        load.load(saved(state, tmp_path / "odd.pth"))


def test_an_unshared_head(tmp_path):
    """The student has a separate last layer for patches, the teacher a shared one, written twice (iBOT's default)."""
    torch.manual_seed(0)
    networks = {
        "student": network(vit(), head(patch_prototypes=K), "module."),
        "teacher": network(vit(), head(alias=True)),
    }
    source = load.read(saved(networks, tmp_path / "ibot.pth"))
    assert source.head["patch_prototypes"] == K
    assert torch.equal(source.heads["teacher"]["last_layer2.weight_v"], source.heads["teacher"]["last_layer.weight_v"])
    assert not torch.equal(
        source.heads["student"]["last_layer2.weight_v"], source.heads["student"]["last_layer.weight_v"]
    )


def test_old_and_new_weight_norm_give_equal_logits(tmp_path):
    """The keys of torch's old weight norm, of its parametrization, and our own layer give equal logits."""
    torch.manual_seed(0)
    tensors = head()
    new = {
        key.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): value
        for key, value in tensors.items()
    }
    layer = weight_norm(nn.Linear(8, K, bias=False))
    layer.load_state_dict(
        {key.removeprefix("last_layer."): value for key, value in tensors.items() if key.startswith("last_layer.")}
    )
    other = weight_norm(nn.Linear(8, K, bias=False))
    other.load_state_dict(
        {key.removeprefix("last_layer."): value for key, value in new.items() if key.startswith("last_layer.")}
    )
    z = torch.randn(5, 8)
    for name, projection in (("old", tensors), ("new", new)):
        source = load.read(saved({"teacher": network(vit(), projection)}, tmp_path / f"{name}.pth"))
        ours = ProjectionHead(**source.head)
        ours.load_state_dict(source.heads["teacher"])
        assert torch.allclose(ours.classify(z), layer(z), atol=1e-6) and torch.allclose(
            ours.classify(z), other(z), atol=1e-6
        )


def test_backbone_files_and_position_tables(tmp_path):
    torch.manual_seed(0)
    tensors = vit()
    for name, content in {
        "flat": tensors,
        "nested": {"state_dict": prefixed(tensors, "backbone.")},
        "model": {"model": prefixed(tensors, "module.backbone.")},
    }.items():
        assert_same_features(load.load(saved(content, tmp_path / f"{name}.pth"), num_heads=1), tensors)
    save_file(tensors, tmp_path / "flat.safetensors")
    assert_same_features(load.load(tmp_path / "flat.safetensors", num_heads=1), tensors)
    # SimPool: 16 rows, or 17 in its first release, with an unused first row
    pooled = {**vit(cls=False, rows=17), **prefixed(simpool(), "simpool.")}
    source = load.read(saved(pooled, tmp_path / "early.pth"), gamma=1.25, num_heads=1)
    assert source.unused["unread position row"] == ["pos_embed[:, 0]"]
    assert_same_features(source.encoder().eval(), pooled, pool="simpool", gamma=1.25)
    later = {**pooled, "pos_embed": pooled["pos_embed"][:, 1:]}
    assert torch.equal(
        load.load(saved(later, tmp_path / "later.pth"), gamma=1.25, num_heads=1)(X).pooled,
        source.encoder().eval()(X).pooled,
    )


@pytest.mark.parametrize("parent", ["simpool.", "gp.pool.", "global_pool.pool.", "head.global_pool.pool."])
def test_simpool_under_any_parent(tmp_path, parent):
    torch.manual_seed(0)
    state = {
        **vit(cls=False),
        **prefixed(simpool(), parent),
        "head.weight": torch.zeros(5, DIM),
        "head.fc.bias": torch.zeros(5),
    }
    state[f"{parent}beta"] = state[f"{parent}beta"].reshape(())  # both [] and [1] occur
    source = load.read(saved({"state_dict": state}, tmp_path / "model.pth.tar"), gamma=1.25, num_heads=1)
    assert source.spec["norm"] == ("after" if parent == "simpool." else "before")
    assert sorted(source.unused["classifier"]) == ["head.fc.bias", "head.weight"]
    assert source.encoder().pooling.beta.shape == (1,)


def test_an_early_key_is_accepted_with_an_alias(tmp_path):
    torch.manual_seed(0)
    pool = simpool()
    state = {
        **vit(cls=False),
        **{f"simpool.{key}".replace("simpool.norm_patches", "norm_gp"): value for key, value in pool.items()},
    }
    path = saved(state, tmp_path / "historic.pth")
    with pytest.raises(UserError, match="norm_gp"):
        load.load(path, gamma=1.25)
    encoder = load.load(path, gamma=1.25, alias="norm_gp=simpool.norm_patches", num_heads=1)
    assert torch.equal(encoder.pooling.norm_patches.weight, pool["norm_patches.weight"])
    with pytest.raises(UserError, match="matches no key"):
        load.load(path, gamma=1.25, alias=["nowhere=simpool"])


def test_the_averaged_copy_is_the_teacher(tmp_path):
    torch.manual_seed(0)
    raw, averaged = vit(), vit()
    path = saved(
        {"epoch": 3, "arch": "vit", "state_dict": raw, "state_dict_ema": averaged, "metric": 70.0},
        tmp_path / "timm.pth.tar",
    )
    assert_same_features(load.load(path, num_heads=1), averaged)
    assert_same_features(load.load(path, weights="student", num_heads=1), raw)


def test_gamma_comes_from_the_arguments_the_yaml_or_the_caller(tmp_path):
    torch.manual_seed(0)
    path = saved({**vit(cls=False), **prefixed(simpool(), "simpool.")}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="does not say which gamma"):
        load.load(path)
    (tmp_path / "configs.yaml").write_text(
        "gamma: 2.0\nscale: !!python/tuple [0.25, 1.0]\nhook: !!python/object/apply:os.system ['touch harm']\n"
    )
    assert (
        load.load(path, num_heads=1).pooling.gamma == 2.0
        and load.load(path, gamma=1.25, num_heads=1).pooling.gamma == 1.25
    )
    assert not list(tmp_path.glob("harm"))
    assert (
        load.load(saved(training_file("simpool", gamma=None), tmp_path / "none.pth"), num_heads=1).pooling.gamma is None
    )


def test_incompatible_heads_are_left_out_and_reported(tmp_path):
    content = training_file("dino", act_in_head="relu")
    source = load.read(saved(content, tmp_path / "relu.pth"))
    assert source.head is None and "relu" in source.headless and any("relu" in name for name in source.unused)
    content = training_file("dino")
    for role, wrap in (("student", "module."), ("teacher", "")):
        content[role][f"{wrap}head.mlp.1.weight"], content[role][f"{wrap}head.mlp.1.bias"] = (
            torch.ones(16),
            torch.zeros(16),
        )
    assert "different structure" in load.read(saved(content, tmp_path / "norm.pth")).headless


class Harm:
    """Pickles as a call that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("place", ["teacher", "args"])
@pytest.mark.parametrize("old", [False, True])
def test_code_in_a_pickle_is_refused_by_name_and_not_executed(tmp_path, place, old):
    harm = Harm(tmp_path / "harm")
    content = training_file("dino")
    if place == "args":
        content["args"] = argparse.Namespace(hook=harm)
    else:
        content["teacher"]["hook"] = harm
    torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(UserError, match="more than tensors") as caught:
        load.load(tmp_path / "bad.pth")
    assert "open" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(harm))
    with pytest.raises(UserError):
        convert(tmp_path / "plain.pth", tmp_path / "out")
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out").exists()


def test_a_namespace_is_data(tmp_path):
    """argparse.Namespace, the one class allowed besides NumPy scalars, keeps its attributes."""
    content = training_file("simpool", gamma=1.5, crops=(0.25, 1.0))
    assert load.load(saved(content, tmp_path / "args.pth"), num_heads=1).pooling.gamma == 1.5


def test_convert_refuses_incomplete_requests(tmp_path):
    path = saved(training_file("ibot"), tmp_path / "ibot.pth")
    cases = [
        ({"to": tmp_path / "x.pth"}, "needs --layout"),
        ({"to": tmp_path / "x.pth", "layout": "moco"}, "unknown"),
        ({"to": tmp_path / "folder", "layout": "dino"}, "--from dino"),
        ({"to": tmp_path / "x.pth", "layout": "simpool"}, "no SimPool weights"),
        ({"to": tmp_path / "x.safetensors", "layout": "ibot"}, "one flat network"),
        ({"to": tmp_path / "x.pth", "layout": "dinov3"}, "no transformer with registers"),
        ({"to": tmp_path / "nowhere" / "x.pth", "layout": "dino"}, "does not exist"),
        ({"to": tmp_path / "x.pth", "layout": "dino", "weights": "both"}, "choose teacher or student"),
    ]
    for options, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            convert(path, **options, num_heads=1)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ibot.pth"]


def test_an_empty_match_is_an_error(tmp_path):
    """A wrong key never leaves random weights in place."""
    for name, content in {
        "wrong key": {"encoder": vit()},
        "empty": {"teacher": {}},
        "no tensors": {"epoch": 3},
    }.items():
        with pytest.raises(UserError):
            load.load(saved(content, tmp_path / f"{name}.pth"))


def test_one_network_to_a_flat_file(tmp_path):
    content = training_file("ibot")
    path = saved(content, tmp_path / "ibot.pth")
    lines = convert(path, tmp_path / "teacher.safetensors", layout="dino", weights="teacher", num_heads=1)
    assert_same_features(load.load(tmp_path / "teacher.safetensors", num_heads=1), stripped(content["teacher"]))
    assert any("student" in line for line in lines if line.startswith(("left out", "unused")))
    convert(path, tmp_path / "folder", weights="student", num_heads=1)
    assert_same_features(load.load(tmp_path / "folder"), stripped(content["student"]))


def test_settings_not_stored_in_a_file_are_noted(tmp_path):
    path = saved(vit(), tmp_path / "dino.pth")
    lines = convert(path, tmp_path / "back.pth", layout="dino", num_heads=4)
    assert any("num_heads=4" in line for line in lines)
    pooled = saved({**vit(cls=False), **prefixed(simpool(), "simpool.")}, tmp_path / "simpool.pth")
    assert any(
        "gamma=1.25" in line
        for line in convert(pooled, tmp_path / "again.pth", layout="simpool", gamma=1.25, num_heads=1)
    )


def test_layouts_are_recognized_by_their_keys(tmp_path):
    for layout in ("dino", "ibot", "simpool"):
        assert load.read(saved(training_file(layout, gamma=2.0), tmp_path / f"{layout}.pth")).layout == layout
    assert set(dino_family.DINO_LAYOUTS) < set(load.FILE_LAYOUTS)


def test_the_command_line_reports_all_keys(tmp_path, capsys):
    from maskwise import cli

    path = saved(training_file("ibot"), tmp_path / "ibot.pth")
    assert cli.main(["convert", str(path), "--to", str(tmp_path / "ours"), "num_heads=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == f"read     {path} as ibot"
        and lines[1] == "matched  79 tensors (teacher 30, student 31, teacher head 8, student head 8, centers 2)"
    )
    assert lines[2] == "missing  none" and lines[-1].startswith("wrote ")
    assert cli.main(["convert", str(tmp_path / "ours"), "--to", str(tmp_path / "x.pth")]) == 2
    assert "a file needs --layout" in capsys.readouterr().err
    assert cli.main(["convert", str(path), "--to", str(tmp_path / "y.pth"), "--layout", "ibot", "num_head=1"]) == 2
    assert "load takes no num_head" in capsys.readouterr().err and not (tmp_path / "y.pth").exists()


def test_mae_with_its_decoder(tmp_path, capfd):
    """The decoder and its mask token are reported; the encoder's features are those of its tensors."""
    torch.manual_seed(0)
    tensors = vit()
    decoder = {
        "mask_token": randn(1, 1, 24),
        "decoder_embed.weight": randn(24, DIM),
        "decoder_pos_embed": randn(1, 17, 24),
        "decoder_blocks.0.attn.qkv.weight": randn(72, 24),
        "decoder_norm.weight": randn(24),
        "decoder_pred.weight": randn(192, 24),
    }
    content = {"model": {**tensors, **decoder}, "epoch": 800, "args": argparse.Namespace(model="mae_vit_base_patch16")}
    encoder = load.load(saved(content, tmp_path / "mae.pth"), num_heads=1)
    assert_same_features(encoder, tensors)
    assert not encoder.backbone.has_mask_token
    line = capfd.readouterr().err
    assert "read as mae" in line and f"{len(tensors)} tensors matched" in line and "decoder 6" in line


def test_a_file_of_one_channel(tmp_path, capfd):
    """Assumed statistics are said; given ones are taken; a run that continues from the file keeps its own."""
    torch.manual_seed(0)
    tensors = vit()
    tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"][:, :1].clone()
    path = saved({"teacher": tensors}, tmp_path / "gray.pth")
    encoder = load.load(path, num_heads=1)
    images = X[:, :1]
    pooled, _ = features(tensors, images)
    assert torch.allclose(encoder(images).pooled.double(), pooled, atol=1e-5)
    assert encoder.mean == pytest.approx([0.449]) and encoder.std == pytest.approx([0.226])
    assert "mean 0.449 and std 0.226 are assumed for its 1 channel" in capfd.readouterr().err
    given = load.load(path, num_heads=1, mean=[0.2], std=[0.3])
    assert (given.mean, given.std) == ((0.2,), (0.3,)) and "assumed" not in capfd.readouterr().err
    assert given.transform(torch.zeros(1, 40, 40, dtype=torch.uint8)).shape == (1, 32, 32)
    start = InitialModel.open(str(path), backbone="vit_tiny_patch16_224")
    own = load.load(path, num_heads=1, mean=[0.2], std=[0.3])
    assert start.adopt_input_stats(own).mean == (0.2,)


def test_student_and_teacher_that_share_memory_are_converted(tmp_path):
    """A first checkpoint, whose networks are one: safetensors refuses shared memory, so it is copied."""
    torch.manual_seed(0)
    tensors = network(vit(), head())
    content = {"student": tensors, "teacher": dict(tensors), "dino_loss": {"center": randn(1, K)}}
    path = saved(content, tmp_path / "checkpoint0000.pth")
    convert(path, tmp_path / "folder", num_heads=1)
    for role in ("teacher", "student"):
        assert_same_features(load.load(tmp_path / "folder", weights=role), stripped(content[role]))
    tied = {**vit(), "norm.bias": tensors["backbone.norm.weight"]}
    tied["norm.weight"] = tied["norm.bias"]
    convert(saved(tied, tmp_path / "tied.pth"), tmp_path / "tied.safetensors", layout="dino", num_heads=1)
    assert_same_features(load.load(tmp_path / "tied.safetensors", num_heads=1), tied)


def test_settings_that_a_file_cannot_hold_are_refused(tmp_path):
    path = saved(vit(), tmp_path / "dino.pth")
    for key, value in {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 1.0,
        "position": "size",
        "image_size": 64,
    }.items():
        with pytest.raises(UserError, match=f"layout ibot does not store {key}"):
            convert(path, tmp_path / "x.pth", layout="ibot", num_heads=1, **{key: value})
    assert not (tmp_path / "x.pth").exists()


def test_two_entries_with_one_role_are_reported(tmp_path, capfd):
    """Of several averaged copies one is read; the others are named."""
    torch.manual_seed(0)
    content = {"teacher": vit(), "model_ema": vit(), "student": vit(), "model": vit()}
    encoder = load.load(saved(content, tmp_path / "x.pth"), num_heads=1)
    assert_same_features(encoder, content["teacher"])
    assert "other entries of the file 2" in capfd.readouterr().err
