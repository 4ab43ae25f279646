"""Pretrained weights of transformers from local files."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from maskwise.errors import UserError
from maskwise.functional.resample import position_table
from maskwise.nn import Backbone

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8}


def tiny(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    return Backbone(name, **{**TINY, **options})


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_pretrained_weights_from_a_file(tmp_path, suffix):
    donor = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    path = tmp_path / f"weights{suffix}"
    save_file(donor.state_dict(), path) if suffix == ".safetensors" else torch.save(
        {"state_dict": donor.state_dict()}, path
    )
    backbone = tiny(weights=path).eval()
    tokens = backbone(images())
    torch.testing.assert_close(
        backbone.norm(torch.cat([tokens.prefix, tokens.patches], 1)), donor.eval().forward_features(images())
    )
    assert backbone.mean == (0.5, 0.5, 0.5)  # the input statistics of these timm weights
    classless = tiny(weights=path, class_token=False, image_size=48)
    assert classless.pos_embed.shape == (1, 36, 32)
    torch.testing.assert_close(classless.pos_embed, position_table(donor.pos_embed[:, 1:], (4, 4), (6, 6), "size"))
    for options, words in (
        ({"embed_dim": 64}, "is \\[.*there and"),
        ({"depth": 3}, "lacks blocks.2"),
        ({"depth": 1}, "has unknown blocks.1"),
    ):
        with pytest.raises(UserError, match=words):
            tiny(weights=path, **options)


def test_pretrained_weights_of_average_pooled_models_keep_their_norm(tmp_path):
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    donor = timm.create_model("vit_base_patch16_reg4_gap_256", **shape)
    torch.nn.init.normal_(donor.fc_norm.weight)
    torch.save(donor.state_dict(), tmp_path / "gap.pth")
    backbone = tiny("vit_base_patch16_reg4_gap_256", weights=tmp_path / "gap.pth")
    assert torch.equal(backbone.norm.weight, donor.fc_norm.weight)


def test_unused_keys_of_a_file_are_named(tmp_path, capfd):
    donor = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    state = donor.state_dict()
    torch.save(state, tmp_path / "named.pth")
    tiny(weights=tmp_path / "named.pth")
    tiny(weights=tmp_path / "named.pth")
    line = f"weights {tmp_path / 'named.pth'}: {len(state) - 2} tensors matched; unused: head.weight, head.bias\n"
    assert capfd.readouterr().err == line


def test_files_that_run_code_are_refused(tmp_path):
    torch.save({"state_dict": torch.nn.Linear(2, 2)}, tmp_path / "code.pth")
    (tmp_path / "noise.pth").write_bytes(b"no torch file")
    for name in ("code.pth", "noise.pth"):
        with pytest.raises(UserError, match="cannot read weights") as caught:
            tiny(weights=tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "model.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="model.pth: this is a git-lfs pointer, not the file: run git lfs pull$"):
        tiny(weights=tmp_path / "model.pth")
