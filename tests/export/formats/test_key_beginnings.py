"""Training files of other projects in miniature: features of the same tensors, and every key used or reported."""

import pytest
import timm
import torch

from maskwise.errors import UserError
from maskwise.export import load
from support.research_files import DIM, K, X, dinov2, features, head, prefixed, randn, vit

RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
SEQUENTIAL = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def resnet(seed=0):
    """Return a small ResNet without classifier, in eval mode, with random batch statistics."""
    torch.manual_seed(seed)
    model = timm.create_model("resnet18", num_classes=0, **RESNET).eval()
    for key, value in model.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            value.add_(torch.rand_like(value))
    return model


def sequential(model):
    """Name a ResNet's tensors as the children of torchvision's ResNet in a Sequential."""
    return {
        f"{SEQUENTIAL[key.partition('.')[0]]}.{key.partition('.')[2]}": value
        for key, value in model.state_dict().items()
    }


def mlp(*names):
    return {f"{name}.{part}": randn(4, 4) for name in names for part in ("0.weight", "2.weight")}


def read(tmp_path, content, capfd, **options):
    """Save and load a file; return the encoder and the line on its keys."""
    torch.save(content, tmp_path / "checkpoint.pth")
    encoder = load.load(tmp_path / "checkpoint.pth", **options)
    return encoder, capfd.readouterr().err.strip().splitlines()[0]


def assert_vit(encoder, tensors, heads=1):
    pooled, attention = features(tensors, X, heads)
    assert torch.allclose(encoder(X).pooled.double(), pooled, atol=1e-5)
    assert torch.allclose(encoder(X).attention.double(), attention, atol=1e-6)


def assert_resnet(encoder, model):
    with torch.no_grad():
        assert torch.allclose(encoder(X).pooled, model(X), atol=1e-5)


def assert_all_keys_counted(line, content):
    """The line's numbers add up to the tensors in the file."""
    matched, _, unused = line.partition(" tensors matched")[0].rpartition(": ")[2], None, line.rpartition("unused: ")[2]
    left = sum(int(part.rpartition(" ")[2]) for part in unused.split(", ")) if unused != "none" else 0
    assert int(matched) + left == len(content), line


# MoCo v3


def moco_v3(width, depth):
    torch.manual_seed(1)
    networks = {}
    for name in ("base_encoder", "momentum_encoder"):
        tensors = vit(dim=width, depth=depth, patch=16, grid=2)
        tensors["pos_embed"][:, 0] = 0  # the fixed table of sines and cosines
        networks[name] = tensors
    state = {
        f"module.{name}.{key}": value
        for name, tensors in networks.items()
        for key, value in {**tensors, **mlp("head")}.items()
    }
    return networks, {**state, **{f"module.{key}": value for key, value in mlp("predictor").items()}}


def test_moco_v3_is_read_with_its_own_number_of_heads(tmp_path, capfd):
    networks, state = moco_v3(384, 12)
    content = {"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": {"state": {}}, "scaler": {}}
    encoder, line = read(tmp_path, content, capfd)
    assert encoder.backbone.num_heads == 12, "DINO's ViT-S has 6"
    pooled, _ = features(networks["momentum_encoder"], X, heads=12)
    assert torch.allclose(encoder(X).pooled.double(), pooled, atol=1e-4)
    assert "read as moco_v3" in line and "predictor 2" in line and "head 4" in line
    encoder, _ = read(tmp_path, content, capfd, weights="student")
    pooled, _ = features(networks["base_encoder"], X, heads=12)
    assert torch.allclose(encoder(X).pooled.double(), pooled, atol=1e-4)


def test_a_fixed_position_table_leaves_the_heads_of_small_widths_open(tmp_path, capfd):
    """MoCo v3's ViT-S, converted to DeiT's layout, has the shapes of DINO's and twice its heads."""
    networks, _ = moco_v3(384, 12)
    with pytest.raises(UserError, match="give num_heads="):
        read(tmp_path, {"model": networks["base_encoder"]}, capfd)
    learned = {**networks["base_encoder"], "pos_embed": networks["base_encoder"]["pos_embed"] + 1}
    assert read(tmp_path, {"model": learned}, capfd)[0].backbone.num_heads == 6


def test_moco_v3_resnets_are_read(tmp_path, capfd):
    base, momentum = resnet(0), resnet(1)
    state = {
        f"module.{name}.{key}": value
        for name, model in (("base_encoder", base), ("momentum_encoder", momentum))
        for key, value in {**model.state_dict(), **mlp("fc")}.items()
    }
    content = {"arch": "resnet50", "state_dict": state}
    assert_resnet(read(tmp_path, content, capfd)[0], momentum)
    assert_resnet(read(tmp_path, content, capfd, weights="student")[0], base)


# DINOv2's training


def dinov2_training(infix=""):
    torch.manual_seed(2)
    networks = {role: dinov2(chunks=True) for role in ("student", "teacher")}
    state = {}
    for role, tensors in networks.items():
        for key, value in tensors.items():
            state[f"{role}.backbone.{infix}{key.replace('blocks.0.', f'blocks.0.{infix}', 1)}"] = value
        state |= prefixed(head(), f"{role}.dino_head.{infix}")
    return networks, {**state, "dino_loss.center": randn(1, K)}


@pytest.mark.parametrize("infix", ["", "_fsdp_wrapped_module.", "_fsdp_wrapped_module._checkpoint_wrapped_module."])
def test_dinov2_training_checkpoints_are_read(tmp_path, capfd, infix):
    networks, state = dinov2_training(infix)
    content = {"model": state, "iteration": 9, "optimizer": {}}
    for role, tensors in networks.items():
        encoder, line = read(tmp_path, content, capfd, weights=role, num_heads=1)
        assert_vit(encoder, {key.replace("blocks.0.", "blocks.", 1): value for key, value in tensors.items()})
        assert "dino_head 16" in line and "dino_loss 1" in line and "read as dinov2" in line


def test_dinov2_teacher_checkpoints_of_evaluations_are_read(tmp_path, capfd):
    networks, state = dinov2_training()
    teacher = {key.removeprefix("teacher."): value for key, value in state.items() if key.startswith("teacher.")}
    encoder, line = read(tmp_path, {"teacher": teacher}, capfd, num_heads=1)
    assert_vit(encoder, {key.replace("blocks.0.", "blocks.", 1): value for key, value in networks["teacher"].items()})
    assert_all_keys_counted(line, teacher)


def test_flattened_parameters_of_fsdp_are_refused(tmp_path, capfd):
    state = {"teacher.backbone._fsdp_wrapped_module._flat_param": randn(64), "dino_loss.center": randn(1, K)}
    with pytest.raises(UserError, match=r"_flat_param.*FSDP.*teacher_checkpoint.pth") as caught:
        read(tmp_path, {"model": state}, capfd)
    assert "\n" not in str(caught.value)


# lightly


def test_lightly_networks_are_read(tmp_path, capfd):
    student, teacher = resnet(0), resnet(1)
    for names, (first, second) in {
        ("student_backbone", "teacher_backbone"): (student, teacher),  # DINO
        ("backbone", "backbone_momentum"): (student, teacher),  # MoCo
        ("student_backbone", "backbone"): (student, teacher),  # DINO of the benchmarks
        ("query_backbone", "backbone"): (student, teacher),  # MoCo of the benchmarks
    }.items():
        for naming in (sequential, lambda model: model.state_dict()):
            state = {**prefixed(naming(first), f"{names[0]}."), **prefixed(naming(second), f"{names[1]}.")}
            content = {"state_dict": {**state, **mlp("projection_head", "student_head")}, "epoch": 3}
            encoder, line = read(tmp_path, content, capfd)
            assert_resnet(encoder, teacher)
            assert "read as lightly" in line and "projection_head 2" in line
            assert_resnet(read(tmp_path, content, capfd, weights="student")[0], student)


def test_a_single_lightly_network_is_read(tmp_path, capfd):
    model = resnet()
    state = {**prefixed(sequential(model), "backbone."), **mlp("projection_head")}
    encoder, line = read(tmp_path, {"state_dict": state, "pytorch-lightning_version": "2.0"}, capfd)
    assert_resnet(encoder, model)
    assert_all_keys_counted(line.replace("other entries of the file 1, ", ""), state)


def test_lightly_vision_transformers_are_read_with_their_mask_token(tmp_path, capfd):
    torch.manual_seed(0)
    networks = {role: vit() for role in ("teacher", "student")}
    state = {}
    for role, tensors in networks.items():
        state |= prefixed({**tensors, **mlp("head")}, f"{role}_backbone.vit.")
        state[f"{role}_backbone.mask_token"] = randn(1, 1, DIM)
    content = {"state_dict": {**state, **mlp("teacher_head", "student_head")}}
    encoder, line = read(tmp_path, content, capfd, num_heads=1)
    assert_vit(encoder, networks["teacher"])
    assert torch.equal(encoder.backbone.mask_token, state["teacher_backbone.mask_token"][0])
    assert "teacher_head 2" in line and "student_head 2" in line
    assert_all_keys_counted(line, content["state_dict"])


# lightly-train


def test_lightly_train_networks_are_read(tmp_path, capfd):
    torch.manual_seed(0)
    networks = {role: vit() for role in ("teacher", "student")}
    state = {**mlp("teacher_projection_head"), "teacher_embedding_model.embed_head.weight": randn(4, 4)}
    for role, tensors in networks.items():
        state |= prefixed(tensors, f"{role}_embedding_model.model_wrapper._model.")
    for role, tensors in networks.items():
        encoder, line = read(tmp_path, {"state_dict": state}, capfd, weights=role, num_heads=1)
        assert_vit(encoder, tensors)
        assert "read as lightly_train" in line and "embed_head 1" in line
        assert_all_keys_counted(line, state)


def test_lightly_train_dinov2_and_feature_extractors_are_read(tmp_path, capfd):
    torch.manual_seed(0)
    networks = {role: dinov2() for role in ("teacher", "student")}
    state = {**mlp("teacher_dino_head")}
    for role, tensors in networks.items():
        state |= prefixed(tensors, f"{role}_embedding_model_wrapper._model.")
    encoder, line = read(tmp_path, {"state_dict": state}, capfd, num_heads=1)
    assert_vit(encoder, networks["teacher"])
    assert "read as dinov2" in line
    model = resnet()
    for names in (model.state_dict(), sequential(model)):
        state = {**prefixed(names, "embedding_model.wrapped_model._features."), **mlp("projection_head")}
        assert_resnet(read(tmp_path, {"state_dict": state}, capfd)[0], model)


def test_the_student_of_a_distillation_is_loaded_and_not_its_teacher(tmp_path, capfd):
    torch.manual_seed(0)
    model = resnet()
    state = {
        **prefixed(model.state_dict(), "student_embedding_model.wrapped_model._features."),
        **prefixed(vit(), "teacher_embedding_model.wrapped_model._model."),
    }
    encoder, line = read(tmp_path, {"state_dict": state}, capfd)
    assert_resnet(encoder, model)
    assert f"the teacher, another network {len(vit())}" in line


# solo-learn


def test_solo_learn_dino_is_read_with_its_heads(tmp_path, capfd):
    torch.manual_seed(0)
    networks = {"backbone.": vit(), "momentum_backbone.": vit()}
    heads = {"backbone.": head(), "momentum_backbone.": head()}
    state = {**mlp("classifier", "momentum_classifier")}
    for start, tensors in networks.items():
        state |= prefixed(tensors, start)
        state |= prefixed(heads[start], "head." if start == "backbone." else "momentum_head.")
    content = {"state_dict": state, "epoch": 3}
    encoder, line = read(tmp_path, content, capfd, num_heads=1)
    assert_vit(encoder, networks["momentum_backbone."])
    assert "read as solo_learn" in line and "momentum_classifier 2" in line
    assert_vit(read(tmp_path, content, capfd, num_heads=1, weights="student")[0], networks["backbone."])
    source = load.read(tmp_path / "checkpoint.pth")
    weight = heads["momentum_backbone."]["last_layer.weight_v"]
    assert torch.equal(source.heads["teacher"]["last_layer.weight_v"], weight)


def test_solo_learn_resnets_are_read(tmp_path, capfd):
    model, momentum = resnet(0), resnet(1)
    single = {**prefixed(model.state_dict(), "backbone."), **mlp("projector", "classifier")}
    encoder, line = read(tmp_path, {"state_dict": single}, capfd)
    assert_resnet(encoder, model)
    assert_all_keys_counted(line, single)
    both = {**single, **prefixed(momentum.state_dict(), "momentum_backbone.")}
    assert_resnet(read(tmp_path, {"state_dict": both}, capfd)[0], momentum)
    early = {**prefixed(model.state_dict(), "encoder."), **mlp("projector", "classifier")}
    assert_resnet(read(tmp_path, {"state_dict": early}, capfd)[0], model)


def test_solo_learn_stem_for_cifar_is_refused(tmp_path, capfd):
    """Its 3 x 3 convolution is padded by 2: computed with a padding of 1, features would be wrong."""
    state = {**prefixed(resnet().state_dict(), "backbone."), **mlp("projector", "classifier")}
    state["backbone.conv1.weight"] = randn(*state["backbone.conv1.weight"].shape[:2], 3, 3)
    with pytest.raises(UserError, match="padded by 2"):
        read(tmp_path, {"state_dict": state}, capfd)


# wrappers


def test_names_of_wrappers_are_removed_wherever_they_stand(tmp_path, capfd):
    torch.manual_seed(0)
    tensors = vit()
    for start in (
        "module.backbone._orig_mod.",
        "_orig_mod.module.backbone.module.",
        "module.module.",
        "model._orig_mod.",
    ):
        state = prefixed(tensors, start)
        state = {key.replace("blocks.1.", "blocks.1._orig_mod."): value for key, value in state.items()}
        encoder, line = read(tmp_path, {"state_dict": state}, capfd, num_heads=1)
        assert_vit(encoder, tensors)
        assert_all_keys_counted(line, state)
    twice = {**tensors, **prefixed(tensors, "module.")}
    with pytest.raises(UserError, match="two keys are pos_embed"):
        read(tmp_path, twice, capfd, num_heads=1)
