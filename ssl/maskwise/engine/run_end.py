"""Files of a run folder that tell how a run ended before its last step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from maskwise.engine.atomic_file import write_atomic
from maskwise.errors import UserError, printable

PREEMPTED, FAILED = "preempted", "failed"  # they hold the step, and the error in one line


@contextlib.contextmanager
def failure_recorded(run_log) -> Iterator[None]:
    """Write an error that ends the block to the file `failed` of the run folder; the next start removes it."""
    try:
        yield
    except BaseException as error:  # Ctrl-C included
        text = "stopped by a signal" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        with contextlib.suppress(OSError, UserError):
            if run_log.main and (run_log.lock is None or run_log.lock.is_ours()):
                write_atomic(run_log.folder / FAILED, printable(text) + "\n")
        raise
