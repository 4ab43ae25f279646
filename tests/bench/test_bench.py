"""Benchmarks in miniature: they run, they add up, their baselines do the same work, and mistakes are one line."""

import json

import pytest
import torch
from torch import nn

from maskwise.bench import BENCHES, implementation, parts
from maskwise.bench import knn as bench_knn
from maskwise.bench import step as bench_step
from maskwise.bench import train as bench_train
from maskwise.bench.table import table
from maskwise.cli.main import main
from maskwise.errors import UserError


@pytest.mark.slow
def test_a_step_against_the_reference_and_timm(tmp_path, capsys):
    file = tmp_path / "step.json"
    words = [
        "bench",
        "step",
        "debug/tiny",
        "--batch",
        "4",
        "--blocks",
        "2",
        "--threads",
        "1",
        "--repeats",
        "3",
        "--against",
        "reference,timm",
        "--json",
        str(file),
    ]
    assert main(words) == 0
    assert "AttMask alone" in capsys.readouterr().out
    measured = json.loads(file.read_text())
    ours, reference, timm = (measured["implementations"][kind] for kind in ("maskwise", "reference", "timm"))
    assert set(measured["against"]) == {"reference", "timm"}
    assert all(ratios["loss_difference"] < 1e-5 for ratios in measured["against"].values()), "the same work"
    assert reference["flops_per_step"] > timm["flops_per_step"] > ours["flops_per_step"] > 0
    assert ours["first_step"]["mask_share"] == pytest.approx(reference["first_step"]["mask_share"])
    assert reference["host_reads_per_step"] > ours["host_reads_per_step"]
    assert len(ours["turns"]) == len(reference["turns"]) == 2
    assert {"teacher", "mask", "student", "loss", "backward", "clip", "optimizer", "EMA"} <= set(measured["parts"])


def test_training_by_parts():
    measured = bench_train.run(bench_train.parser().parse_args(["debug/tiny", "--steps", "2", "--images", "2"]))
    assert all(
        measured["parts"][name] > 0
        for name in ("wait", "color", "teacher", "mask", "student", "loss", "backward", "clip", "optimizer", "EMA")
    )
    assert measured["images_per_second"] == pytest.approx(8 / measured["seconds_per_step"])
    assert (
        0 < measured["data_wait_share"] < 1
        and measured["flops_per_step"] > 0
        and measured["per_image_alone"]["decode"] > 0
    )
    assert "waiting for data" in bench_train.text(measured)


def test_knn_in_miniature():
    measured = bench_knn.run(
        bench_knn.parser().parse_args(["--bank", "3000", "--queries", "40", "--width", "8", "--k", "1", "20"])
    )
    assert measured["seconds"] > 0 and set(measured["top1"]) == {"1", "20"}
    assert "top-1" in bench_knn.text(measured)


def test_products_and_host_reads_are_counted():
    layer, x = nn.Linear(3, 5, bias=False), torch.randn(7, 3)
    assert parts.count(lambda: layer(x)) == {"flops": 2 * 7 * 3 * 5, "host_reads": 0}
    assert parts.count(lambda: float(x.sum()) + x[0, 0].item())["host_reads"] == 2
    q = torch.randn(2, 3, 11, 4)
    assert parts.count(lambda: nn.functional.scaled_dot_product_attention(q, q, q))["flops"] == 2 * 3 * 2 * (
        2 * 11 * 11 * 4
    )


def test_timer_counts_the_innermost_part_and_restores_the_model():
    class Thing:
        def outer(self):
            return self.inner()

        def inner(self):
            return 5

    thing = Thing()
    clock = parts.Clock(torch.device("cpu"))
    with clock.around((thing, "outer", "a"), (thing, "inner", "b")), clock.part("rest"):
        assert thing.outer() == 5
    assert set(clock.seconds) == {"a", "b", "rest"} and all(value > 0 for value in clock.seconds.values())
    assert not vars(thing)


def test_baselines_are_those_installed_or_those_named(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(implementation.importlib.util, "find_spec", lambda name: None if name == "lightly" else object())
        assert (
            bench_step.baselines(None) == ["reference", "timm"]
            and bench_step.baselines("timm, reference,timm") == ["timm", "reference"]
            and bench_step.baselines("none") == []
        )
        with pytest.raises(UserError, match="lightly is not installed"):
            bench_step.baselines("reference,lightly")
        with pytest.raises(UserError, match="no baseline `nobdy`; --against takes reference, timm, lightly or none"):
            bench_step.baselines("nobdy")


def test_user_errors_are_one_line(capsys, tmp_path):
    assert main(["bench", "stpe"]) == 2
    assert "no benchmark `stpe`; there are data, step" in capsys.readouterr().err
    assert main(["bench", "knn", "--json", str(tmp_path / "nowhere" / "a.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["bench"])
    assert not left.value.code
    help_text = capsys.readouterr().out
    assert all(name in help_text for name in BENCHES)


def test_a_table_is_as_wide_as_its_cells():
    assert (
        table([["what", "n"], ["a", 1], ["longer", 12.345]]) == "what       n\n------  ----\na          1\nlonger  12.3"
    )


def test_saved_tensors_are_counted_once_and_parameters_are_not():
    from maskwise.bench.memory import SavedTensors

    layer, x = nn.Linear(16, 8), torch.randn(4, 16)
    with SavedTensors(*layer.parameters(), x) as saved:
        hidden = layer(x)
        hidden.exp().sin().cos()
    assert saved.bytes == 2 * 4 * 8 * 4, "exp and sin save the result of exp; cos saves that of sin"
