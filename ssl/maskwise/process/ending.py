"""The end of a process whose native threads may still need the interpreter."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

from maskwise.process.streams import write


def end_process(status: int) -> NoReturn:
    """End the process with an exit status, without the interpreter's finalization.

    Functions registered with `atexit` run and both streams are flushed. Threads of process groups may hold the
    last reference of a tensor and then need the interpreter's lock; one that asks for it during finalization ends the
    process with SIGABRT ("terminate called without an active exception"), whatever its status.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        write(stream, "")
    os._exit(status)
