"""`maskwise bench learn` in miniature: operations by hand, lightly's own loss, turns, a run that was killed."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from maskwise import build
from maskwise.bench import BENCHES, learn, learning_curves
from maskwise.cli.main import main
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe

lightly = pytest.importorskip("lightly")
lightly_dino = pytest.importorskip("maskwise.bench.baselines.lightly_dino")
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (
    *("data.count=32", "crops.local_number=0", "crops.global_size=32", "train.batch_size=8", "train.precision=fp32"),
    *("backbone.name=resnet18", "backbone.channels=[4,4,8,8]", "backbone.layers=[1,1,1,1]", "backbone.small_stem=true"),
    *("pooling.name=gap", "masking.name=none", "method.name=dino", "head.norm=batch", "evaluate.limit_bank=16"),
)


def recipe(tmp_path, *more):
    text = "data: {name: shapes}\noptimizer: {warmup_epochs: 0}\nteacher: {warmup_temp_epochs: 0}\ntrain: {epochs: 5}\n"
    (tmp_path / "small.yaml").write_text(text)
    return read_recipe(tmp_path / "small.yaml", *SMALL, *more)


def sides(tmp_path):
    from maskwise.distributed.world import World

    chosen = recipe(tmp_path)
    return learn.both_sides(chosen, build.dataset(chosen), World(), 5)


def test_operations_are_the_sum_over_the_layers(tmp_path):
    """Three products for every layer of the student but the stem, one for those of the teacher."""
    both = sides(tmp_path)
    # (in, out, kernel, side of the output): the stem, then the projection and two convolutions of each block
    layers = [(3, 64, 3, 32), (64, 4, 1, 32), (64, 4, 3, 32), (4, 4, 3, 32)]
    layers += [(4, 4, 1, 16), (4, 4, 3, 16), (4, 4, 3, 16), (4, 8, 1, 8), (4, 8, 3, 8), (8, 8, 3, 8)]
    layers += [(8, 8, 1, 4), (8, 8, 3, 4), (8, 8, 3, 4)]
    convolutions = [2 * a * b * k * k * side * side for a, b, k, side in layers]
    head = 2 * (8 * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 2048)
    batch = 32  # of lightly: all images; both views
    images = 2 * batch
    forward = images * (sum(convolutions) + head)
    backward = 2 * forward - images * convolutions[0]  # no gradient for the pixels
    pairs = 2 * 2 * 2 * batch * 2048  # products of two targets with two outputs, and the gradient of the outputs
    views = both["lightly"].load()
    assert learn.counted(lambda: both["lightly"].compute(views)) == 2 * forward + backward + 2 * pairs


def test_the_loss_is_lightlys(tmp_path):
    from lightly.loss import DINOLoss

    theirs = sides(tmp_path)["lightly"]
    views = theirs.load()
    with torch.no_grad():
        targets = [theirs.teacher_head(theirs.teacher(view).pooled) for view in views]
        outputs = [theirs.head(theirs.student(view).pooled) for view in views]
    expected = DINOLoss(output_dim=2048)(targets, outputs, epoch=0)
    # float64: cross-entropies of the crossed pairs; the first center is zero
    t, s = ([x.double() for x in both] for both in (targets, outputs))
    pairs = [-((t[a] / 0.04).softmax(1) * (s[b] / 0.1).log_softmax(1)).sum(1).mean() for a, b in ((0, 1), (1, 0))]
    loss = theirs.compute(views)
    assert loss == pytest.approx(float(expected), rel=1e-5) and loss == pytest.approx(float(sum(pairs) / 2), rel=1e-5)
    assert theirs.criterion.center.abs().sum() > 0


def test_the_schedule_is_the_published_one(tmp_path):
    theirs = sides(tmp_path)["lightly"]
    assert (theirs.batch_size, theirs.total_steps) == (32, 5)
    rates = []
    for step in range(5):
        theirs.step_index = step
        rates.append(theirs.rate())
    peak = 0.06 * 32 / 128
    weights = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weights], lr=peak)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step(), scheduler.step()
    group = theirs.optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)


def test_views_follow_from_seed_and_step(tmp_path):
    first, second = (sides(tmp_path)["lightly"] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.load(), second.load()))
    second.step_index = 1
    assert not torch.equal(first.load()[0], second.load()[0])
    assert first.load()[0].shape == (32, 3, 32, 32) and len(first.load()) == 2


class Counter:
    """A side whose steps take a given time."""

    def __init__(self, seconds, clock, total_steps=1000):
        self.seconds, self.clock, self.total_steps = seconds, clock, total_steps
        self.step_index, self.batch_size = 0, 4
        self.teacher = self.student = self

    def load(self):
        return [torch.zeros(4, 3)]

    def compute(self, inputs):
        self.step_index += 1
        self.clock.now += self.seconds


def test_turns_budget_and_evaluations(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def accuracy(side):
        clock.now += 100.0  # no part of the budget
        return float(side.step_index)

    def counted(call):
        call()
        return 10**15

    monkeypatch.setattr(learn, "counted", counted)
    both = {"maskwise": Counter(1.0, clock), "lightly": Counter(2.0, clock)}
    race = learn.Race(both, 10.0, 4.0, "cpu_seconds", 3.0, accuracy, clock=lambda: clock.now)
    saved = []
    race.run(lambda: saved.append(list(race.turns)))
    # turns of 3 s: three steps of 1 s, two of 2 s (the second passes the end); 10 s each
    assert race.turns == ["maskwise", "lightly"] * 3 + ["maskwise"] and len(saved) == 7
    steps = {side: [point["step"] for point in race.points if point["side"] == side] for side in both}
    assert steps == {"maskwise": [0, 4, 8, 10], "lightly": [0, 2, 4, 5]}
    last = race.points[-1]
    assert (last["side"], last["cpu_seconds"], last["pflop"], last["images"]) == ("maskwise", 10.0, 10.0, 40)


def test_a_side_ends_with_its_schedule():
    clock = SimpleNamespace(now=0.0)
    side = Counter(1.0, clock, total_steps=3)
    race = learn.Race({"maskwise": side}, 10.0, 5.0, "cpu_seconds", 99.0, lambda side: 0.0, clock=lambda: clock.now)
    race.run(lambda: None)
    assert [point["step"] for point in race.points] == [0, 3] and race.turns == ["maskwise"]


def command(tmp_path, out, *more):
    recipe(tmp_path)
    words = ["bench", "learn", str(tmp_path / "small.yaml"), *SMALL, "data.count=32", "--out", str(out)]
    return [*words, "--budget", "0.00001pflop", "--every", "0.000004pflop", "--slice", "0.01", "--seed", "3", *more]


@pytest.mark.slow
def test_a_killed_benchmark_continues_as_undisturbed(tmp_path, monkeypatch, capsys):
    """Bit for bit on our side; lightly's has the same views and steps, but its kernels do not repeat their sums."""
    for name in ("HIDDEN", "PROTOTYPES"):
        monkeypatch.setattr(lightly_dino, name, 64)
    assert main(command(tmp_path, tmp_path / "whole")) == 0
    printed = capsys.readouterr().out
    whole = json.loads((tmp_path / "whole" / "learn.json").read_text())
    assert (tmp_path / "whole" / "learn.png").read_bytes()[:4] == b"\x89PNG" and "teacher %" in printed
    assert whole["record"]["seed"] == 3 and whole["lightly"] == lightly.__version__

    class Killed(BaseException):
        pass

    write, calls = learn.write_state, []

    def dying(race, path, settings):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        write(race, path, settings)

    monkeypatch.setattr(learn, "write_state", dying)
    with pytest.raises(Killed):
        main(command(tmp_path, tmp_path / "killed"))
    monkeypatch.setattr(learn, "write_state", write)
    assert main(command(tmp_path, tmp_path / "killed")) == 0
    again = json.loads((tmp_path / "killed" / "learn.json").read_text())

    def points(result, side, *keys):
        return [[point[key] for key in keys] for point in result["points"] if point["side"] == side]

    ours = points(whole, "maskwise", "step", "images", "pflop", "teacher", "student")
    assert len(ours) > 3 and points(again, "maskwise", "step", "images", "pflop", "teacher", "student") == ours
    assert points(again, "lightly", "step", "pflop") == points(whole, "lightly", "step", "pflop")
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True)["sides"] for name in ("whole", "killed")]
    for part in ("tensors", "optimizer"):
        first, second = (state["maskwise"][part] for state in states)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    capsys.readouterr()
    assert main(command(tmp_path, tmp_path / "killed", "--seed", "4")) == 2
    assert "holds a benchmark of another recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, parsed", [("600s", (600.0, "cpu_seconds")), (".5pflop", (0.5, "pflop")), ("1e-3PFLOP", (0.001, "pflop"))]
)
def test_quantities(text, parsed):
    assert learn.quantity("--budget", text) == parsed


@pytest.mark.parametrize("text", ["600", "0s", "-1s", "s", "5 hours"])
def test_no_quantities(text):
    with pytest.raises(UserError, match="give CPU seconds or PFLOP"):
        learn.quantity("--budget", text)


def test_refusals(tmp_path, monkeypatch, capsys):
    assert main([*command(tmp_path, tmp_path / "x"), "--every", "3s"]) == 2
    assert "another unit than --budget" in capsys.readouterr().err
    monkeypatch.setattr(learn.importlib.util, "find_spec", lambda name: None)
    assert main(command(tmp_path, tmp_path / "x")) == 2
    assert 'pip install "maskwise[bench]"' in capsys.readouterr().err and "learn" in BENCHES


def test_what_both_spent_for_the_same_accuracy():
    def point(side, spent, teacher, student):
        return {"side": side, "pflop": spent, "teacher": teacher, "student": student}

    points = [point("lightly", 0, 10, 10), point("lightly", 2, 30, 40), point("lightly", 3, 39, 38)]
    ours = [point("maskwise", 0, 10, 10), point("maskwise", 1.5, 41, 20)]
    assert learning_curves.reach(points + ours, "pflop") == (1.5, 2)
    assert learning_curves.reach(points + ours[:1], "pflop") is None
    assert math.isclose(learning_curves.reach(points + ours, "pflop")[0], 1.5)
