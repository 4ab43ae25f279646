"""Unreadable images over a run and over its ranks: counted, listed, and too many of them."""

import sys
from pathlib import Path

import pair
import pytest
from engine.tiny_method import Stream, trainer

from maskwise.distributed.world import World
from maskwise.engine import loop
from maskwise.engine.bad_images import BadImages
from maskwise.engine.checkpoint import Checkpoints
from maskwise.engine.journal import Journal
from maskwise.functional.errors import UserError


class Told:
    """What a stream says of its images."""

    def __init__(self, bad, seen, count=10_000, ceiling=0.01):
        self.corrupt = {f"{k:04d}.jpg": "cut short" for k in range(bad)}
        self.seen, self.count, self.ceiling = seen, count, ceiling


@pytest.mark.parametrize("stream, stops", [
    (Told(0, 10), False), (Told(10, 10), False), (Told(11, 10), True),  # ten are always forgiven
    (Told(30, 3000), False), (Told(31, 3000), True), (Told(31, 3000, ceiling=0.5), False),
    (Told(100, 50_000), False), (Told(101, 50_000), True),  # in later epochs no new images are seen
    (Told(4, 60, count=16), False), (Told(5, 60, count=16), True), (Told(1, 9, count=3), False), (Told(2, 9, count=3), True),
    (Told(11, 20, ceiling=0.0), True), (Told(11, 20, ceiling=1.0), False),
])
def test_the_ceiling(tmp_path, stream, stops):
    bad = BadImages(Journal(tmp_path, 9, quiet=True), World())
    if not stops:
        bad.check(stream)
    else:
        with pytest.raises(UserError) as caught:
            bad.check(stream)
        assert "0000.jpg: cut short" in str(caught.value) and "data.corrupt_ceiling" in str(caught.value) and "\n" not in str(caught.value)
        assert str(tmp_path / "bad_images.txt") in str(caught.value)
    if stream.corrupt:
        assert (tmp_path / "bad_images.txt").read_text() == "".join(f"{name}\tcut short\n" for name in stream.corrupt)
    else:
        assert not (tmp_path / "bad_images.txt").exists()


def run(folder, on_batch=None, world=World()):
    stream = Stream(0, 12)
    if on_batch:
        stream.on_batch = lambda step: on_batch(stream, step)
    journal = Journal(folder, 12, quiet=True, tensorboard=False, main=world.is_main)
    it = trainer(12, world=world)
    crops = lambda batch: (batch.global_crops, batch.local_crops)  # noqa: E731
    loop.fit(it, lambda start: stream, crops, journal, Checkpoints(folder, world=world), {}, log_every=2, save_every=5)
    return it


def test_a_run_stops_at_the_next_line_and_can_go_on_when_the_data_is_repaired(tmp_path):
    def breaks(stream, step):
        if step == 6:
            stream.corrupt = Told(11, 0).corrupt

    with pytest.raises(UserError, match="11 of the 64 images seen so far"):
        run(tmp_path, breaks)
    assert len((tmp_path / "bad_images.txt").read_text().splitlines()) == 11
    assert run(tmp_path).step_index == 12


def test_what_ends_a_stream_is_listed_first(tmp_path):
    def breaks(stream, step):
        stream.corrupt = {"a.jpg": "gone"}
        raise UserError("100 images in a row could not be read")

    with pytest.raises(UserError, match="in a row"):
        run(tmp_path, breaks)
    assert (tmp_path / "bad_images.txt").read_text() == "a.jpg\tgone\n"


def test_two_ranks_count_together_and_stop_together(tmp_path):
    said = [out.strip() for out, _ in pair.end(pair.start(__file__, tmp_path))]
    assert said[0] == said[1] and said[0].startswith("12 of the ")  # six on each: neither alone would have stopped
    listed = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert listed == [f"{rank}/{k}.jpg\tcut short" for rank in range(2) for k in range(6)]


def rank_of_two(folder):
    world = World.start("cpu")

    def breaks(stream, step):
        stream.corrupt = {f"{world.rank}/{k}.jpg": "cut short" for k in range(6 if step >= 4 else 0)}

    try:
        run(folder, breaks, world)
    except UserError as error:
        print(error)
    world.close()


if __name__ == "__main__":
    rank_of_two(Path(sys.argv[1]))
