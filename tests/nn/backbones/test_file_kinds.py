"""Files that are no weights: one line says what each is and what to do."""

import gzip
import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import maskwise
from maskwise.errors import UserError
from maskwise.nn.backbones import file_kinds

KINDS = {  # file name -> words of the message
    "pointer.pth": "a git-lfs pointer, not the file: run git lfs pull",
    "empty.pth": "an empty file: copy or download it again",
    "page.pth": "a web page, not the file: download the file itself",
    "denied.safetensors": "a web page",
    "note.pth": r"a text file \(404: Not Found\)",
    "model.onnx": "an ONNX program: give the weights that it was exported from",
    "script.pt": "a TorchScript program: save its weights",
    "program.pt2": "a program of torch.export",
    "weights.npz": r"a NumPy archive \(.npz\)",
    "weights.npy": r"a NumPy array \(.npy\)",
    "weights.pth.gz": "a gzip archive: unpack it",
    "weights.tar": "a tar archive: unpack it",
    "weights.zip": "a zip archive: unpack it",
    "cut.pth": "an incomplete file: copy or download it again",
    "photo.png": "a picture",
}


def onnx_bytes():
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    return onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString()


def make(folder):
    """Write one file of each kind."""
    made = {"pointer.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "empty.pth": b""}
    made |= {
        "page.pth": b"\n<!DOCTYPE html><html>sign in</html>",
        "denied.safetensors": b"<?xml version='1.0'?><Error>",
    }
    made |= {"note.pth": b"404: Not Found", "photo.png": b"\x89PNG\r\n\x1a\n" + bytes(9), "model.onnx": onnx_bytes()}
    torch.save({"weight": torch.zeros(300)}, folder / "whole.pth")
    whole = (folder / "whole.pth").read_bytes()
    made |= {"cut.pth": whole[: len(whole) // 2], "weights.pth.gz": gzip.compress(whole)}
    for name, content in made.items():
        (folder / name).write_bytes(content)
    np.savez(folder / "weights.npz", **{"Transformer/encoder": np.zeros(3)})
    np.save(folder / "weights.npy", np.zeros(3))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "script.pt")
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), folder / "program.pt2")
    with tarfile.open(folder / "weights.tar", "w") as archive:
        archive.add(folder / "whole.pth", "whole.pth")
    with zipfile.ZipFile(folder / "weights.zip", "w") as archive:
        archive.write(folder / "whole.pth", "whole.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("kinds")
    make(made)
    return made


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_something_else_is_named(folder, name):
    with pytest.raises(UserError, match=f"cannot read weights from .*{name}: this is {KINDS[name]}") as caught:
        maskwise.load(folder / name)
    assert "\n" not in str(caught.value)


def test_weights_are_known_by_their_content_and_not_by_their_name(tmp_path):
    save_file({"weight": torch.arange(3.0)}, tmp_path / "renamed.pth")
    torch.save({"weight": torch.arange(3.0)}, tmp_path / "renamed.safetensors")
    for path in tmp_path.iterdir():
        assert file_kinds.foreign(path) is None
        assert torch.equal(maskwise.nn.backbones.weights_file.read_tensors(path)["weight"], torch.arange(3.0)), path


def test_torch_files_of_both_formats_are_weights(tmp_path):
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save({"weight": torch.zeros(3)}, buffer, _use_new_zipfile_serialization=zipped)
        (tmp_path / "x.pth").write_bytes(buffer.getvalue())
        assert file_kinds.foreign(tmp_path / "x.pth") is None
