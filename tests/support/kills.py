"""Kill a run of configs/debug/tiny.yaml again and again, and see that it ends as if nothing had happened.

`python tests/support/kills.py --kills 200 --json docs/results/kills.json` kills at random moments and once at each
named point, starts again after each kill, and compares what is left in the end with an uninterrupted run: checkpoints,
reports and pictures byte for byte, metrics.jsonl and TensorBoard number for number (times aside). The exit status is 1
at the first difference.
"""

import argparse
import collections
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "ssl"))

import torch  # noqa: E402

import maskwise  # noqa: E402
from maskwise import build  # noqa: E402, F401  (imported before the first fork, so that a start costs little)
from maskwise.engine import append_file, checkpoint, run_lock, run_log  # noqa: E402, F401
from maskwise.engine.loggers import tensorboard  # noqa: E402, F401
from maskwise.engine.trainer import Trainer  # noqa: E402
from maskwise.evaluation import EVALUATIONS  # noqa: E402
from maskwise.evaluation import knn as knn_module  # noqa: E402

SMALL = (
    "data.count=24",
    "train.epochs=4",
    "train.save_every=2",
    "evaluate.knn_every=2",
    "evaluate.pictures_every=2",
    "evaluate.limit_bank=16",
)  # 12 steps
KILLS_OF_A_RUN = 10  # then it goes on undisturbed, however little of it fits between kills on a slow machine
STOPPED = 3  # exit status of a process that received a stop signal
TIMES = {"img_s", "data_wait", "seconds"}


def recipe():
    return maskwise.read_recipe(str(ROOT / "configs" / "debug" / "tiny.yaml"), *SMALL)


# Starting and killing


def start(folder: Path, point=None, seed: int = 0) -> int:
    """Train in a child, which dies at `point` if there is one; returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        if point:
            point()
        torch.manual_seed(seed)  # what a process has in its generators must not matter
        status = 0 if maskwise.train(recipe(), out=folder)["status"] == "complete" else STOPPED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, within: float) -> bool:
    """Wait for a child to end; False if it had to be killed after `within` seconds.

    Raises AssertionError when it fails.
    """
    until = time.monotonic() + within
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, STOPPED, -signal.SIGKILL), f"a start ended with {code}"
            return code == 0
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.002)


def saved(folder: Path) -> int:
    """The step from which a start would go on; its checksums are verified."""
    messages = []
    loaded = checkpoint.Checkpoints(folder, print_line=messages.append).load_last()
    assert not any("checksum" in line or "No such file" in line for line in messages), messages
    return loaded.step if loaded else 0


def interrupted_phase(folder: Path) -> str:
    """In the middle of what a kill came, as far as what lies there tells."""
    names = {path.name for path in folder.rglob(".*")} - {run_lock.FILE}  # the lock lies there from start to end
    if not (folder / "metrics.jsonl").exists():
        return "while starting"
    if any(name.startswith(".writing_") for name in names):
        return "while writing a checkpoint"
    if any(name.startswith(".removing_") for name in names):
        return "while pruning"
    pointed = folder / "checkpoints" / "last"
    steps = sorted(path.name for path in folder.glob("checkpoints/step_*"))
    if ".last" in names or (steps and (not pointed.exists() or pointed.read_text().strip() != steps[-1])):
        return "between rename and pointer"
    if names:
        return "while writing a report, a picture or the run's record"
    return "while training, evaluating or starting again"


# Comparing


def content(folder: Path) -> dict:
    """What must be equal in two runs, by name."""
    contents = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            contents[name] = [
                {key: value for key, value in line.items() if key not in TIMES} for line in run_log.read_metrics(path)
            ]
        elif path.parent.name == "reports":
            contents[name] = {key: value for key, value in json.loads(path.read_text()).items() if key != "cost"}
        elif path.name == "meta.json":
            meta = checkpoint.verify_checksum(path.read_bytes())
            contents[name] = {key: value for key, value in meta.items() if key not in ("seconds", "commit")}
        elif path.name == "run.json":
            contents[name] = {
                key: value
                for key, value in json.loads(path.read_text()).items()
                if key not in ("started", "starts", "commit")
            }
        elif path.parent.name != "tensorboard":
            contents[name] = path.read_bytes()
    contents["tensorboard"] = curves(folder / "tensorboard")
    return contents


def curves(folder: Path) -> dict:
    """TensorBoard's scalars by tag: the value at each step, as its own reader finds them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    read.Reload()
    tags = read.Tags()
    shown = {
        tag: {event.step: event.value for event in read.Scalars(tag)}
        for tag in tags["scalars"]
        if tag.split("/")[-1] not in TIMES
    }
    return {
        **shown,
        **{tag: {event.step: event.encoded_image_string for event in read.Images(tag)} for tag in tags["images"]},
    }


def assert_same(expected: dict, folder: Path) -> None:
    """Raises AssertionError when a run is not what the whole one is, or has left anything besides."""
    actual = content(folder)
    assert expected.keys() == actual.keys(), f"{folder}: {sorted(expected.keys() ^ actual.keys())}"
    different = [name for name in expected if expected[name] != actual[name]]
    assert not different, f"{folder}: {different} differ"


# Named points: each is called in the child and patches what it is to die in


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def patched(owner, name: str, chosen, *, before=None, after=None, turn: int = 1) -> None:
    """Patch owner.name to die at the turn-th call that `chosen(*arguments)` accepts.

    Runs `before` instead of the call and dies, or makes the call, runs `after` and dies.
    """
    original, turns = getattr(owner, name), [0]

    def call(*arguments, **options):
        if chosen(*arguments, **options):
            turns[0] += 1
            if turns[0] == turn:
                if before is not None:
                    before(*arguments, **options)
                    die()
                original(*arguments, **options)
                (after or die)(*arguments, **options)
                die()
        return original(*arguments, **options)

    setattr(owner, name, call)


def nothing(*_, **__):
    """Done before dying."""


def half(path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])


def open_only(tensors, path, **_):
    open(path, "wb").close()


def half_tensors(tensors, path, **_):
    from safetensors.torch import save

    half(path, save(tensors))


def is_tensors(file):
    return lambda tensors, path, **_: Path(path).name == file


def is_text(name):
    return lambda path, *_, **__: path.name.startswith(name)


def half_text(path, text, **_):
    half(path, text.encode())


def synced(handle) -> str:
    return os.readlink(f"/proc/self/fd/{handle}")


def half_record(file, record):
    os.write(file.file.fileno(), record[: len(record) // 2])


def half_removed(path, *_, **__):
    next(Path(path).iterdir()).unlink()


def half_picture(path, picture):
    from maskwise.imaging.drawing import write_png

    file = Path(tempfile.mkdtemp()) / "whole.png"
    write_png(file, picture)
    half(path, file.read_bytes())
    shutil.rmtree(file.parent)


def moves(source: str, target: str):
    return lambda path, destination, *_, **__: (
        Path(path).name.startswith(source) and Path(destination).name.startswith(target)
    )


def removes(path, *_, **__):
    return Path(path).name.startswith(".removing_")


def in_evaluation(turn: int):
    return lambda: patched(knn_module, "accuracies", lambda *_, **__: True, before=nothing, turn=turn)


def stop_signal():
    """Not killed: told to stop in the sixth step, so that the evaluation after it is put off."""
    step = Trainer.step

    def step_with_signal(trainer, *arguments, **options):
        if trainer.step_index == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments, **options)

    Trainer.step = step_with_signal


def after_evaluation():
    original, turns = EVALUATIONS["knn"], [0]

    def knn(*arguments, **options):
        report = original(*arguments, **options)
        turns[0] += 1
        if turns[0] == 2:
            die()
        return report

    EVALUATIONS["knn"] = knn


def text(name: str, turn: int):
    return lambda: patched(pathlib.Path, "write_text", is_text(name), before=half_text, turn=turn)


def tensors(file: str, before):
    return lambda: patched(checkpoint.safetensors.torch, "save_file", is_tensors(file), before=before, turn=3)


def record(name: str):
    return lambda: patched(
        append_file.AppendFile,
        "write",
        lambda file, record: file.path.name.startswith(name),
        before=half_record,
        turn=7,
    )


POINTS = {
    "file opened": tensors("model.safetensors", open_only),
    "model half written": tensors("model.safetensors", half_tensors),
    "optimizer half written": tensors("optimizer.safetensors", half_tensors),
    "meta.json half written": text("meta.json", 3),
    "before fsync": lambda: patched(os, "fsync", lambda handle: ".writing_" in synced(handle), before=nothing, turn=12),
    "before rename": lambda: patched(os, "rename", moves(".writing_", "step_"), before=nothing, turn=3),
    "after rename, before the pointer": lambda: patched(os, "rename", moves(".writing_", "step_"), turn=3),
    "after the first rename, before any pointer": lambda: patched(os, "rename", moves(".writing_", "step_"), turn=1),
    "pointer half written": text(".last", 3),
    "before the pointer moves": lambda: patched(os, "replace", moves(".last", "last"), before=nothing, turn=3),
    "after the pointer moved": lambda: patched(os, "replace", moves(".last", "last"), turn=3),
    "after the last pointer moved": lambda: patched(os, "replace", moves(".last", "last"), turn=6),
    "while pruning": lambda: patched(shutil, "rmtree", removes, before=half_removed, turn=2),
    "while pruning for the last time": lambda: patched(shutil, "rmtree", removes, before=half_removed, turn=4),
    "while evaluating": in_evaluation(3),
    "evaluated, nothing written": after_evaluation,
    "report half written": text(".knn_step_", 2),
    "report written, its line not": lambda: patched(
        run_log.RunLog, "_write", lambda run_log, line: "report" in line, before=nothing, turn=2
    ),
    "metrics.jsonl in the middle of a line": record("metrics.jsonl"),
    "TensorBoard in the middle of a record": record("events."),
    "picture half written": lambda: patched(run_log, "write_png", lambda *_: True, before=half_picture, turn=2),
    "run.json half written": text(".run.json", 1),
    "recipe.yaml half written": text(".recipe.yaml", 1),
    "run.json half written again": text(".run.json", 2),
}
# Points of a start that goes on: a first start dies at the first, the next at the second.
TWICE = {
    "cutting metrics.jsonl": (
        POINTS["picture half written"],
        lambda: patched(append_file.AppendFile, "__init__", lambda file, *_, **__: True, before=nothing),
    ),
    "sweeping up after a kill": (
        POINTS["meta.json half written"],
        lambda: patched(shutil, "rmtree", lambda path, *_, **__: ".writing_" in str(path), before=half_removed),
    ),
    "while evaluating what was put off": (stop_signal, in_evaluation(1)),
    "while evaluating, twice": (in_evaluation(1), in_evaluation(2)),
}
NAMED = {**{name: (point,) for name, point in POINTS.items()}, **TWICE}


# The whole


def run(kills: int, seed: int, points: list[str], root: Path, say=print) -> dict:
    """Kill and compare; returns what was counted. Raises AssertionError at the first difference."""
    draw, caught_at = random.Random(seed), collections.Counter()
    assert ended(start(root / "whole"), 600)
    timed = time.monotonic()
    assert ended(start(root / "again", seed=1), 600)
    first = span = time.monotonic() - timed
    expected = content(root / "whole")
    assert_same(expected, root / "again")
    say(f"an uninterrupted run takes {span:.1f} s", flush=True)

    for name in points:
        folder = root / "point"
        for stop in NAMED[name]:
            assert not ended(start(folder, stop), 600), f"{name}: the run came to its end"
        assert ended(start(folder, seed=2), 600), name
        assert_same(expected, folder)
        say(f"{name}: continued, equal", flush=True)
        shutil.rmtree(folder)

    done, runs, starts = 0, 0, 0
    while done < kills:
        folder, before, end = root / f"run{runs}", 0, min(kills, done + KILLS_OF_A_RUN)
        finished = False
        while not finished:
            starts += 1
            finished = ended(start(folder, seed=starts), draw.uniform(0, 0.6 * span) if done < end else 600)
            if not finished:
                done += 1
                caught_at[interrupted_phase(folder)] += 1
                step = saved(folder)
                assert step >= before, f"{folder}: step {step} after {before}"
                before = step
            elif done < end:
                span *= 0.9  # the machine has become faster, or luck: moments are to lie within the run
        assert_same(expected, folder)
        runs += 1
        say(f"{done} kills, {runs} runs equal", flush=True)
        shutil.rmtree(folder)
    return {
        "random_kills": done,
        "caught": dict(caught_at),
        "runs_finished_equal": runs,
        "starts": starts,
        "points": points,
        "seconds_of_a_run": round(first, 2),
    }


def shared(kills: int, seed: int, points: list[str], jobs: int, root: Path) -> dict | None:
    """Split `run` over `jobs` processes; returns the summed counts, or None when one found a difference."""
    start_time, children = time.monotonic(), []
    for job in range(jobs):
        child = os.fork()
        if not child:
            place = root / str(job)
            place.mkdir()
            try:
                counted = run(kills // jobs + (job < kills % jobs), seed * jobs + job, points[job::jobs], place)
                (place / "counted.json").write_text(json.dumps(counted))
                os._exit(0)
            except AssertionError as difference:
                logs = [log.read_text()[-3000:] for log in place.glob("*.log") if "Traceback" in log.read_text()]
                print("DIFFERENT:", difference, *logs, sep="\n", flush=True)
            finally:
                os._exit(1)
        children.append(child)
    if any(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children):
        return None
    parts = [json.loads((root / str(job) / "counted.json").read_text()) for job in range(jobs)]
    return {
        **{key: sum(part[key] for part in parts) for key in ("random_kills", "runs_finished_equal", "starts")},
        "caught": dict(
            sum((collections.Counter(part["caught"]) for part in parts), collections.Counter()).most_common()
        ),
        "points": sum((part["points"] for part in parts), []),
        "seed": seed,
        "jobs": jobs,
        "steps_of_a_run": 12,
        "seconds_of_a_run": parts[0]["seconds_of_a_run"],
        "seconds": round(time.monotonic() - start_time, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="random kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--points",
        default="",
        metavar="WORD",
        help="the named points whose name holds this word (default: all; `none`: none)",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes that kill beside each other (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write what was counted there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purge
    with tempfile.TemporaryDirectory() as root:
        counted = shared(
            arguments.kills,
            arguments.seed,
            [name for name in NAMED if arguments.points in name],
            arguments.jobs,
            Path(root),
        )
    if counted is None:
        return 1
    if arguments.json:
        from maskwise.bench import record

        record.write(arguments.json, {"record": record.describe(seed=arguments.seed), **counted})
    print(json.dumps(counted, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
