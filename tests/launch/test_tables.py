"""Tables of AttMask and SimPool: equal computation, recipes of the papers, results by hand, stories in miniature."""

import contextlib
import importlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from launch.reproduce.tables import attmask, measures, results, runs, simpool
from launch.reproduce.tables.chart import write_charts
from launch.reproduce.tables.page import baselines_text, page
from launch.reproduce.tables.plan import Contrast, Job, Row, Setting, chosen, jobs, length_words, tiny_words, unequal
from maskwise import read_recipe
from maskwise.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
STORIES = {"attmask": attmask.STORY, "simpool": simpool.STORY}
SMALL = [
    (name, budget, key)
    for name, story in STORIES.items()
    for budget in ("cpu", "gpu")
    for key in story.settings[budget]
]
FULL = [(name, "full", key) for name, story in STORIES.items() for key in story.settings["full"]]
command = importlib.import_module("launch.reproduce.tables.__main__")


def recipes_of(name, budget, key, seed=0):
    planned = jobs(key, STORIES[name].settings[budget][key])
    return {job.row: job.read() for job in planned if job.seed == seed}


@pytest.mark.parametrize(("name", "budget", "key"), SMALL)
def test_rows_are_trained_alike(name, budget, key):
    recipes = recipes_of(name, budget, key)
    assert unequal(recipes) == {}
    first, *others = recipes.values()
    for recipe in others:
        differing = {key.partition(".")[0] for key in first.changes(recipe)}
        allowed = {"method", "masking", "teacher", "head"} if name == "attmask" else {"pooling"}
        assert differing <= allowed, differing
    lengths = {(recipe.train.epochs, recipe.train.steps, recipe.train.batch_size) for recipe in recipes.values()}
    crops = {(recipe.crops.local_number, recipe.crops.global_size) for recipe in recipes.values()}
    assert len(lengths) == len(crops) == 1


def test_a_row_with_other_crops_is_seen():
    setting = attmask.SMALL
    cheated = {**setting.rows, "high": Row("more crops", (*setting.rows["high"].words, "crops.local_number=6"))}
    planned = jobs("shapes", Setting("t", setting.recipe, cheated, ()))
    found = unequal({job.row: job.read() for job in planned if job.seed == 0})
    assert set(found) == {"crops.local_number"} and found["crops.local_number"]["high"] == 6


def test_maskings_of_the_rows():
    recipes = recipes_of("attmask", "cpu", "shapes")
    assert {row: recipe.masking.name for row, recipe in recipes.items()} == {
        "none": "none",
        "random": "random",
        "random75": "random",
        "block": "block",
        "low": "attmask_low",
        "high": "attmask_high",
        "hint": "attmask_hint",
    }
    assert recipes["none"].method.name == "dino" and recipes["high"].method.name == "ibot"
    assert (
        recipes["random75"].masking.keywords()["ratio"] == 0.75 and recipes["random75"].masking.keywords()["prob"] == 1
    )
    assert recipes["random"].masking.keywords()["ratio"] == recipes["high"].masking.keywords()["ratio"] < 0.5
    assert {recipe.pooling.name for recipe in recipes.values()} == {"simpool"}
    assert {recipe.pooling.name for recipe in recipes_of("attmask", "cpu", "shapes_cls").values()} == {"cls"}


def test_small_runs_are_those_of_the_shipped_recipe():
    shipped = read_recipe(attmask.SHAPES, try_model=False)
    recipe = recipes_of("attmask", "cpu", "shapes", seed=3)["hint"]
    changed = {key for key in shipped.changes(recipe) if not key.startswith(("evaluate.", "masking."))}
    assert changed == {"seed"}
    labels = recipes_of("simpool", "cpu", "supervised_vit")["simpool"]
    for key in ("embed_dim", "depth", "num_heads"):
        assert labels.backbone.keywords()[key] == shipped.backbone.keywords()[key]


@pytest.mark.parametrize(("name", "budget", "key"), FULL)
def test_dry_run_lists_the_papers_recipes(name, budget, key, tmp_path, capsys):
    words = [name, "--budget", budget, "--settings", key, "--out", str(tmp_path / "out"), "--dry-run", "--gpus", "8"]
    assert command.main([*words, "data.path=/data/imagenet"]) == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    setting = STORIES[name].settings[budget][key]
    assert len(listed) == len(setting.rows) * len(setting.seeds) and not list((tmp_path / "out").iterdir())
    for line in listed:
        launcher, rest = line.split(" train ")
        recipe, out, folder, *overrides = shlex.split(rest)
        assert launcher == "torchrun --nproc-per-node=8 -m maskwise" and out == "--out" and "/runs/" in folder
        read = read_recipe(recipe, *overrides, try_model=False)
        assert (ROOT / "configs" / f"{recipe}.yaml").is_file() and read.data.arguments["path"] == "/data/imagenet"


def test_published_numbers_are_those_of_the_recipes_headers():
    for name, budget, key in FULL:
        for row in STORIES[name].settings[budget][key].rows.values():
            if row.recipe is None or row.words or not row.published:
                continue
            header = (ROOT / "configs" / f"{row.recipe}.yaml").read_text(encoding="utf-8").partition("\n\n")[0]
            for number in row.published.values():
                assert f"{number}" in header, (row.recipe, number)


def test_contrasts_name_rows_and_published_differences():
    for story in STORIES.values():
        for settings in story.settings.values():
            for setting in settings.values():
                for pair in setting.contrasts:
                    one, other = setting.rows[pair.row].published, setting.rows[pair.reference].published
                    if pair.published is not None and setting.metric in one and setting.metric in other:
                        difference = one[setting.metric] - other[setting.metric]
                        assert difference == pytest.approx(pair.published, abs=0.11), (setting.title, pair)
                    if pair.sign:
                        assert pair.sign * pair.published > 0


def test_predictions_page_has_every_prediction():
    text = (ROOT / "docs" / "predictions.md").read_text(encoding="utf-8")
    kinds = {"dino_vit": "DINO, ViT: ", "dino_resnet": "DINO, ResNet: ", "dino_convnext": "DINO, ConvNeXt: "}
    kinds |= {name.replace("dino", "supervised"): kind.replace("DINO", "supervised") for name, kind in kinds.items()}
    settings = {"shapes": attmask.SMALL, **simpool.SMALL}
    for name, setting in settings.items():
        for pair in setting.contrasts:
            if pair == simpool.WITHOUT_GAMMA or (pair.row, pair.reference) == ("simpool", "simpool_nogamma"):
                assert "| all: SimPool - SimPool without gamma | none |" in text and pair.sign == 0
                continue
            names = " - ".join(setting.rows[row].label for row in (pair.row, pair.reference))
            published = "" if pair.published is None else f" {pair.published}"
            sign = {1: "+", -1: "-", 0: "none"}[pair.sign]
            assert f"| {kinds.get(name, '')}{names} | {sign} |{published} " in text, (name, pair)


def test_scaled_runs_have_whole_epochs_and_a_curve():
    recipe = read_recipe("attmask/100pct_block", try_model=False)
    assert length_words(recipe, 1.0)[-1] == "evaluate.knn_every=12" and "train.epochs" not in str(
        length_words(recipe, 1)
    )
    assert length_words(recipe, 0.1)[0] == "train.epochs=10" and length_words(recipe, 0.001)[0] == "train.epochs=1"


def test_chosen_rows_leave_out_contrasts_of_others():
    made = chosen(attmask.STORY.settings["cpu"], ["shapes", "shapes_cls"], ["block", "hint"], 2)
    assert set(made) == {"shapes", "shapes_cls"} and made["shapes"].seeds == (0, 1)
    assert [(pair.row, pair.reference) for pair in made["shapes"].contrasts] == [("hint", "block")]
    assert made["shapes_cls"].gate is None


def test_a_wrong_name_is_one_line(tmp_path, capsys):
    assert command.main(["attmask", "--out", str(tmp_path), "--rows", "hihg"]) == 2
    assert "no row hihg; there are none, random" in capsys.readouterr().err
    assert command.main(["attmask", "--out", str(tmp_path), "--settings", "cifar10"]) == 2
    assert "give --packs FOLDER" in capsys.readouterr().err


# results of runs whose numbers are known


def run_of(top1, right=None, seconds=60.0):
    knn = {"numbers": {"top1": top1}}
    if right is not None:
        knn["right"] = measures.packed(np.asarray(right, dtype=bool))
    run = {"measures": {"knn": knn}, "pace": None, "seconds_of_training": seconds, "steps": 7, "batch_size": 4}
    baselines = {"untrained_pooled_top1_k20": top1 - 30, "pixels_top1_k20": 42.0, "chance": 12.5}
    return run | {"baselines": {**baselines, "untrained_patch_mean_top1_k20": 99.0}}


def setting_of(*pairs, rows=("a", "b"), seeds=(0, 1, 2, 3, 4), **more):
    return Setting("s", "debug/tiny", {row: Row(row) for row in rows}, tuple(pairs), seeds=seeds, **more)


A, B = [61.2, 60.1, 62.7, 59.8, 61.5], [58.9, 58.3, 59.9, 57.8, 59.1]


def test_a_contrast_by_hand():
    found = {f"s/a/{i}": run_of(x) for i, x in enumerate(A)} | {f"s/b/{i}": run_of(x) for i, x in enumerate(B)}
    (one,) = results.contrasts(found, "s", setting_of(Contrast("a", "b", 1, 3.0, "paper")))
    assert one["differences"] == pytest.approx([2.3, 1.8, 2.8, 2.0, 2.4]) and one["mean"] == pytest.approx(2.26)
    assert one["over_seeds_t"] == pytest.approx(
        [2.26 - 2.7764 * 0.38471 / 5**0.5, 2.26 + 2.7764 * 0.38471 / 5**0.5], abs=1e-3
    )
    assert one["p"] == one["p_holm"] < 0.001 and one["verdict"] == results.AS_PREDICTED
    (other,) = results.contrasts(found, "s", setting_of(Contrast("b", "a", 1)))
    assert other["mean"] == -one["mean"] and other["verdict"] == results.CONTRADICTS
    (neither,) = results.contrasts(found, "s", setting_of(Contrast("a", "b", 0)))
    assert neither["verdict"] == results.UNPREDICTED


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, -0.5, 1.5], results.NOT_SIGNIFICANT),
        ([0.31, 0.30, 0.29], results.TOO_SMALL),
        ([2.0, 2.1, 1.9], results.AS_PREDICTED),
        ([2.0], results.ONE_SEED),
    ],
)
def test_verdicts(differences, verdict):
    found = {f"s/a/{i}": run_of(50 + x) for i, x in enumerate(differences)}
    found |= {f"s/b/{i}": run_of(50.0) for i in range(3)}
    (one,) = results.contrasts(found, "s", setting_of(Contrast("a", "b", 1), seeds=(0, 1, 2)))
    assert one["verdict"] == verdict


def test_many_contrasts_need_more_than_one():
    differences = [1.5, 0.9, 1.2]  # p = .02 alone
    found = {f"s/{row}/{i}": run_of(50 + x) for row in "acd" for i, x in enumerate(differences)}
    found |= {f"s/b/{i}": run_of(50.0) for i in range(3)}
    pairs = [Contrast(row, "b", 1) for row in "acd"]
    one = results.contrasts(found, "s", setting_of(pairs[0], rows="ab", seeds=(0, 1, 2)))[0]
    three = results.contrasts(found, "s", setting_of(*pairs, rows="abcd", seeds=(0, 1, 2)))[0]
    assert one["verdict"] == results.AS_PREDICTED and three["verdict"] == results.NOT_SIGNIFICANT
    assert three["p_holm"] == pytest.approx(3 * one["p"])


def test_power_from_two_seeds_by_hand():
    found = {f"s/a/{i}": run_of(x) for i, x in enumerate((51.0, 53.0, 99.0))}
    found |= {f"s/b/{i}": run_of(50.0) for i in range(3)}
    power = results.power(found, "s", setting_of(Contrast("a", "b", 1), seeds=(0, 1, 2)))
    # differences 1 and 3: standard deviation sqrt(2); (2.8016 * 1.4142 / .5)^2 = 62.8
    assert power["seeds"] == [0, 1] and power["seeds_needed"] == 63 and power["seeds_planned"] == 3
    assert power["smallest_effect"] == pytest.approx(2.8016 * 2**0.5 / 3**0.5, abs=1e-3)
    assert results.power({"s/a/0": run_of(1.0)}, "s", setting_of(Contrast("a", "b", 1))) is None


def test_images_are_resampled_with_the_seed_they_belong_to():
    generator = np.random.default_rng(0)
    right = {row: generator.random((2, 64)) < share for row, share in (("a", 0.9), ("b", 0.5))}
    found = {
        f"s/{row}/{i}": run_of(100 * part.mean(), part) for row, parts in right.items() for i, part in enumerate(parts)
    }
    (one,) = results.contrasts(found, "s", setting_of(Contrast("a", "b", 1), seeds=(0, 1)))
    low, high = one["over_images_bootstrap"]
    assert low < one["mean"] < high and one["mean"] == pytest.approx(100 * (right["a"].mean() - right["b"].mean()))
    assert 5 < high - low < 60


def test_right_answers_survive_being_stored():
    right = np.random.default_rng(1).random(1001) < 0.3
    stored = json.loads(json.dumps(measures.packed(right)))
    assert np.array_equal(measures.unpacked(stored), right) and len(stored["bits"]) == 2 * 126


def test_page_shows_unmeasured_and_measured_settings():
    setting = setting_of(Contrast("a", "b", 1, 3.0, "paper"))
    found = {f"s/a/{i}": run_of(x) for i, x in enumerate(A)} | {f"s/b/{i}": run_of(x) for i, x in enumerate(B)}
    part = {
        "title": "measured",
        "unequal": {},
        "ended_at_gate": False,
        "rows": results.summary(found, "s", setting),
        "contrasts": results.contrasts(found, "s", setting),
        "power": results.power(found, "s", setting),
    }
    record = {"command": "c", "date": "2026-01-02", "commit": ["a" * 12], "hardware": "h", "torch": "2"}
    empty = {**part, "title": "empty", "rows": {"a": {}, "b": {}}}
    text = page(
        {"record": record, "budget": "cpu", "runs": found, "settings": {"s": part, "e": empty}},
        {"s": setting, "e": setting},
        "Title",
    )
    assert (
        "| a | 61.1 (1.2) |" in text
        and "| a - b | +2.26 |" in text
        and "| < .001 | +3.0 (paper) | as predicted |" in text
    )
    assert "## empty\n\nNot yet measured." in text and "half a point needs" in text
    # (sum(A) + sum(B)) / 10 - 30 = 29.93
    assert "k-NN without training, mean over runs: untrained network 29.9, raw pixels 42.0, chance 12.5." in text
    none = {key: {**run, "baselines": {}} for key, run in found.items()}
    assert baselines_text(none) == ""


def test_a_row_has_one_color_in_all_panels(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: (figures.append(self), file.write_bytes(b"")))
    setting = setting_of(Contrast("a", "b", 1))
    settings = {"s": setting, "t": Setting("t", setting.recipe, {"b": setting.rows["b"]}, ()), "empty": setting}
    found = {
        f"{key}/{row}/0": run_of(60.0) | {"curve": [[1, 50.0], [2, 60.0]]}
        for key, row in (("s", "a"), ("s", "b"), ("t", "b"))
    }
    parts = {"s": {"a": {"knn": {}}}, "t": {"b": {"knn": {}}}, "empty": {"a": {}}}
    result = {"runs": found, "settings": {key: {"rows": rows, "contrasts": []} for key, rows in parts.items()}}
    write_charts(result, settings, tmp_path / "table.png")
    assert (tmp_path / "table.png").is_file() and len(figures) == 1 and len(figures[0].axes) == 4, "two settings"
    first, second = (figures[0].axes[place].get_lines() for place in (0, 2))
    assert {line.get_label(): line.get_color() for line in first} == {"a": "C0", "b": "C1"}
    assert {line.get_label(): line.get_color() for line in second} == {"b": "C1"}


def test_a_setting_ends_where_its_first_run_learned_nothing():
    setting = setting_of(Contrast("a", "b", 1), gate="a")
    learned = {"curve": [[8, 30.1]], "baselines": {"untrained_pooled_top1_k20": 28.0}}
    assert not results.ended_at_gate({}, "s", setting)
    assert not results.ended_at_gate({"s/a/0": learned}, "s", setting)
    assert results.ended_at_gate({"s/a/0": {**learned, "curve": [[8, 29.9]]}}, "s", setting)


# whole stories in miniature


def story(out, name="attmask", *words):
    return command.main([name, "--miniature", "--processes", "0", "--out", str(out), *words])


def numbers_of(out):
    """All numbers of a table that do not depend on time."""
    result = json.loads((out / "table.json").read_text())
    measured = {
        key: {name: part["numbers"] for name, part in run["measures"].items()} for key, run in result["runs"].items()
    }
    curves = {key: run["curve"] for key, run in result["runs"].items()}
    return measured, curves, result["settings"]


SHORT = ("--settings", "shapes", "--rows", "none", "high", "--seeds", "2")


@pytest.mark.slow
def test_story_of_attmask(tmp_path, capsys):
    assert story(tmp_path, "attmask", *SHORT) == 0
    printed = capsys.readouterr().out
    assert "4 runs are left, about" in printed and "4 of 4 runs" in printed
    measured, curves, settings = numbers_of(tmp_path)
    assert set(measured) == {f"shapes/{row}/{seed}" for row in ("none", "high") for seed in (0, 1)}
    for numbers in measured.values():
        assert set(numbers) == {"knn", "linear", "few_shot", "mask_quality", "localization"}
        assert 0 <= numbers["knn"]["top1"] <= 100 and "top1_5" in numbers["few_shot"]
    assert all(len(curve) == 2 for curve in curves.values())
    assert settings["shapes"]["unequal"] == {}
    run = json.loads((tmp_path / "table.json").read_text())["runs"]["shapes/high/1"]
    assert run["record"]["seed"] == 1 and run["record"]["command"].startswith(
        "maskwise train pretrain/quickstart_shapes"
    )
    assert run["pace"]["flops_per_step"] > 0 and run["measures"]["knn"]["right"]["images"] == 64
    assert measures.unpacked(run["measures"]["knn"]["right"]).mean() * 100 == pytest.approx(
        run["measures"]["knn"]["numbers"]["top1"]
    )
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("seed*/**/*.json")}
    assert story(tmp_path, "attmask", *SHORT) == 0, "nothing is done again"
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("seed*/**/*.json")} == before
    assert story(tmp_path, "attmask", *SHORT, "--scale", "2") == 2 and "another recipe" in capsys.readouterr().err


@pytest.mark.slow
def test_story_of_simpool(tmp_path):
    words = ("--settings", "dino_vit", "supervised_resnet", "--rows", "gap", "simpool", "--seeds", "2")
    assert story(tmp_path, "simpool", *words) == 0
    measured, _, settings = numbers_of(tmp_path)
    assert measured["dino_vit/gap/0"]["localization"] == {} and measured["dino_vit/simpool/0"]["localization"]
    assert "lost" in measured["supervised_resnet/gap/1"]["discovery"]
    assert set(measured["supervised_resnet/simpool/0"]) == {"top1", "knn", "localization", "discovery"}
    assert (
        settings["supervised_resnet"]["metric"] == "top1"
        and settings["supervised_resnet"]["power"]["seeds_needed"] >= 2
    )
    (pair,) = settings["dino_vit"]["contrasts"]
    assert (pair["row"], pair["reference"]) == ("simpool", "gap") and "over_images_bootstrap" in pair
    text = (tmp_path / "table.md").read_text()
    assert "| SimPool - GAP |" in text and (tmp_path / "table.png").stat().st_size > 10_000


@pytest.mark.slow
def test_killed_anywhere_and_started_again(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ("--settings", "shapes", "--rows", "none", "high", "--seeds", "1")
    assert story(whole, "attmask", *words) == 0
    # stopped in the middle of the first run, then between evaluations, then before the record of a finished run
    import maskwise

    trained = maskwise.train

    def stopped(recipe, out, **options):
        from maskwise.engine import run_log

        counted = run_log.RunLog.count

        def count(self, step, images):
            counted(self, step, images)
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(run_log.RunLog, "count", count)
            return trained(recipe, out=out, **options)

    with monkeypatch.context() as patch:
        patch.setattr(maskwise, "train", stopped)
        assert story(cut, "attmask", *words) == command.UNFINISHED
    assert not list((cut / "records").rglob("*.json")) and list((cut / "runs").rglob("step_00000003"))

    class Killed(BaseException):
        pass

    def killed(*arguments):
        raise Killed

    for owner, name in ((runs.__dict__, "write_record"), (measures.MEASURES, "few_shot")):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setitem(owner, name, killed)
            story(cut, "attmask", *words)
    assert story(cut, "attmask", *words) == 0
    assert numbers_of(cut) == numbers_of(whole)


@pytest.mark.slow
def test_a_published_table_is_resumed_in_another_folder(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    words = ("--settings", "shapes", "--rows", "none", "high")
    assert story(first, "attmask", *words, "--seeds", "1") == 0
    resumed = (*words, "--seeds", "2", "--resume", str(first / "table.json"))
    assert story(second, "attmask", *resumed) == 0
    assert f"2 runs are taken from {first / 'table.json'}" in capsys.readouterr().out
    assert not (second / "runs" / "shapes" / "high" / "seed0").exists(), "not trained again"
    assert (second / "runs" / "shapes" / "high" / "seed1").is_dir()
    one, both = (json.loads((folder / "table.json").read_text())["runs"] for folder in (first, second))
    assert len(both) == 4 and all(both[key] == run for key, run in one.items())
    assert story(second, "attmask", *resumed) == 0 and "0 runs are taken" in capsys.readouterr().out
    assert story(tmp_path / "third", "attmask", *resumed, "--scale", "2") == 2
    assert "shapes/none/0 is of another recipe" in capsys.readouterr().err
    (tmp_path / "wrong.json").write_text("[]")
    assert story(tmp_path / "third", "attmask", *words, "--resume", str(tmp_path / "wrong.json")) == 2
    assert "not the JSON of a table" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_start_leaves_no_process_and_continues(tmp_path):
    words = ["attmask", "train.epochs=400", "--miniature", "--processes", "1", "--out", str(tmp_path)]
    words += ["--settings", "shapes", "--rows", "high", "--seeds", "1", "--stages", "runs"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'ssl'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen([sys.executable, "-m", "launch.reproduce.tables", *words], env=environment, cwd=ROOT)
    metrics = tmp_path / "runs" / "shapes" / "high" / "seed0" / "metrics.jsonl"
    try:
        while started.poll() is None and not (metrics.is_file() and metrics.stat().st_size > 2000):
            time.sleep(0.05)
    finally:
        started.kill()
        started.wait()
    from maskwise.engine.run_lock import holder

    while (found := holder(metrics.parent)) is not None and found.alive:  # its child saves and ends
        time.sleep(0.05)
    assert started.returncode == -signal.SIGKILL and (metrics.parent / "preempted").is_file()


def test_no_time_is_no_run(tmp_path, capsys):
    assert story(tmp_path, "attmask", *SHORT, "--seconds", "0") == command.UNFINISHED
    assert "pace: 2 left; the same command goes on" in capsys.readouterr().out


def test_a_second_start_is_refused(tmp_path, capsys):
    from maskwise.engine.run_lock import RunLock

    with RunLock(tmp_path) as lock, contextlib.redirect_stdout(io.StringIO()):
        lock.acquire()
        held = subprocess.run(
            [sys.executable, "-m", "launch.reproduce.tables", "attmask", "--out", str(tmp_path), "--dry-run"],
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'ssl'}:{ROOT}"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert held.returncode == 2 and "another maskwise" in held.stderr


def test_recorded_commands_name_no_folder_of_the_machine():
    job = Job("supervised_resnet", "gap", 0, simpool.SUPERVISED, ("seed=0", "data.path=/data/packs/cifar10-jpeg"))
    words = runs.command_words(job)
    assert words[:4] == ["train", "launch/reproduce/tables/shapes_supervised.yaml", "--out", words[3]]
    assert words[3] == "FOLDER/runs/supervised_resnet/gap/seed0" and "data.path=cifar10-jpeg" in words


def test_tiny_words_shrink_both_kinds_of_runs():
    assert "augment.size=32" in tiny_words(simpool.LABELS_RESNET) and "crops.global_size=32" in tiny_words(
        attmask.SMALL
    )


def test_an_unfinished_run_has_no_record(tmp_path):
    (job, *_) = jobs("shapes", attmask.SMALL)
    assert runs.finished(job, tmp_path) is None
    file = runs.record_file(job, tmp_path)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"plan": "another"}))
    with pytest.raises(UserError, match="another recipe"):
        runs.finished(job, tmp_path)
