"""TensorBoard event files, written synchronously so that a full disk gives a clear error."""

import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from maskwise.engine.append_file import AppendFile


class TensorBoardFile:
    """Write one more event file in `folder`.

    purge: TensorBoard discards what earlier files hold of steps from here on. Raises OSError if it cannot be opened.
    """

    def __init__(self, folder, *, purge: int, print_line: Callable[[str], None] = lambda text: None):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stamps = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
        # TensorBoard reads files in the order of their names: if the clock was set back, a restart must still sort
        # last.
        stamp = max(int(time.time()), *(int(stamp) + 1 for stamp in stamps if stamp.isdigit()), 0)
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"
        self.file = AppendFile(folder / name, print_line=print_line)
        self.records = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")
        self._write(step=purge, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add a number at a step."""
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))

    def picture(self, name: str, png: bytes, step: int) -> None:
        """Add a PNG file's content at a step; skipped while the disk refuses smaller records."""
        if not self.file.unwritten:
            width, height = struct.unpack(">II", png[16:24])
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
            self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def flush(self) -> None:
        """Write and sync everything."""
        self.file.flush()

    def close(self) -> None:
        """Flush and close."""
        self.file.close()

    def _write(self, **content):
        self.records.write(Event(wall_time=time.time(), **content).SerializeToString())
