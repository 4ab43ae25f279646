"""The loop: duties, interruption, exact continuation."""

import dataclasses
import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy
import pair
import pytest
import torch
from engine.tiny_method import Stream, trainer

from maskwise.distributed.world import World
from maskwise.engine import loop
from maskwise.engine.checkpoint import Checkpoints
from maskwise.engine.journal import Journal, read_metrics
from maskwise.functional.errors import UserError

TIMING = {"img_s", "data_wait", "seconds"}


@dataclasses.dataclass
class Report:
    numbers: dict

    def save(self, path):
        path.write_text(json.dumps(self.numbers))


def knn(method):
    torch.randn(3)
    return Report({"top1": float(method.center.sum()), "draw": float(torch.rand(()))})


def run(folder, *, total=12, on_batch=lambda step: None, stream=None, tensorboard=False, save_every=5, world_trainer=None, evaluations=None, **options):
    it = world_trainer or trainer(total)
    journal = Journal(folder, total, quiet=True, tensorboard=tensorboard)
    result = loop.fit(
        it, stream or (lambda start: Stream(start, total, on_batch)), lambda batch: (batch.global_crops, batch.local_crops), journal,
        Checkpoints(folder, encoder_spec={"name": "tiny"}), {"knn": knn} if evaluations is None else evaluations,
        log_every=2, save_every=save_every, evaluate_every=4, **options,
    )
    return result, it


def lines(folder):
    return [{key: value for key, value in line.items() if key not in TIMING} for line in read_metrics(folder / "metrics.jsonl")]


def same(one, two):
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(one.tensors(), two.tensors()))


def interrupt(at, number):
    return lambda step: os.kill(os.getpid(), number) if step == at else None


def test_a_run_leaves_what_it_owes(tmp_path):
    result, it = run(tmp_path, pictures=lambda method, batch: {"sheet": numpy.zeros((2, 2, 3), numpy.uint8)}, pictures_every=8, tensorboard=True)
    assert result == {"status": "complete", "step": 12, "skipped": 0}
    logged = lines(tmp_path)
    assert [line["step"] for line in logged if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in logged if "report" in line] == [4, 8, 12]
    assert {"epoch", "cls", "lr", "wd", "momentum", "skipped", "grad_norm"} <= logged[0].keys()
    assert logged[0]["lr"] == it.lr(1) and logged[0]["epoch"] == 0
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["last", "step_00000010", "step_00000012"]
    assert sorted(os.listdir(tmp_path / "pictures")) == ["sheet_step_00000008.png", "sheet_step_00000012.png"]
    assert len(os.listdir(tmp_path / "reports")) == 3


def test_a_finished_run_answers_complete_without_work(tmp_path):
    run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(tmp_path, stream=lambda start: pytest.fail("work"))[0]["status"] == "complete"
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("at", [0, 3, 6])
def test_interrupted_and_continued_equals_uninterrupted(tmp_path, number, at):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    _, one = run(whole)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGCHLD)
    result, _ = run(broken, on_batch=interrupt(at, number))
    assert result == {"status": "preempted", "step": at + 1, "skipped": 0} and (broken / "preempted").exists()
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGCHLD))
    result, two = run(broken)
    assert result["status"] == "complete" and not (broken / "preempted").exists()
    assert same(one, two) and lines(whole) == lines(broken)


def test_a_crash_after_the_checkpoint_continues_exactly(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    _, one = run(whole)

    def crash(step):
        if step == 8:
            raise UserError("corrupt data")

    with pytest.raises(UserError, match="corrupt data"):
        run(broken, on_batch=crash)
    assert lines(broken)[-1]["step"] == 8
    _, two = run(broken)
    assert same(one, two) and lines(whole) == lines(broken)


def test_an_interruption_in_the_last_step_still_completes(tmp_path):
    result, _ = run(tmp_path, on_batch=interrupt(11, signal.SIGTERM))
    assert result["status"] == "complete" and lines(tmp_path)[-1]["report"] == "knn" and not (tmp_path / "preempted").exists()


def test_the_second_ctrl_c_interrupts_at_once(tmp_path):
    def twice(step):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_batch=twice)


def test_evaluations_move_no_random_state(tmp_path):
    torch.manual_seed(1)
    it = trainer(4)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    run(tmp_path, total=4, world_trainer=it)
    assert torch.equal(torch.rand(1), expected)


def test_a_damaged_checkpoint_goes_back_one_and_arrives_at_the_same(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    _, one = run(whole)
    run(broken, on_batch=interrupt(7, signal.SIGTERM))
    (broken / "checkpoints" / "step_00000008" / "model.safetensors").write_bytes(b"x")
    _, two = run(broken)
    assert same(one, two) and lines(whole) == lines(broken)


def test_nothing_finite_any_more_stops_the_run_in_one_line(tmp_path):
    it = trainer(12)
    before = {key: value.clone() for key, value in it.method.state_dict().items()}
    it.method.student.encoder.trunk.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UserError, match="the last 4 steps had a non-finite loss or gradient") as caught:
        run(tmp_path, world_trainer=it, max_bad_steps=4)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in it.method.state_dict().items())
    assert [(line["kind"], line["alarm"][:7]) for line in lines(tmp_path) if "alarm" in line] == [("skipped", "2 of 2 "), ("skipped", "4 of 4 ")]
    bad = read_metrics(tmp_path / "bad_batches.jsonl")
    assert [(each["step"], each["causes"]) for each in bad] == [(step, ["gradient"]) for step in (1, 2, 3, 4)]
    assert [each["sample_ids"] for each in bad] == [[list(range(step, step + 8))] for step in range(4)]
    assert str(tmp_path / "bad_batches.jsonl") in str(caught.value)


def test_bad_steps_are_listed_once_though_the_run_is_broken_off(tmp_path):
    """Steps 4, 6 and 8 are bad; the run is told to stop in step 7, or breaks off in step 9 after its checkpoint at 5."""
    expected = None
    for way in ("whole", "stopped", "broken"):
        folder = tmp_path / way
        folder.mkdir()
        for start in range(1 if way == "whole" else 2):
            it, step_of = trainer(12), {}
            poison = lambda crops: crops * (float("nan") if it.step_index in (4, 6, 8) else 1.0)  # noqa: E731
            it._floats, step_of["floats"] = (lambda crops, floats=it._floats: poison(floats(crops))), it._floats

            def trouble(step):
                if start == 0 and way == "stopped" and step == 7:
                    signal.raise_signal(signal.SIGTERM)
                if start == 0 and way == "broken" and step == 9:
                    raise UserError("broken off")

            try:
                run(folder, world_trainer=it, on_batch=trouble)
            except UserError:
                assert way == "broken" and start == 0
        listed = (folder / "bad_batches.jsonl").read_text()
        expected = expected or listed
        assert [json.loads(line)["step"] for line in listed.splitlines()] == [5, 7, 9] and listed == expected, way
        assert json.loads(listed.splitlines()[0])["causes"] == ["loss", "gradient"]


def test_a_logged_line_is_json_though_its_loss_is_no_number(tmp_path):
    it = trainer(4)
    it._floats = lambda crops: crops * float("nan")
    run(tmp_path, total=4, world_trainer=it)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [line["loss"] for line in lines(tmp_path) if "loss" in line] == [None, None]


def test_one_rank_is_told_and_all_stop_at_the_same_step(tmp_path):
    for expected in ("preempted 4", "complete 12"):
        assert [out.strip() for out, _ in pair.end(pair.start(__file__, tmp_path))] == [expected] * 2
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [2, 4, 6, 8, 10, 12]


def test_a_thread_that_may_not_listen_to_signals_trains_all_the_same(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path, total=2)[0]["status"]))
    thread.start(), thread.join()
    assert results == ["complete"]


def test_replaced_images_are_listed(tmp_path):
    stream = Stream(0, 4)
    stream.corrupt["bad.jpg"] = "truncated"
    run(tmp_path, total=4, stream=lambda start: stream)
    assert (tmp_path / "bad_images.txt").read_text() == "bad.jpg\ttruncated\n"


def rank_of_two(folder):
    world = World.start("cpu")
    first = not (folder / "checkpoints").exists()
    world.barrier()
    told = interrupt(3, signal.SIGTERM) if first and world.rank == 1 else lambda step: None
    it = trainer(12, world=world)
    journal = Journal(folder, 12, quiet=True, tensorboard=False, main=world.is_main)
    result = loop.fit(
        it, lambda start: Stream(start, 12, told), lambda batch: (batch.global_crops, batch.local_crops), journal,
        Checkpoints(folder, world=world), {}, log_every=2, save_every=5,
    )
    print(result["status"], result["step"])
    world.close()


if __name__ == "__main__":
    rank_of_two(Path(sys.argv[1]))
