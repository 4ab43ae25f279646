"""TensorBoard event files, written synchronously so that a full disk gives a clear error."""

import os
import socket
import struct
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from maskwise.engine.append_file import AppendFile
from maskwise.engine.loggers.base import LoggedRun, Logger


class TensorBoardLogger(Logger):
    """Write one more event file in `tensorboard/` of the run folder.

    TensorBoard discards what earlier files hold of later steps. Raises OSError if the file cannot be opened.
    """

    rewinds = True

    def __init__(self, run: LoggedRun):
        folder = run.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        stamps = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
        # TensorBoard reads files in the order of their names: if the clock was set back, a restart must still sort
        # last.
        stamp = max(int(time.time()), *(int(stamp) + 1 for stamp in stamps if stamp.isdigit()), 0)
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"
        self.file = AppendFile(folder / name, print_line=run.print_line)
        self.records = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")
        self._write(step=run.step + 1 if run.step else 0, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add numbers at a step."""
        for name, value in values.items():
            self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))

    def picture(self, name: str, path: Path, step: int) -> None:
        """Add a PNG file's content at a step; skipped while the disk refuses smaller records."""
        if not self.file.unwritten:
            png = path.read_bytes()
            width, height = struct.unpack(">II", png[16:24])
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
            self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def flush(self) -> None:
        """Write and sync everything."""
        self.file.flush()

    def close(self, status: str) -> None:
        """Flush and close."""
        self.file.close()

    def _write(self, **content):
        self.records.write(Event(wall_time=time.time(), **content).SerializeToString())
