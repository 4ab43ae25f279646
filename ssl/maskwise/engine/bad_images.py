"""The images of a run that could not be read: counted over all ranks, listed, and the end of the run where they are too many."""

from __future__ import annotations

import contextlib

import torch

from maskwise.engine.journal import Journal
from maskwise.functional.errors import UserError

FORGIVEN = 10  # files, or a quarter of a smaller set: a few torn ones say nothing of the rest
LIST = "bad_images.txt"


class BadImages:
    """What the ranks' streams say of unreadable images: `.corrupt` (name -> reason), `.seen` (images asked for), `.count` (of the set), `.ceiling`.

    The ceiling is a share of the different images asked for so far; `FORGIVEN` files are always let pass.
    """

    def __init__(self, journal: Journal, world):
        self.journal, self.world = journal, world

    def check(self, stream) -> None:
        """List what is new, on the main rank; raises the same UserError on all ranks above the ceiling. All ranks call it together."""
        mine = dict(stream.corrupt)
        asked, listed = self.world.all_sum(torch.tensor([stream.seen, len(mine)])).tolist()
        if not listed:
            return
        found = {name: reason for part in self.world.gather_objects(mine) for name, reason in part.items()}
        self.journal.unreadable(found)
        asked = min(asked, stream.count)
        if len(found) > max(1, min(FORGIVEN, stream.count // 4), stream.ceiling * asked):
            name, reason = next(iter(sorted(found.items())))
            raise UserError(
                f"{len(found)} of the {asked} images seen so far could not be read, more than data.corrupt_ceiling={stream.ceiling:g}; all are listed in "
                f"{self.journal.folder / LIST} (the first: {name}: {reason}): repair or remove them, or raise the ceiling"
            )

    @contextlib.contextmanager
    def listed_on_the_way_out(self, stream):
        """A rank whose images end the run writes down what it knows before it goes."""
        try:
            yield
        except UserError:
            self.journal.unreadable(dict(stream.corrupt), alone=True)
            raise
