"""Signals that ask a run to stop."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

CTRL_C = "SIGINT"
ASKING = ("SIGTERM", "SIGUSR1", "SIGHUP")  # SIGHUP: the terminal is gone, as when an ssh connection drops
ENDING = ("SIGTERM", "SIGHUP")


class Stopped(KeyboardInterrupt):
    """Signal that ends a command; `number` is that of the signal."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class StopSignals:
    """Record SIGTERM, SIGUSR1, SIGHUP and the first Ctrl-C in `.asked` while entered; a second Ctrl-C interrupts.

    With `ctrl_c=False` Ctrl-C is not handled. A process that ignores SIGHUP (nohup) continues to ignore it. A nested
    instance starts with the state of the outer one.
    """

    def __init__(self, *, ctrl_c: bool = True):
        self.asked, self.owner, self.former = False, os.getpid(), {}
        self.names = (*ASKING, CTRL_C) if ctrl_c else ASKING

    def __enter__(self) -> "StopSignals":
        for number in _handled(self.names):
            self.former[number] = before = signal.signal(number, self._ask)
            outer = getattr(before, "__self__", None)
            self.asked |= isinstance(outer, StopSignals) and outer.asked
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        # Data workers inherit the handler; only the training process acts on it.
        if os.getpid() != self.owner:
            return
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # A signal to the whole job also ends the data workers; their end must not fail the step that is to be saved.
        self.former.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))


@contextlib.contextmanager
def stop_at_once() -> Iterator[None]:
    """Raise Stopped at SIGTERM and SIGHUP in the block, so that temporary files are removed as after Ctrl-C."""
    owner = os.getpid()

    def stop(number, frame):
        if os.getpid() != owner:  # a worker process ends as it would without the handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise Stopped(number)

    former = {number: signal.signal(number, stop) for number in _handled(ENDING)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _handled(names: tuple[str, ...]) -> list[int]:
    """Return the signals to handle: those of this system, and only in the main thread, where Python handles them."""
    if threading.current_thread() is not threading.main_thread():
        return []
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    ignores_hangup = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in numbers if not (ignores_hangup and number == signal.SIGHUP)]
