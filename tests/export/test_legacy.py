"""Files of DINO, iBOT, AttMask and SimPool in the layouts they were published in: read, kept whole, written back bit for bit."""

import argparse
import pickle

import pytest
import torch
from export.published import DIM, K, X, features, head, network, prefixed, simpool, training_file, vit
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from maskwise.export import layouts, legacy
from maskwise.export.convert import convert
from maskwise.functional.errors import UserError
from maskwise.nn import ProjectionHead


def stripped(network):
    keys = {key.removeprefix("module."): value for key, value in network.items()}
    return {key.removeprefix("backbone."): value for key, value in keys.items() if not key.startswith("head.")}


def saved(content, path):
    torch.save(content, path)
    return path


def agree(encoder, tensors, **options):
    """The encoder's pooled vector and attention are those of a float64 forward straight from the file's tensors."""
    pooled, attention = features(tensors, X, **options)
    seen = encoder(X)
    assert torch.allclose(seen.pooled.double(), pooled, atol=1e-5) and torch.allclose(seen.attention.double(), attention, atol=1e-6)


def assert_equal(one, two):
    """Nested dicts hold the same keys and bit-equal tensors."""
    assert one.keys() == two.keys(), one.keys() ^ two.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_equal(value, two[key])
        elif isinstance(value, torch.Tensor):
            assert value.dtype == two[key].dtype and torch.equal(value, two[key]), key


@pytest.mark.parametrize("layout", ["dino", "ibot", "attmask", "dino_bn"])
@pytest.mark.parametrize("weights", ["teacher", "student"])
def test_training_files_give_equal_features(tmp_path, layout, weights):
    content = training_file(layout)
    agree(layouts.load(saved(content, tmp_path / "checkpoint.pth"), weights=weights), stripped(content[weights]))


@pytest.mark.parametrize("gamma, beta", [(1.25, True), (2.0, True), (None, True)])
def test_simpool_files_give_equal_features(tmp_path, gamma, beta):
    content = training_file("simpool", gamma=gamma)
    encoder = layouts.load(saved(content, tmp_path / "simpool.pth"))
    tensors = stripped(content["teacher"])
    if gamma is None:
        tensors.pop("simpool.beta")
    agree(encoder, tensors, pool="simpool", gamma=gamma)


@pytest.mark.parametrize("layout", ["dino", "ibot", "attmask", "dino_bn", "simpool"])
def test_there_and_back_is_bit_exact(tmp_path, layout):
    """Fact 65: legacy -> ours -> legacy; networks, heads with their aliases, and centers."""
    content = training_file(layout, gamma=1.25)
    path = saved(content, tmp_path / "theirs.pth")
    lines = convert(path, tmp_path / "ours")
    assert lines[0].startswith("read") and any(line.startswith("matched") for line in lines) and any(line == "missing  none" for line in lines)
    assert any("optimizer" in line for line in lines if line.startswith("unused"))
    target = layout.removesuffix("_bn")
    convert(tmp_path / "ours", tmp_path / "back.pth", layout=target)
    with torch.serialization.safe_globals([argparse.Namespace]):  # SimPool's files hold their settings so
        back = torch.load(tmp_path / "back.pth", weights_only=True)
    loss = "ibot_loss" if layout in ("ibot", "attmask") else "dino_loss"
    for part in ("student", "teacher", loss):
        assert_equal(content[part], back[part])
    assert torch.equal(layouts.load(tmp_path / "ours")(X).pooled, layouts.load(path, **({"gamma": 1.25} if layout == "simpool" else {}))(X).pooled)


def test_counts_of_a_published_ibot_file(tmp_path):
    """Fact 63: ViT-S/16 with a shared head has 161 student and 160 teacher entries; alias pairs are identical and count once."""
    torch.manual_seed(0)
    networks = {
        "student": network(vit(mask=True, depth=12), head(alias=True), "module."),
        "teacher": network(vit(depth=12), head(alias=True)),
    }
    assert (len(networks["student"]), len(networks["teacher"])) == (161, 160)
    source = layouts.read(saved(networks, tmp_path / "ibot.pth"))
    assert len(source.networks["student"]) + len(source.heads["student"]) == 159
    assert len(source.networks["teacher"]) + len(source.heads["teacher"]) == 158
    assert source.head == {"dim": DIM, "prototypes": K, "hidden": 16, "bottleneck": 8, "layers": 3, "norm": None, "patch_prototypes": None}


def test_prefixes(tmp_path):
    """Fact 64: `module.` on the student, none on the teacher, on both with a batch norm; compiled and doubly wrapped ones as well."""
    for name, wraps in {"plain": ("module.", ""), "bn": ("module.", "module."), "compiled": ("_orig_mod.module.", "module._orig_mod.")}.items():
        torch.manual_seed(0)
        networks = {role: network(vit(), head(), wrap) for role, wrap in zip(("student", "teacher"), wraps)}
        source = layouts.read(saved(networks, tmp_path / f"{name}.pth"))
        for role in networks:
            plain = stripped({key.replace("_orig_mod.", ""): value for key, value in networks[role].items()})
            assert torch.equal(source.networks[role]["backbone.pos_embed"], plain["pos_embed"])
            assert len(source.heads[role]) == 8


def test_only_prefixes_are_stripped(tmp_path):
    """A name with `module.` inside it stays what it is, and is then unknown."""
    state = {**vit(), "blocks.0.module.attn.extra": torch.zeros(2)}
    with pytest.raises(UserError, match="has unknown backbone.blocks.0.module.attn.extra"):
        layouts.load(saved(state, tmp_path / "odd.pth"))


def test_an_unshared_head(tmp_path):
    """iBOT's defaults: the student has a last layer for patches, the teacher writes one layer twice."""
    torch.manual_seed(0)
    networks = {"student": network(vit(), head(patch_prototypes=K), "module."), "teacher": network(vit(), head(alias=True))}
    source = layouts.read(saved(networks, tmp_path / "ibot.pth"))
    assert source.head["patch_prototypes"] == K
    assert torch.equal(source.heads["teacher"]["last_layer2.weight_v"], source.heads["teacher"]["last_layer.weight_v"])
    assert not torch.equal(source.heads["student"]["last_layer2.weight_v"], source.heads["student"]["last_layer.weight_v"])


def test_old_and_new_weight_norm_give_equal_logits(tmp_path):
    """Fact 68: the old names, the names of torch's parametrisation, and our own layer compute the same."""
    torch.manual_seed(0)
    tensors = head()
    new = {key.replace("weight_g", "parametrizations.weight.original0").replace("weight_v", "parametrizations.weight.original1"): value for key, value in tensors.items()}
    layer = weight_norm(nn.Linear(8, K, bias=False))
    layer.load_state_dict({key.removeprefix("last_layer."): value for key, value in tensors.items() if key.startswith("last_layer.")})
    other = weight_norm(nn.Linear(8, K, bias=False))
    other.load_state_dict({key.removeprefix("last_layer."): value for key, value in new.items() if key.startswith("last_layer.")})
    z = torch.randn(5, 8)
    for name, each in (("old", tensors), ("new", new)):
        source = layouts.read(saved({"teacher": network(vit(), each)}, tmp_path / f"{name}.pth"))
        ours = ProjectionHead(**source.head)
        ours.load_state_dict(source.heads["teacher"])
        assert torch.allclose(ours.classify(z), layer(z), atol=1e-6) and torch.allclose(ours.classify(z), other(z), atol=1e-6)


def test_backbone_files_and_position_tables(tmp_path):
    torch.manual_seed(0)
    tensors = vit()
    for name, content in {"flat": tensors, "nested": {"state_dict": prefixed(tensors, "backbone.")}, "model": {"model": prefixed(tensors, "module.backbone.")}}.items():
        agree(layouts.load(saved(content, tmp_path / f"{name}.pth")), tensors)
    save_file(tensors, tmp_path / "flat.safetensors")
    agree(layouts.load(tmp_path / "flat.safetensors"), tensors)
    # SimPool: 16 rows, or the 17 of its first release, whose first row nobody reads
    pooled = {**vit(cls=False, rows=17), **prefixed(simpool(), "simpool.")}
    source = layouts.read(saved(pooled, tmp_path / "early.pth"), gamma=1.25)
    assert source.unused["unread position row"] == ["pos_embed[:, 0]"]
    agree(source.encoder().eval(), pooled, pool="simpool", gamma=1.25)
    later = {**pooled, "pos_embed": pooled["pos_embed"][:, 1:]}
    assert torch.equal(layouts.load(saved(later, tmp_path / "later.pth"), gamma=1.25)(X).pooled, source.encoder().eval()(X).pooled)


@pytest.mark.parametrize("parent", ["simpool.", "gp.pool.", "global_pool.pool.", "head.global_pool.pool."])
def test_simpool_under_any_parent(tmp_path, parent):
    torch.manual_seed(0)
    state = {**vit(cls=False), **prefixed(simpool(), parent), "head.weight": torch.zeros(5, DIM), "head.fc.bias": torch.zeros(5)}
    state[f"{parent}beta"] = state[f"{parent}beta"].reshape(())  # [] and [1] are both met
    source = layouts.read(saved({"state_dict": state}, tmp_path / "model.pth.tar"), gamma=1.25)
    assert source.spec["norm"] == ("after" if parent == "simpool." else "before")
    assert sorted(source.unused["classifier"]) == ["head.fc.bias", "head.weight"]
    assert source.encoder().pooling.beta.shape == (1,)


def test_a_historic_name_is_accepted_when_it_is_named(tmp_path):
    torch.manual_seed(0)
    pool = simpool()
    state = {**vit(cls=False), **{f"simpool.{key}".replace("simpool.norm_patches", "norm_gp"): value for key, value in pool.items()}}
    path = saved(state, tmp_path / "historic.pth")
    with pytest.raises(UserError, match="norm_gp"):
        layouts.load(path, gamma=1.25)
    encoder = layouts.load(path, gamma=1.25, alias="norm_gp=simpool.norm_patches")
    assert torch.equal(encoder.pooling.norm_patches.weight, pool["norm_patches.weight"])
    with pytest.raises(UserError, match="matches no key"):
        layouts.load(path, gamma=1.25, alias=["nowhere=simpool"])


def test_the_averaged_copy_is_the_teacher(tmp_path):
    torch.manual_seed(0)
    raw, averaged = vit(), vit()
    path = saved({"epoch": 3, "arch": "vit", "state_dict": raw, "state_dict_ema": averaged, "metric": 70.0}, tmp_path / "timm.pth.tar")
    agree(layouts.load(path), averaged)
    agree(layouts.load(path, weights="student"), raw)


def test_gamma_comes_from_the_arguments_the_yaml_beside_or_the_caller(tmp_path):
    torch.manual_seed(0)
    path = saved({**vit(cls=False), **prefixed(simpool(), "simpool.")}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="does not say which gamma"):
        layouts.load(path)
    (tmp_path / "configs.yaml").write_text("gamma: 2.0\nscale: !!python/tuple [0.25, 1.0]\nhook: !!python/object/apply:os.system ['touch harm']\n")
    assert layouts.load(path).pooling.gamma == 2.0 and layouts.load(path, gamma=1.25).pooling.gamma == 1.25
    assert not list(tmp_path.glob("harm"))
    assert layouts.load(saved(training_file("simpool", gamma=None), tmp_path / "none.pth")).pooling.gamma is None


def test_heads_that_cannot_be_held_are_left_out_and_said(tmp_path):
    content = training_file("dino", act_in_head="relu")
    source = layouts.read(saved(content, tmp_path / "relu.pth"))
    assert source.head is None and "relu" in source.headless and any("relu" in name for name in source.unused)
    content = training_file("dino")
    for role, wrap in (("student", "module."), ("teacher", "")):
        content[role][f"{wrap}head.mlp.1.weight"], content[role][f"{wrap}head.mlp.1.bias"] = torch.ones(16), torch.zeros(16)
    assert "built otherwise" in layouts.read(saved(content, tmp_path / "norm.pth")).headless


class Harm:
    """Pickles as a call that would leave a file behind."""

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
        layouts.load(tmp_path / "bad.pth")
    assert "open" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(harm))
    with pytest.raises(UserError):
        convert(tmp_path / "plain.pth", tmp_path / "out")
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out").exists()


def test_a_namespace_is_data(tmp_path):
    """The one class let in beside numbers: its attributes arrive, and none of its methods can have been replaced by code."""
    content = training_file("simpool", gamma=1.5, crops=(0.25, 1.0))
    assert layouts.load(saved(content, tmp_path / "args.pth")).pooling.gamma == 1.5


def test_convert_asks_for_what_it_needs(tmp_path):
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
            convert(path, **options)
        assert "\n" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["ibot.pth"]


def test_an_empty_match_is_an_error(tmp_path):
    """Pitfall 72: never random weights under a wrong key."""
    for name, content in {"wrong key": {"encoder": vit()}, "empty": {"teacher": {}}, "no tensors": {"epoch": 3}}.items():
        with pytest.raises(UserError):
            layouts.load(saved(content, tmp_path / f"{name}.pth"))


def test_one_network_to_a_flat_file(tmp_path):
    content = training_file("ibot")
    path = saved(content, tmp_path / "ibot.pth")
    lines = convert(path, tmp_path / "teacher.safetensors", layout="dino", weights="teacher")
    agree(layouts.load(tmp_path / "teacher.safetensors"), stripped(content["teacher"]))
    assert any("student" in line for line in lines if line.startswith(("left out", "unused")))
    convert(path, tmp_path / "folder", weights="student")
    agree(layouts.load(tmp_path / "folder"), stripped(content["student"]))


def test_what_a_file_cannot_say_is_said(tmp_path):
    path = saved(vit(), tmp_path / "dino.pth")
    lines = convert(path, tmp_path / "back.pth", layout="dino", num_heads=4)
    assert any("num_heads=4" in line for line in lines)
    pooled = saved({**vit(cls=False), **prefixed(simpool(), "simpool.")}, tmp_path / "simpool.pth")
    assert any("gamma=1.25" in line for line in convert(pooled, tmp_path / "again.pth", layout="simpool", gamma=1.25))


def test_layouts_are_told_by_their_keys(tmp_path):
    for layout in ("dino", "ibot", "simpool"):
        assert layouts.read(saved(training_file(layout, gamma=2.0), tmp_path / f"{layout}.pth")).layout == layout
    assert set(legacy.LAYOUTS) < set(layouts.LAYOUTS)


def test_the_command_line_says_it_all(tmp_path, capsys):
    from maskwise import cli

    path = saved(training_file("ibot"), tmp_path / "ibot.pth")
    assert cli.main(["convert", str(path), "--to", str(tmp_path / "ours"), "num_heads=1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"read     {path} as ibot" and said[1] == "matched  79 tensors (teacher 30, student 31, teacher head 8, student head 8, centers 2)"
    assert said[2] == "missing  none" and said[-1].startswith("wrote ")
    assert cli.main(["convert", str(tmp_path / "ours"), "--to", str(tmp_path / "x.pth")]) == 2
    assert "a file needs --layout" in capsys.readouterr().err
    assert cli.main(["convert", str(path), "--to", str(tmp_path / "y.pth"), "--layout", "ibot", "num_head=1"]) == 2
    assert "load takes no num_head" in capsys.readouterr().err and not (tmp_path / "y.pth").exists()
