"""The benches in miniature: they run, they add up, their baselines do the same work, and mistakes are one line."""

import json

import pytest
import torch
from torch import nn

from maskwise.bench import BENCHES, contender, parts
from maskwise.bench import knn as bench_knn
from maskwise.bench import step as bench_step
from maskwise.bench import train as bench_train
from maskwise.bench.table import table
from maskwise.cli import main
from maskwise.functional.errors import UserError


@pytest.mark.slow
def test_a_step_beside_the_plain_one_and_timm_parts(tmp_path, capsys):
    file = tmp_path / "step.json"
    words = ["bench", "step", "debug/tiny", "--batch", "4", "--blocks", "2", "--threads", "1", "--repeats", "3", "--against", "plain,timm", "--json", str(file)]
    assert main(words) == 0
    assert "AttMask alone" in capsys.readouterr().out
    found = json.loads(file.read_text())
    ours, plain = (found["contenders"][kind] for kind in ("ours", "plain"))
    assert set(found["against"]) == {"plain", "timm"}
    assert all(each["loss_difference"] < 1e-5 for each in found["against"].values()), "the same work"
    assert plain["flops_per_step"] > found["contenders"]["timm"]["flops_per_step"] > ours["flops_per_step"]
    assert ours["first_step"]["mask_share"] == pytest.approx(plain["first_step"]["mask_share"])
    assert plain["flops_per_step"] > ours["flops_per_step"] > 0 and plain["host_reads_per_step"] > ours["host_reads_per_step"]
    assert len(ours["turns"]) == len(plain["turns"]) == 2
    assert {"teacher", "mask", "student", "loss", "backward", "clip", "optimizer", "EMA"} <= set(found["parts"])


def test_training_by_parts():
    found = bench_train.run(bench_train.parser().parse_args(["debug/tiny", "--steps", "2", "--images", "2"]))
    assert all(found["parts"][name] > 0 for name in ("wait", "colour", "teacher", "mask", "student", "loss", "backward", "clip", "optimizer", "EMA"))
    assert found["images_per_second"] == pytest.approx(8 / found["seconds_per_step"])
    assert 0 < found["data_wait_share"] < 1 and found["flops_per_step"] > 0 and found["per_image_alone"]["decode"] > 0
    assert "waiting for data" in bench_train.text(found)


def test_knn_in_miniature():
    found = bench_knn.run(bench_knn.parser().parse_args(["--bank", "3000", "--queries", "40", "--width", "8", "--k", "1", "20"]))
    assert found["seconds"] > 0 and set(found["top1"]) == {"1", "20"}
    assert "top-1" in bench_knn.text(found)


def test_products_and_host_reads_are_counted():
    layer, x = nn.Linear(3, 5, bias=False), torch.randn(7, 3)
    assert parts.count(lambda: layer(x)) == {"flops": 2 * 7 * 3 * 5, "host_reads": 0}
    assert parts.count(lambda: float(x.sum()) + x[0, 0].item())["host_reads"] == 2
    q = torch.randn(2, 3, 11, 4)
    assert parts.count(lambda: nn.functional.scaled_dot_product_attention(q, q, q))["flops"] == 2 * 3 * 2 * (2 * 11 * 11 * 4)


def test_a_clock_counts_the_innermost_part_and_leaves_no_trace():
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
        patch.setattr(contender.importlib.util, "find_spec", lambda name: None if name == "lightly" else object())
        assert bench_step.baselines(None) == ["plain", "timm"] and bench_step.baselines("timm, plain,timm") == ["timm", "plain"] and bench_step.baselines("nobody") == []
        with pytest.raises(UserError, match="lightly is not installed"):
            bench_step.baselines("plain,lightly")
        with pytest.raises(UserError, match="knows plain, timm, lightly and nobody, not `nobdy`"):
            bench_step.baselines("nobdy")


def test_mistakes_are_one_line(capsys, tmp_path):
    assert main(["bench", "stpe"]) == 2
    assert "bench knows" in capsys.readouterr().err
    assert main(["bench", "knn", "--json", str(tmp_path / "nowhere" / "a.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["bench"])
    assert not left.value.code
    said = capsys.readouterr().out
    assert all(name in said for name in BENCHES)


def test_a_table_is_as_wide_as_its_cells():
    assert table([["what", "n"], ["a", 1], ["longer", 12.345]]) == "what       n\n------  ----\na          1\nlonger  12.3"


def test_bytes_kept_are_counted_once_and_parameters_are_not():
    from maskwise.bench.memory import Kept

    layer, x = nn.Linear(16, 8), torch.randn(4, 16)
    with Kept(*layer.parameters(), x) as kept:
        hidden = layer(x)
        hidden.exp().sin().cos()
    assert kept.bytes == 2 * 4 * 8 * 4, "exp keeps its answer, which sin keeps too; cos keeps the sine"
