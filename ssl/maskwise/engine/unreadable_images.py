"""Unreadable images of a run: counted over all ranks, listed, and an error above a ceiling."""

from __future__ import annotations

import contextlib

import torch

from maskwise.engine.run_log import BAD_IMAGES, RunLog
from maskwise.errors import UserError

TOLERATED = 10  # files, or a quarter of a smaller set: a few damaged files do not condemn a set


class UnreadableImages:
    """Check the unreadable images that the ranks' batch streams report.

    A stream has `.corrupt` (name -> reason), `.seen` (images requested), `.count` (size of the set) and `.ceiling`, a
    share of the different images requested so far; TOLERATED files are always accepted.
    """

    def __init__(self, run_log: RunLog, world):
        self.run_log, self.world = run_log, world

    def check(self, stream) -> None:
        """List new unreadable images on the main rank; call it on all ranks together.

        Raises the same UserError on all ranks above the ceiling.
        """
        own = dict(stream.corrupt)
        seen, listed = self.world.all_sum(torch.tensor([stream.seen, len(own)])).tolist()
        if not listed:
            return
        reasons = {name: reason for part in self.world.gather_objects(own) for name, reason in part.items()}
        self.run_log.unreadable(reasons)
        seen = min(max(seen, len(reasons)), stream.count)  # files tried in place of unreadable ones are not in `seen`
        if len(reasons) > max(1, min(TOLERATED, stream.count // 4), stream.ceiling * seen):
            name, reason = next(iter(sorted(reasons.items())))
            raise UserError(
                f"{len(reasons)} of the {seen} images seen so far could not be read, more than "
                f"data.corrupt_ceiling={stream.ceiling:g}; all are listed in {self.run_log.folder / BAD_IMAGES} "
                f"(the first: {name}: {reason}): raise data.corrupt_ceiling, or repair or remove "
                "them and continue with --accept-changed-data"
            )

    @contextlib.contextmanager
    def listed_on_error(self, stream):
        """List this rank's unreadable images if they end the run."""
        try:
            yield
        except UserError:
            self.run_log.unreadable(dict(stream.corrupt), any_rank=True)
            raise
