"""Training steps, features, pictures and exports on a CUDA device that is not there: one device, no host waits.

The cases run in a process of their own, with a stand-in for CUDA's runtime loaded before it (tests/support/fake_cuda).
"""

import json
import os
import subprocess
import sys
import traceback
import warnings

import pytest

from support import fake_cuda

METHODS = {"ibot": "attmask/100pct_hint", "dino": "simpool/vits16_dino_cls", "mst": "mst/vits16_100ep"}
FAST = {  # together every kind of part once
    "iBOT, AttMask-Hint, bf16, packed, accumulated": (
        "attmask/100pct_hint",
        "train.precision=bf16",
        "train.accumulate=2",
    ),
    "DINO, SimPool, AttMask-High, float32, blocks recomputed": (
        "simpool/vits16_dino",
        "train.precision=fp32",
        "masking.name=attmask_high",
        "speed.checkpointing=blocks",
    ),
    "supervised, ResNet, MAP": ("map/resnet50_100ep", "train.precision=bf16"),
}
OTHERS = {"features": None, "planted": None}
MASKINGS = ("none", "random", "block", "attmask_high", "attmask_low", "attmask_hint")
BACKBONES = {
    "eva02": ("backbone.name=eva02_tiny_patch14_224",),
    "swin": ("ibot/swint7_300ep",),
    "convnext": ("simpool/convnext_small_dino",),
    "resnet, DINO": ("dino/resnet50_100ep",),
    "pit": ("map/pits_100ep",),
    "mlp": ("map/resmlp24_300ep",),
    "mobilenet": ("map/mobilenet_100ep",),
    "maxvit": ("map/maxvit_tiny_300ep",),
}


def part_cases() -> dict[str, tuple[str, ...]]:
    """One case for each method, masking, backbone family and kind of recomputation, in turns of precision."""
    cases = {f"method {name}": (recipe, "train.precision=fp32") for name, recipe in METHODS.items()}
    cases |= {f"masking {name}": (METHODS["ibot"], f"masking.name={name}") for name in MASKINGS}
    for name, words in BACKBONES.items():
        recipe = words if "/" in words[0] else (METHODS["dino"], *words)
        cases[f"backbone {name}"] = (*recipe, "train.precision=bf16")
    for kind in ("elementwise", "blocks"):
        cases[f"recomputing {kind}"] = (METHODS["ibot"], "train.precision=bf16", f"speed.checkpointing={kind}")
    cases["Sinkhorn-Knopp, two micro-batches"] = (METHODS["ibot"], "method.targets=sinkhorn", "train.accumulate=2")
    cases["supervised"] = ("supervised/resnet50_simpool", "train.precision=fp32")
    return cases


def pooling_cases() -> dict[str, tuple[str, ...]]:
    """Every pooling with DINO."""
    from maskwise.nn import POOLINGS

    return {f"pooling {name}": (METHODS["dino"], f"pooling.name={name}") for name in POOLINGS}


def recipe_cases() -> dict[str, tuple[str, ...]]:
    """Every shipped recipe in either precision."""
    from support.miniature import RECIPES

    return {f"{name}, {kind}": (name, f"train.precision={kind}") for name in RECIPES for kind in ("fp32", "bf16")}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Return a function that runs cases in one process -> {name: outcome}."""
    if reason := fake_cuda.missing():
        pytest.skip(reason)
    library, known = fake_cuda.runtime_library(tmp_path_factory.mktemp("runtime")), {}

    def run(cases):
        if not cases.keys() <= known.keys():
            done = subprocess.run(
                [sys.executable, __file__],
                input=json.dumps(cases),
                capture_output=True,
                text=True,
                env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            assert done.returncode == 0, done.stderr[-3000:]
            known.update(json.loads(done.stdout))
        return known

    return run


def check(outcome):
    assert outcome.get("error") is None, outcome["error"]
    assert outcome["device"] == ["cuda"] and outcome["gradients"] == outcome["parameters"]
    assert outcome["waits"] == [], "the host waits for the device"


@pytest.mark.parametrize("name", FAST)
def test_a_step_stays_on_the_device_and_makes_no_host_wait(outcomes, name):
    check(outcomes(FAST | OTHERS)[name])


def test_features_and_pictures_read_only_their_results(outcomes):
    outcome = outcomes(FAST | OTHERS)["features"]
    assert outcome.get("error") is None, outcome["error"]
    assert [kind for kind, _ in outcome["bank"]] == 2 * ["copy to the host"]  # one for each batch
    assert [kind for kind, _ in outcome["picture"]] == ["copy to the host"] and outcome["tensors"] == ["cpu"]


def test_planted_reads_copies_and_host_tensors_are_found(outcomes):
    outcome = outcomes(FAST | OTHERS)["planted"]
    assert outcome.get("error") is None, outcome["error"]
    assert outcome["nothing"] == []
    assert [kind for kind, _ in outcome["item"]] == ["read of a value"]
    assert [kind for kind, _ in outcome["branch"]] == ["read of a value"]
    assert [kind for kind, _ in outcome["cpu"]] == ["copy to the host"]
    assert [kind for kind, _ in outcome["constant"]] == ["blocking copy to the device"]
    assert "test_fake_cuda.py" in outcome["item"][0][1]
    assert "cpu" in outcome["host tensor"] and "cuda" in outcome["host tensor"]


@pytest.mark.long
@pytest.mark.parametrize("name", part_cases())
def test_methods_maskings_and_backbones_stay_on_the_device(outcomes, name):
    check(outcomes(part_cases())[name])


@pytest.mark.long
@pytest.mark.parametrize("cases", [pooling_cases, recipe_cases])
def test_every_pooling_and_every_recipe_stays_on_the_device(outcomes, cases):
    for name, outcome in outcomes(cases()).items():
        if name in cases():
            assert not outcome.get("error"), f"{name}: {outcome['error']}"
            check(outcome)


def steps(words) -> dict:
    """Do two steps of a recipe from its own images, loader and color included -> waits of the second."""
    from maskwise import build
    from maskwise.distributed.world import World
    from maskwise.engine.loop import prefetch
    from support.miniature import miniature

    recipe = miniature(*words)
    with fake_cuda.fake_cuda() as gpu:
        data, world = build.dataset(recipe), World(device=fake_cuda.CUDA)
        trainer = build.trainer(recipe, world, images=len(data))
        inputs = build.inputs(recipe, trainer)
        for batch, ids in prefetch(build.stream(recipe, world, data, 2, 0), world.device):
            gpu.waits.clear()  # the first step may fill caches
            result = trainer.step(*inputs(batch), ids, statistics=True)
            waits = list(gpu.waits)
        learned = [p for p in trainer.parameters if "last_layer" not in trainer.names[p]]
        return {
            "device": sorted(
                {value.device.type for value in [*result.values(), *trainer.method.state_dict().values()]}
            ),
            "gradients": sum(p.grad is not None and p.grad.device.type == "cuda" for p in learned),
            "parameters": len(learned),
            "waits": waits,
        }


def features() -> dict:
    """Extract features for k-NN, draw a sheet, and take the tensors of an export."""
    import torch

    from maskwise.evaluation.features.extract import extract
    from maskwise.evaluation.suite.attention_sheets import attention_map
    from maskwise.export.folder.timm_layout import timm_layout
    from support.tiny_networks import method
    from support.tiny_sets import Colors

    with fake_cuda.fake_cuda() as gpu:
        encoder = method("dino", dtype=torch.float32).teacher.encoder.to(fake_cuda.CUDA)
        gpu.waits.clear()
        bank = extract(encoder, Colors(8), "pooled", batch_size=4, device=fake_cuda.CUDA)
        assert {value.device.type for value in bank.rows.values()} == {"cpu"}
        waits = results(gpu)
        attention_map(encoder, torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
        picture = results(gpu)
        tensors = timm_layout(encoder).tensors
    return {"bank": waits, "picture": picture, "tensors": sorted({value.device.type for value in tensors.values()})}


def results(gpu) -> list:
    """Take the waits but those for mean, deviation and single images on their way to the device."""
    waits = [wait for wait in gpu.waits if wait[0] != "blocking copy to the device"]
    gpu.waits.clear()
    return waits


def planted() -> dict:
    """Run a forward pass with faults in its teacher's features: a read, a branch, a copy, a constant, a host tensor."""
    import torch

    from support.tiny_networks import crops, method

    def plant(function):
        made = method("dino", None, dtype=torch.float32)
        with fake_cuda.fake_cuda() as gpu:
            made.to(fake_cuda.CUDA)
            inputs = [gpu.empty_like(part) for part in crops(2, 1, torch.float32)[:2]]
            original = made.teacher_features

            def features(images):
                found = original(images)
                function(found.pooled)
                return found

            made.teacher_features = features
            made(*inputs, step=0, epoch=0, sample_ids=torch.arange(2))
            return gpu.waits

    def mix(x):
        return x + torch.ones(x.shape[-1])

    faults = {
        "nothing": lambda x: x + 1,
        "item": lambda x: x.sum().item(),
        "branch": lambda x: bool(x.sum() > 0),
        "cpu": lambda x: x.cpu(),
        "constant": lambda x: torch.zeros(3).to(x.device),
    }
    result = {name: plant(fault) for name, fault in faults.items()}
    try:
        plant(mix)
    except Exception as error:  # whatever class torch raises
        return {**result, "host tensor": str(error)}
    return {**result, "host tensor": "not found"}


def main() -> None:
    """Run the cases given on standard input; write {name: outcome}."""
    warnings.simplefilter("ignore")
    out, sys.stdout = sys.stdout, sys.stderr
    results = {}
    for name, words in json.load(sys.stdin).items():
        try:
            results[name] = {"features": features, "planted": planted}[name]() if words is None else steps(words)
        except Exception:
            results[name] = {"error": traceback.format_exc()[-3000:]}
    json.dump(results, out)


if __name__ == "__main__":
    main()
