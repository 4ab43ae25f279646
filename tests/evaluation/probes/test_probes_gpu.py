"""Probes on a GPU equal those on the CPU."""

import pytest
import torch

from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.features import extract
from maskwise.evaluation.probes.linear_heads import HeadSpec, LinearHeads
from support.tiny_sets import sets, tiny_encoder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_features_and_their_cache(tmp_path):
    data = sets()["train"]
    on_cpu = extract.extract(tiny_encoder(), data, ("pooled", "keys"), batch_size=16)
    encoder = tiny_encoder().cuda()
    for _ in range(2):
        bank = extract.extract(encoder, data, ("pooled", "keys"), batch_size=16, cache=tmp_path)
        assert (
            bank["pooled"].device.type == "cpu"
            and bank.device.startswith("cuda")
            and next(encoder.parameters()).is_cuda
        )
        assert all(torch.allclose(bank[name], on_cpu[name], atol=5e-3) for name in ("pooled", "keys"))


def test_heads():
    x, y = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 5
    specs = [HeadSpec(0.1), HeadSpec(1.0, 1e-3, "lars"), HeadSpec(0.5, 1e-3)]
    on_cpu, on_gpu = (LinearHeads(specs, 8, 5, device=device, dtype=torch.float64) for device in ("cpu", "cuda"))
    for _ in range(5):
        on_cpu.step(x.double(), y)
        on_gpu.step(x.double().cuda(), y.cuda())
    assert torch.allclose(on_cpu.weight, on_gpu.weight.cpu(), atol=1e-10)


@pytest.mark.parametrize(
    "name, options",
    [
        ("linear", {"epochs": 3, "batch_size": 16, "lr": 1.0}),
        ("logistic", {}),
        ("attentive", {"epochs": 2, "warmup_epochs": 1, "batch_size": 16}),
        ("finetune", {"epochs": 2, "warmup_epochs": 1, "batch_size": 16, "repeats": 1, "workers": 2}),
        ("knn", {"k": 5}),
    ],
)
def test_end_to_end(name, options):
    report = EVALUATIONS[name](tiny_encoder("simpool", class_token=True).cuda(), sets(), **options)
    assert 0 <= report.numbers["top1"] <= 100 and report.cost["device"].startswith("cuda")
