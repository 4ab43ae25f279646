"""`Interrupts`: signals that ask a run to stop."""

import os
import signal
import threading


class Interrupts:
    """While entered, SIGTERM, SIGUSR1 and the first Ctrl-C only raise `.asked`; the second Ctrl-C interrupts at once.

    With `ctrl_c=False` Ctrl-C is left alone. One entered inside another knows what the outer one was asked before.
    """

    def __init__(self, *, ctrl_c: bool = True):
        self.asked, self.owner, self.former = False, os.getpid(), {}
        self.names = ("SIGTERM", "SIGUSR1", "SIGINT") if ctrl_c else ("SIGTERM", "SIGUSR1")

    def __enter__(self) -> "Interrupts":
        listens = threading.current_thread() is threading.main_thread()  # Python lets no other thread handle signals
        for name in self.names:
            if listens and hasattr(signal, name):
                number = getattr(signal, name)
                self.former[number] = before = signal.signal(number, self._ask)
                outer = getattr(before, "__self__", None)
                self.asked |= isinstance(outer, Interrupts) and outer.asked
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        # Data workers inherit the handler: the process that trains decides for them.
        if os.getpid() != self.owner:
            return
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # A signal to the whole job also ends the data workers; their death must not break the step that is to be saved.
        self.former.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))
