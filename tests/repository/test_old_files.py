"""Test that files written by commit a034e5d load, continue, evaluate and convert as they did."""

# tests/fixtures/make.py wrote the files under torch 2.13.0+cpu. Copied values (weights, other layouts, lists) must be
# equal bit for bit. Computed values are compared with 1e-5, because another torch or processor adds float32 numbers in
# another order: with the kernels for older processors (ATen, MKL, oneDNN) features differed by up to 5e-7 and losses by
# up to 3e-7 of their value. On the processor of the fixtures the bits of a continued run must be equal, too.

import argparse
import hashlib
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import maskwise
from maskwise.nn import CLS
from support.old_files import OLD, restored

pytestmark = pytest.mark.usefixtures("one_thread")

EXPECTED = json.loads((OLD / "expected.json").read_text())
RUNS, RESEARCH, EXPORTS, CONVERTED = (EXPECTED[kind] for kind in ("runs", "research", "exports", "converted"))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # for the order of float32 sums, see above
SAME_BITS = ("2.13.0+cpu", "2.14.1+cu130")  # versions of torch with which the old code gave the bits of the fixtures
KNN = {"knn": {"k": [1, 5]}}
EVALUATED = {"ibot": KNN, "dino_simpool": KNN, "supervised": {"top1": {}, **KNN}, "supervised_map": {"top1": {}}}
STOPPED = ("ibot", "mst", "alarms", "continued")
EARLIER = {"dino_simpool": "step_00000002", "supervised": "step_00000003", "alarms": "step_00000096"}


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """Work in an empty folder, and compute whole last blocks as the old code did: the bits are its bits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CLS, "reads_patches", True)


def unpacked(value, tensors: dict):
    """Return a training file's content from its stored structure and tensors."""
    if isinstance(value, list):
        return [unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "names" in value:
        return {name: tensors[f"{value['tensors']}/{name}"] for name in value["names"]}
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "namespace" in value:
        return argparse.Namespace(**unpacked(value["namespace"], tensors))
    if "numpy" in value:
        return np.dtype(value["numpy"]).type(value["value"])
    return {key: unpacked(item, tensors) for key, item in value["mapping"]}


def research_file(name: str) -> tuple[Path, dict]:
    """Write a research file as its authors did; return its path and content."""
    place = OLD / "research" / name
    if place.is_dir():
        return restored("research", name), {}
    tensors = load_file(place.with_suffix(".safetensors"))
    content = unpacked(json.loads(place.with_suffix(".json").read_text()), tensors)
    torch.save(content, f"{name}.pth")
    return Path(f"{name}.pth"), content


def command(*words) -> int:
    """Run `python -m maskwise WORDS` in this process; return its exit status."""
    before, sys.argv = sys.argv, ["maskwise", *map(str, words)]
    try:
        runpy.run_module("maskwise", run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def pattern(channels: int, size) -> torch.Tensor:
    """Return two test images, identical on every machine."""
    shape = (2, channels, *size)
    return ((torch.arange(math.prod(shape)) * 7919 % 2003).float() / 1001 - 1).reshape(shape)


def digest_of(tensor: torch.Tensor) -> str:
    """Return SHA-256 over the bytes of a tensor."""
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def digest(tensors) -> str:
    """Return SHA-256 over the sorted digests of tensors, independent of their names."""
    return hashlib.sha256("".join(sorted(digest_of(value) for value in tensors.values())).encode()).hexdigest()


def named_digest(tensors) -> str:
    """Return SHA-256 over names, shapes and digests of tensors."""
    lines = [f"{name} {list(tensors[name].shape)} {digest_of(tensors[name])}" for name in sorted(tensors)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def outputs(encoder) -> dict:
    """Return an encoder's features and attention for the test images as lists of float32 numbers."""
    with torch.no_grad():
        features = encoder(pattern(len(encoder.mean), encoder.image_size))
    result = {"pooled": features.pooled.tolist(), "patches": features.patches.mean(dim=1).tolist()}
    if features.attention is not None:
        place = torch.arange(features.attention.shape[-1], dtype=torch.float32)
        result["attention_sum"] = features.attention.sum(dim=-1).tolist()
        result["attention_moment"] = (features.attention * place).mean(dim=-1).tolist()
    return result


def processor() -> str:
    """Return a digest of the processor's model and flags, which decide the kernels used."""
    try:
        text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return "unknown"
    lines = [line for line in text.splitlines() if line.startswith(("vendor_id", "cpu family", "model", "flags"))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def same_bits(path, wanted: dict, **options) -> bool:
    """Tell whether torch and processor are those of the fixtures and reproduce the bits of a forward pass."""
    machine = {"capability": torch.backends.cpu.get_cpu_capability(), "processor": processor()}
    if torch.__version__ not in SAME_BITS or not machine.items() <= EXPECTED["made"].items():
        return False
    computed = outputs(maskwise.load(path, **options))
    return computed == {key: wanted[key] for key in computed}


def assert_outputs(encoder, wanted: dict) -> None:
    """Compare features and attention with the stored ones."""
    computed = outputs(encoder)
    assert computed.keys() == wanted.keys() - {"weights"}
    for key, value in computed.items():
        difference = (torch.tensor(value) - torch.tensor(wanted[key])).abs().max()
        assert torch.allclose(torch.tensor(value), torch.tensor(wanted[key]), **CLOSE), f"{key} differs by {difference}"


def assert_loaded(encoder, wanted: dict) -> None:
    """Compare an encoder with the stored one: weights bit for bit, outputs within the tolerance."""
    assert digest(encoder.state_dict()) == wanted["weights"]
    assert_outputs(encoder, wanted)


def assert_report(report, wanted: dict) -> None:
    """Compare a report on frozen features: the same images and the same accuracies."""
    assert report.data_hash == wanted["data_hash"] and report.numbers == pytest.approx(wanted["numbers"])


def metrics(run: Path) -> list[dict]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last(run: Path, part: str) -> dict[str, torch.Tensor]:
    """Return the tensors in a file of a run's last checkpoint."""
    step = (run / "checkpoints" / "last").read_text().strip()
    return load_file(run / "checkpoints" / step / f"{part}.safetensors")


def assert_finished(name: str, run: Path, before: list[dict], bits: bool) -> None:
    """Compare a run that was continued after the lines `before` with the run that the old code finished."""
    wanted, lines = RUNS[name]["end"], metrics(run)
    assert lines[: len(before)] == before
    assert_steps(lines, wanted["lines"], bits)
    new, old = (reports(run_lines) for run_lines in (lines, wanted["lines"]))
    assert list(new) == list(old)
    for place, numbers in old.items():
        assert new[place] == pytest.approx(numbers), place
    assert alarms(lines) == alarms(wanted["lines"])
    assert_outputs(maskwise.load(run), wanted["teacher"])
    if bits:
        assert digest(last(run, "model")) == wanted["weights"] and digest(last(run, "optimizer")) == wanted["optimizer"]


def assert_steps(steps: list[dict], wanted: list[dict], bits: bool) -> None:
    """Compare the logged steps: losses within the tolerance, the share of masked patches exactly."""
    steps, wanted = ([line for line in lines if "loss" in line] for lines in (steps, wanted))
    assert [line["step"] for line in steps] == [line["step"] for line in wanted]
    for new, old in zip(steps, wanted):
        assert new["loss"] == pytest.approx(old["loss"], rel=0 if bits else CLOSE["rtol"], abs=0), f"step {old['step']}"
        assert new["lr"] == pytest.approx(old["lr"], rel=1e-9), f"step {old['step']}"
        assert new.get("mask_share") == old.get("mask_share"), f"other masks at step {old['step']}"


def reports(lines: list[dict]) -> dict[tuple, dict]:
    """Return the numbers of each report by step and name."""
    return {(line["step"], line["report"]): line["numbers"] for line in lines if "report" in line}


def alarms(lines: list[dict]) -> Counter:
    """Count alarms by step, whatever their kinds are called."""
    return Counter(line["step"] for line in lines if "loss" not in line and "report" not in line)


@pytest.mark.parametrize("file", sorted((OLD / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_recipe_keeps_every_value(file, capsys):
    """Read a resolved recipe: no value is lost, whatever its key is called now."""
    assert command("show", file) == 0
    before, now = (yaml.safe_load(text) for text in (file.read_text(), capsys.readouterr().out))
    assert not values(before) - values(now)


def values(recipe: dict) -> Counter:
    """Count the values in all sections of a recipe."""
    sections = [section if isinstance(section, dict) else {"": section} for section in recipe.values()]
    return Counter(json.dumps(value) for section in sections for value in section.values())


def test_old_keys_on_the_command_line(capsys):
    """Accept the old spelling of keys as overrides."""
    overrides = ("crops.grey_prob=0.31", "pooling=simpool", "pooling.normalise=sigmoid")
    assert command("show", OLD / "written" / "ibot.yaml", *overrides) == 0
    printed = capsys.readouterr().out
    assert "0.31" in printed and "sigmoid" in printed and "0.35" not in printed


@pytest.mark.parametrize("name", RUNS)
def test_run_loads(name):
    """Load teacher and student of a run's last checkpoint."""
    run = restored("trained", name)
    for role, wanted in RUNS[name]["loaded"].items():
        assert_loaded(maskwise.load(run, weights=role), wanted)


@pytest.mark.parametrize("name", EXPECTED["poolings"])
def test_checkpoint_of_each_pooling_loads(name):
    """Load a checkpoint with each pooling: its arguments and the names of its tensors are understood."""
    assert_loaded(maskwise.load(OLD / "poolings" / name), EXPECTED["poolings"][name])


@pytest.mark.parametrize(
    "name, evaluation", [(name, evaluation) for name, evaluations in EVALUATED.items() for evaluation in evaluations]
)
def test_run_evaluates(name, evaluation):
    """Evaluate a run on the images in its recipe."""
    run = restored("trained", name)
    report = maskwise.evaluate(evaluation, run, **EVALUATED[name][evaluation])
    assert_report(report, RUNS[name]["evaluated"][evaluation])
    if name == "supervised_map":
        assert_report(maskwise.evaluate("top1", run, light=True), RUNS[name]["light"])


@pytest.mark.parametrize("name", STOPPED)
def test_stopped_run_continues(name):
    """Continue a preempted run; its start model is gone, and alarms already raised are not repeated."""
    run = restored("trained", name)
    before, bits = metrics(run), same_bits(run, RUNS[name]["loaded"]["teacher"])
    assert maskwise.train(maskwise.read_recipe(run), out=run, quiet=True)["status"] == "complete"
    assert_finished(name, run, before, bits)


@pytest.mark.parametrize("name", EARLIER)
def test_run_continues_from_earlier_checkpoint(name):
    """Continue from a checkpoint before the last; alarms that follow depend on earlier lines of metrics.jsonl."""
    run = restored("trained", name)
    bits = same_bits(run, RUNS[name]["loaded"]["teacher"])
    for place in (run / "checkpoints").glob("step_*"):
        if place.name > EARLIER[name]:
            shutil.rmtree(place)
    (run / "checkpoints" / "last").write_text(f"{EARLIER[name]}\n")
    before = [line for line in metrics(run) if line["step"] <= int(EARLIER[name].removeprefix("step_"))]
    assert maskwise.train(maskwise.read_recipe(run), out=run, quiet=True)["status"] == "complete"
    assert_finished(name, run, before, bits)


def test_same_command_continues():
    """Continue with the command and recipe file of then and an override in the old spelling."""
    run = restored("trained", "ibot")
    before, bits = metrics(run), same_bits(run, RUNS["ibot"]["loaded"]["teacher"])
    words = ("train", str(OLD / "written" / "ibot.yaml"), "--out", str(run), "crops.grey_prob=0.35")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    whole = "from maskwise.nn import CLS; CLS.reads_patches = True; import runpy; "  # see working_folder
    whole += "runpy.run_module('maskwise', None, '__main__')"
    ended = subprocess.run([sys.executable, "-c", whole, *words], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and "another recipe" not in ended.stderr, ended.stderr
    assert not (run / "preempted").exists()
    assert_finished("ibot", run, before, bits)


@pytest.mark.parametrize("name", [name for name in RUNS if name not in STOPPED])
def test_complete_run_is_left_alone(name):
    """Report a complete run as complete and write no line."""
    run = restored("trained", name)
    before = (run / "metrics.jsonl").read_bytes()
    result = maskwise.train(maskwise.read_recipe(OLD / "written" / f"{name}.yaml"), out=run, quiet=True)
    assert (result["status"], result["step"]) == ("complete", RUNS[name]["step"])
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", RUNS)
def test_doctor_reads_run(name, capsys):
    """Report the same number of findings: lines, lists and checkpoints are understood."""
    status = command("doctor", restored("trained", name))
    findings = sum(line.startswith("  - ") for line in capsys.readouterr().out.splitlines())
    assert {"status": status, "findings": findings} == RUNS[name]["doctor"]


REPORTS = sorted((OLD / "trained").glob("*/reports/*.json"))


@pytest.mark.parametrize("file", REPORTS, ids=lambda file: f"{file.parts[-3]}-{file.stem}")
def test_report_loads(file):
    """Read a saved report."""
    assert maskwise.Report.load(file).numbers == json.loads(file.read_text())["numbers"]


@pytest.mark.parametrize("name", EXPORTS)
def test_exported_folder_loads_and_exports(name):
    """Load an exported folder and export it again without a change."""
    folder = restored("exports", name)
    assert_loaded(maskwise.load(folder), EXPORTS[name]["loaded"])
    assert_loaded(maskwise.load(maskwise.export(folder, "again", say=None)), EXPORTS[name]["loaded"])


@pytest.mark.parametrize("name, evaluation, options", [("ibot", "knn", {"k": [1, 5]}), ("map", "top1", {})])
def test_exported_folder_evaluates(name, evaluation, options):
    """Evaluate an exported folder on the images in its recipe, with its classifier."""
    assert_report(maskwise.evaluate(evaluation, restored("exports", name), **options), EXPORTS[name][evaluation])


def test_exported_folder_replaced():
    """Recognize an exported folder, which a new export may replace."""
    folder = restored("exports", "simpool")
    assert maskwise.export(restored("exports", "ibot"), folder, say=None) == folder
    assert_loaded(maskwise.load(folder), EXPORTS["ibot"]["loaded"])


def test_run_starts_from_exported_folder():
    """Start a run from an exported folder with heads and centers: its first steps are equal."""
    folder = restored("exports", "ibot")
    changes = ("train.steps=2", "evaluate.knn_every=0", "evaluate.also=null", "teacher.warmup_temp_epochs=0")
    changes = (*changes, "optimizer.warmup_epochs=0", f"method.start_from={folder}")
    maskwise.train(maskwise.read_recipe(OLD / "written" / "ibot.yaml", *changes), out="run", quiet=True)
    bits = same_bits(folder, EXPORTS["ibot"]["loaded"])
    assert_steps(metrics(Path("run")), EXPORTS["ibot"]["continued"], bits)


def test_run_starts_from_research_file():
    """Start a run from an iBOT file: every step is equal."""
    path, _ = research_file("ibot")
    maskwise.train(maskwise.read_recipe(OLD / "written" / "continued.yaml"), out="run", quiet=True)
    bits = same_bits(path, RESEARCH["ibot"]["loaded"]["teacher"], **heads_of("ibot"))
    assert_finished("continued", Path("run"), [], bits)


def heads_of(name: str) -> dict:
    """Give the number of heads of a small transformer, which the old code took for one without asking."""
    return {} if name in ("simpool_convnext", "ibot_swin", "map", "timm_folder") else {"num_heads": 1}


@pytest.mark.parametrize("name", RESEARCH)
def test_research_file_loads(name):
    """Load every network in a file of each layout."""
    path, _ = research_file(name)
    for role, wanted in RESEARCH[name]["loaded"].items():
        assert_loaded(maskwise.load(path, weights=role, **{**heads_of(name), **RESEARCH[name]["options"]}), wanted)


@pytest.mark.parametrize("name", ["dino", "dino_bn", "ibot", "simpool"])
def test_research_file_converts_and_back(name):
    """Convert a training file into a folder and back: networks, heads and centers bit for bit."""
    path, content = research_file(name)
    layout = name.removesuffix("_bn")
    assert command("convert", path, "--to", "folder", "num_heads=1") == 0
    assert command("convert", "folder", "--to", "back.pth", "--layout", layout) == 0
    assert_written_back(content, "ibot_loss" if layout == "ibot" else "dino_loss")


def test_converted_folder_goes_back():
    """Convert a folder that the old code made from an iBOT file back into that file."""
    folder = restored("exports", "converted_ibot")
    assert command("convert", folder, "--to", "back.pth", "--layout", "ibot") == 0
    assert_written_back(research_file("ibot")[1], "ibot_loss")


def assert_written_back(content: dict, loss: str) -> None:
    """Compare networks and centers in back.pth with the original content, bit for bit."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        back = torch.load("back.pth", weights_only=True)
    for part in ("student", "teacher", loss):
        assert back[part].keys() == content[part].keys()
        assert all(torch.equal(value, content[part][key]) for key, value in back[part].items())


def test_map_file_keeps_classifier():
    """Convert a MAP file and score its classifier on sixteen images."""
    path, _ = research_file("map")
    for i in range(16):
        place = Path("photos") / f"class_{i % 8}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = (torch.arange(48 * 40 * 3) * (97 + 10 * i) % 251).to(torch.uint8).reshape(48, 40, 3)
        Image.fromarray(pixels.numpy()).save(place / f"{i:02d}.png")
    assert command("convert", path, "--to", "folder", "pooling_heads=1") == 0
    assert maskwise.evaluate("top1", "folder", test="photos").numbers == pytest.approx(RESEARCH["map"]["top1"])


@pytest.mark.parametrize("layout", ["timm", "dino", "dinov2"])
def test_run_converts_to_flat_file(layout):
    """Convert a run into a flat file: names and tensors are those that the old code wrote."""
    run, file = restored("trained", "ibot"), f"{layout}.safetensors"
    assert command("convert", run, "--to", file, "--layout", layout, "--weights", "teacher") == 0
    wanted = CONVERTED[layout]["tensors"]
    assert named_digest(load_file(file)) == wanted
    if layout != "dino":
        assert named_digest(load_file(OLD / "converted" / file)) == wanted


def test_run_converts_to_training_file():
    """Convert a run into an AttMask file: networks, heads and centers are those that the old code wrote."""
    assert command("convert", restored("trained", "ibot"), "--to", "file.pth", "--layout", "attmask") == 0
    content, wanted = torch.load("file.pth", weights_only=True), CONVERTED["attmask"]["tensors"]
    assert {part: named_digest(content[part]) for part in wanted} == wanted


def test_converted_file_loads():
    """Load a DINOv2 file that the old code wrote, which does not tell the number of heads."""
    encoder = maskwise.load(OLD / "converted" / "dinov2.safetensors", num_heads=2)
    assert_loaded(encoder, CONVERTED["dinov2"]["loaded"])


def test_probe_is_scored():
    """Score a saved linear probe."""
    probe = OLD / "converted" / "probe.safetensors"
    assert_report(maskwise.evaluate("top1", restored("trained", "ibot"), probe=str(probe)), CONVERTED["probe"])
