"""Safe reading of weights files: settings in Lightning's files are dropped, other objects are refused."""

import argparse
import sys
import types

import numpy as np
import pytest
import torch

from maskwise.errors import UserError
from maskwise.nn.backbones.weights_file import read_tensors


@pytest.fixture
def packages(monkeypatch):
    """Classes under the module names of omegaconf, Lightning and lightly-train, which are gone when a file is read."""

    def package(name, **classes):
        module = types.ModuleType(name)
        for key, cls in classes.items():
            cls.__module__, cls.__qualname__, cls.__name__ = name, key, key
            setattr(module, key, cls)
        parts = name.split(".")
        for i in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
        monkeypatch.setitem(sys.modules, name, module)

    class Settings:
        def __init__(self):
            self.content = {"lr": 1.0, "nested": [1, 2], "type": dict}

    class AttributeDict(dict):
        pass

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(2, 2)

    package("omegaconf.dictconfig", DictConfig=Settings)
    package("lightning.fabric.utilities.data", AttributeDict=AttributeDict)
    package("lightly_train._models.wrapper", Wrapper=Wrapper)
    yield types.SimpleNamespace(settings=Settings, attributes=AttributeDict, wrapper=Wrapper)


def test_settings_of_lightning_are_dropped(tmp_path, packages, monkeypatch):
    attributes = packages.attributes(cfg=packages.settings(), epochs=3)
    weight = torch.arange(6.0).view(2, 3)
    torch.save({"state_dict": {"weight": weight}, "hyper_parameters": attributes, "epoch": 3}, tmp_path / "x.ckpt")
    monkeypatch.delitem(sys.modules, "omegaconf.dictconfig")
    content = read_tensors(tmp_path / "x.ckpt")
    assert torch.equal(content["state_dict"]["weight"], weight) and content["epoch"] == 3


def test_modules_of_lightly_train_are_dropped(tmp_path, packages, monkeypatch):
    module = packages.wrapper()
    content = {"state_dict": module.state_dict(), "lightly_train": {"models": {"wrapped_model": module}}}
    torch.save(content, tmp_path / "last.ckpt")
    monkeypatch.delitem(sys.modules, "lightly_train._models.wrapper")
    assert torch.equal(read_tensors(tmp_path / "last.ckpt")["state_dict"]["body.weight"], module.body.weight)
    torch.save({"state_dict": module.body.state_dict(), "module": module.body}, tmp_path / "module.ckpt")
    with pytest.raises(UserError, match="more than tensors"):
        read_tensors(tmp_path / "module.ckpt")


class Harm:
    def __reduce__(self):
        import os

        return os.system, ("touch harm",)


def test_code_beside_settings_is_refused(tmp_path, packages, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, other in (("harm", Harm()), ("call", packages.settings())):
        content = {"state_dict": {"weight": torch.zeros(2)}, "cfg": packages.settings(), "other": other}
        if name == "call":
            content["other"] = types.SimpleNamespace(x=1)
        torch.save(content, tmp_path / f"{name}.ckpt")
        with pytest.raises(UserError, match="more than tensors .* would run code") as caught:
            read_tensors(tmp_path / f"{name}.ckpt")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


def test_arguments_and_numbers_of_training_files_are_read(tmp_path):
    torch.save({"args": argparse.Namespace(lr=np.float64(0.5), name="vit"), "best": np.int64(3)}, tmp_path / "x.pth")
    content = read_tensors(tmp_path / "x.pth")
    assert content["args"].lr == 0.5 and content["args"].name == "vit" and content["best"] == 3


def test_a_shard_of_a_distributed_checkpoint_is_named(tmp_path, monkeypatch):
    module = types.ModuleType("torch.distributed._shard.sharded_tensor.api")
    Shard = type("ShardedTensor", (), {"__module__": module.__name__})
    module.ShardedTensor = Shard
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({"model": {"student.backbone._flat_param": Shard()}}, tmp_path / "model_final.rank_0.pth")
    with pytest.raises(UserError, match="one rank's part of a sharded checkpoint.*teacher_checkpoint.pth"):
        read_tensors(tmp_path / "model_final.rank_0.pth")
