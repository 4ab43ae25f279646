"""`EventFile`: what TensorBoard shows of a run, written without a thread, so that a full disk ends in a word and not in a trace."""

import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from maskwise.engine.appending import Appending


class EventFile:
    """One more event file in `folder`; TensorBoard forgets what earlier files say of steps from `purge` on.

    Raises OSError when it cannot be opened.
    """

    def __init__(self, folder, *, purge: int, say: Callable[[str], None] = lambda text: None):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stamps = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
        # TensorBoard reads files in the order of their names: a clock that was set back must not put a restart before its past.
        stamp = max(int(time.time()), *(int(stamp) + 1 for stamp in stamps if stamp.isdigit()), 0)
        self.file = Appending(folder / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0", say=say)
        self.records = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")
        self._write(step=purge, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """A number at a step."""
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))

    def picture(self, name: str, png: bytes, step: int) -> None:
        """A PNG file's content at a step; left out while the disk refuses what is smaller."""
        if not self.file.owed:
            width, height = struct.unpack(">II", png[16:24])
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
            self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def flush(self) -> None:
        """Bring everything to the disk."""
        self.file.flush()

    def close(self) -> None:
        """Flush and close."""
        self.file.close()

    def _write(self, **content):
        self.records.write(Event(wall_time=time.time(), **content).SerializeToString())
