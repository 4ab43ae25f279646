"""Small repositories in the layout of SimPool's released models on the Hub, and the features of their tensors."""

import argparse
import io

import numpy as np
import torch
import yaml
from torch import nn

from export.formats.test_dino_convnets import CNX, body, meta, random_timm_model
from support.research_files import features, head, network, prefixed, randn, simpool, simpooled, vit

OWNER = "billpsomas"
GAMMAS = {  # name -> gamma of the table in SimPool's repository; "official" has no SimPool
    "vits_dino_official_ep100": "official",
    "vits_dino_simpool_ep100": 1.25,
    "vits_dino_simpool_ep300": 1.25,
    "vits_dino_simpool_no_gamma_ep100": None,
    "resnet50_dino_official_ep100": "official",
    "resnet50_dino_simpool_ep100": 2.0,
    "resnet50_dino_simpool_no_gamma_ep100": None,
    "convnext_small_dino_official_ep100": "official",
    "convnext_small_dino_simpool_ep100": 2.0,
    "convnext_small_dino_simpool_no_gamma_ep100": None,
}
ARCHITECTURES = {"vits": "vit_small", "resnet50": "resnet50", "convnext": "convnext_small"}
RES = {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 8)}
WITHOUT_ARGUMENTS = ("convnext_small_dino_simpool_ep100",)  # holds the two networks alone


class Released:
    """A released model of one block per stage: its architecture, its files, and the vector of its teacher."""

    def __init__(self, name):
        torch.manual_seed(len(name))
        self.name, self.gamma, self.arch = name, GAMMAS[name], ARCHITECTURES[name.partition("_")[0]]
        self.mode = "official" if self.gamma == "official" else "simpool"
        self.model, self.teacher = self.network()
        self.dim = self.teacher["norm.weight"].shape[0] if self.arch != "resnet50" else 32

    def network(self):
        """Return timm's network, None for a transformer, and the tensors of the backbone under the released names."""
        if self.arch == "vit_small":
            model, dim, tensors = None, 384, vit(self.mode == "official", dim=384, depth=1, patch=16, grid=14)
        elif self.arch == "resnet50":
            model, dim = random_timm_model("resnet50", **RES), 32
            tensors = body(model.state_dict(), "fc.")
        else:
            model, dim = random_timm_model("convnext_small", **CNX), CNX["dims"][-1]
            tensors = meta(body(model.state_dict(), "head.fc."))
        if self.mode == "simpool":  # in transformers alone with beta
            tensors |= prefixed(simpool(self.arch == "vit_small" and self.gamma is not None, dim=dim), "simpool.")
        return model, tensors

    def arguments(self, **others):
        """Return the arguments of the training run; the files were written before there was a gamma."""
        return {"arch": self.arch, "mode": self.mode, "patch_size": 16, "epochs": 100, "lr": 0.001, **others}

    def weights(self):
        """Return the training file: other tensors in the student, optimizer, arguments, center."""
        norm = self.arch == "resnet50"  # a network with batch norm is wrapped twice
        student = {key: value + 1 if value.is_floating_point() else value for key, value in self.teacher.items()}
        content = {
            "student": network(student, head(norm=norm, dim=self.dim), "module."),
            "teacher": network(self.teacher, head(norm=norm, dim=self.dim), "module." if norm else ""),
        }
        if self.name not in WITHOUT_ARGUMENTS:
            content |= {
                "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-3), "params": [0]}]},
                "epoch": 100,
                "args": argparse.Namespace(**self.arguments()),
                "dino_loss": {"center": randn(1, 12)},
            }
        return saved(content)

    def files(self, gamma=True):
        """Return path -> bytes of the repository; `gamma`: whether configs.yaml has it, as since its second version."""
        stored = {"gamma": None if self.gamma == "official" else self.gamma} if gamma else {}
        return {
            ".gitattributes": b"",
            "README.md": b"---\nlicense: cc-by-4.0\n---\n",
            "log.txt": b"{}\n",
            "configs.yaml": yaml.safe_dump(self.arguments(**stored)).encode(),
            f"{self.name}.pth": self.weights(),
        }

    def vector(self, x):
        """Compute the teacher's vector [B, D] by the released code's formulas, in float64."""
        if self.arch == "vit_small":
            pool = "cls" if self.mode == "official" else "simpool"
            return features(self.teacher, x, heads=6, pool=pool, gamma=self.gamma)[0]
        with torch.no_grad():
            maps = self.model.double().forward_features(x.double())
        tokens = maps.flatten(2).transpose(1, 2)
        vector = tokens.mean(1) if self.mode == "official" else simpooled(tokens, self.teacher, self.gamma)[0]
        if self.arch == "resnet50":
            return vector
        weight, bias = (self.teacher[f"norm.{name}"].double() for name in ("weight", "bias"))
        return nn.functional.layer_norm(vector, vector.shape[-1:], weight, bias, 1e-6)


def saved(content):
    """Return the bytes of a file of torch.save."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()
