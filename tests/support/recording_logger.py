"""Loggers that record their calls, or fail in one of them, for entries of LOGGERS."""

from maskwise.engine.loggers.base import Logger


class Recording(Logger):
    """Record each call with its arguments in `calls`."""

    calls: list[tuple] = []
    fails_in = ""

    def __init__(self, run):
        self._call("open", run.step)

    def _call(self, *call):
        if call[0] == self.fails_in:
            raise RuntimeError("no\nroute")
        self.calls.append(call)

    def scalars(self, values, step):
        self._call("scalars", step, *values.items())

    def picture(self, name, path, step):
        self._call("picture", step, name, path.read_bytes()[:4])

    def report(self, path, step):
        self._call("report", step, path.name)

    def flush(self):
        self._call("flush")

    def close(self, status):
        self._call("close", status)


class FailsToOpen(Recording):
    fails_in = "open"


class FailsInScalars(Recording):
    fails_in = "scalars"


class FailsInClose(Recording):
    fails_in = "close"


class Rewinding(Recording):
    rewinds = True
