"""Unreadable images over a run and its ranks: counted, listed, and an error above the ceiling."""

import sys
from pathlib import Path

import pytest

from maskwise.distributed.world import World
from maskwise.engine import loop
from maskwise.engine.checkpoint import Checkpoints
from maskwise.engine.run_log import RunLog
from maskwise.engine.unreadable_images import UnreadableImages
from maskwise.errors import UserError
from support import pair
from support.tiny_method import Stream, make_trainer


class StreamStub:
    """Counts of a stream's images, read and unreadable."""

    def __init__(self, bad, seen, count=10_000, ceiling=0.01):
        self.corrupt = {f"{k:04d}.jpg": "cut short" for k in range(bad)}
        self.seen, self.count, self.ceiling = seen, count, ceiling


@pytest.mark.parametrize(
    "stream, stops",
    [
        (StreamStub(0, 10), False),
        (StreamStub(10, 10), False),
        (StreamStub(11, 10), True),  # ten are always accepted
        (StreamStub(30, 3000), False),
        (StreamStub(31, 3000), True),
        (StreamStub(31, 3000, ceiling=0.5), False),
        (StreamStub(100, 50_000), False),
        (StreamStub(101, 50_000), True),  # in later epochs no new images are seen
        (StreamStub(4, 60, count=16), False),
        (StreamStub(5, 60, count=16), True),
        (StreamStub(1, 9, count=3), False),
        (StreamStub(2, 9, count=3), True),
        (StreamStub(11, 20, ceiling=0.0), True),
        (StreamStub(11, 20, ceiling=1.0), False),
    ],
)
def test_ceiling_of_unreadable_images(tmp_path, stream, stops):
    bad = UnreadableImages(RunLog(tmp_path, 9, quiet=True), World())
    if not stops:
        bad.check(stream)
    else:
        with pytest.raises(UserError) as caught:
            bad.check(stream)
        assert (
            "0000.jpg: cut short" in str(caught.value)
            and "data.corrupt_ceiling" in str(caught.value)
            and "\n" not in str(caught.value)
        )
        assert str(tmp_path / "bad_images.txt") in str(caught.value)
    if stream.corrupt:
        assert (tmp_path / "bad_images.txt").read_text() == "".join(f"{name}\tcut short\n" for name in stream.corrupt)
    else:
        assert not (tmp_path / "bad_images.txt").exists()


def run(folder, on_batch=None, world=World()):
    stream = Stream(0, 12)
    if on_batch:
        stream.on_batch = lambda step: on_batch(stream, step)
    run_log = RunLog(folder, 12, quiet=True, loggers=(), main=world.is_main)
    trainer = make_trainer(12, world=world)
    crops = lambda batch: (batch.global_crops, batch.local_crops)  # noqa: E731
    loop.fit(
        trainer,
        lambda start: stream,
        crops,
        run_log,
        Checkpoints(folder, world=world),
        {},
        loop.Intervals(log=2, save=5),
    )
    return trainer


def test_run_stops_at_the_next_log_line_and_resumes_with_repaired_data(tmp_path):
    def breaks(stream, step):
        if step == 6:
            stream.corrupt = StreamStub(11, 0).corrupt

    with pytest.raises(UserError, match="11 of the 64 images seen so far"):
        run(tmp_path, breaks)
    assert len((tmp_path / "bad_images.txt").read_text().splitlines()) == 11
    assert run(tmp_path).step_index == 12


def test_images_that_end_a_stream_are_listed_first(tmp_path):
    def breaks(stream, step):
        stream.corrupt = {"a.jpg": "gone"}
        raise UserError("100 images in a row could not be read")

    with pytest.raises(UserError, match="in a row"):
        run(tmp_path, breaks)
    assert (tmp_path / "bad_images.txt").read_text() == "a.jpg\tgone\n"


def test_two_ranks_count_together_and_stop_together(tmp_path):
    messages = [out.strip() for out, _ in pair.end(pair.start(__file__, tmp_path))]
    assert messages[0] == messages[1] and messages[0].startswith(
        "12 of the "
    )  # six on each: below the ceiling of one rank
    listed = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert listed == [f"{rank}/{k}.jpg\tcut short" for rank in range(2) for k in range(6)]


def run_rank(folder):
    world = World.start("cpu")

    def breaks(stream, step):
        stream.corrupt = {f"{world.rank}/{k}.jpg": "cut short" for k in range(6 if step >= 4 else 0)}

    try:
        run(folder, breaks, world)
    except UserError as error:
        print(error)
    world.close()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
