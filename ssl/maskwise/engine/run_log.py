"""The log of a run folder: metrics.jsonl, loggers, pictures and the progress line."""

import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from maskwise.engine.append_file import AppendFile
from maskwise.engine.atomic_file import atomic_path, write_atomic, write_error
from maskwise.engine.loggers import Loggers
from maskwise.engine.loggers.base import COMPLETE, LoggedRun
from maskwise.engine.metrics_file import logged_after, read_records
from maskwise.engine.run_end import FAILED, PREEMPTED
from maskwise.engine.run_lock import RunLock
from maskwise.errors import UserError, printable
from maskwise.imaging.drawing import write_png
from maskwise.process import streams
from maskwise.process.progress import clock

PLAIN_SECONDS, BAR_SECONDS = 10.0, 0.2
BAD_BATCHES, BAD_IMAGES = "bad_batches.jsonl", "bad_images.txt"


def prepare_folder(path) -> Path:
    """Create the run folder; raises UserError if nothing can be written there, or its checkpoints could not be read."""
    path = Path(path)
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:  # safetensors would write checkpoints there and refuse to open them again
        raise UserError(
            f"the name of the output folder {path} is not UTF-8, which checkpoints require: choose another with --out"
        ) from None
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # without a name where the system supports it: a kill leaves nothing
            pass
    except OSError as error:
        raise UserError(
            f"cannot write into the output folder {path} ({error.strerror}): choose another with --out"
        ) from None
    return path


class RunLog:
    """Write metrics, reports and pictures to a run folder and show progress on standard error.

    `quiet` shows nothing; a terminal gets a progress bar, anything else a plain line now and then. With `main` False
    (ranks other than 0) it keeps time but writes and shows nothing. loggers: names of LOGGERS. `about` describes this
    start for run.json. lock: that of the folder; no report or picture is written after the folder was replaced.
    A disk that refuses a write never stops the run: the data is buffered, reported once, and written when possible.
    """

    def __init__(
        self,
        folder,
        total_steps: int,
        quiet: bool = False,
        *,
        main: bool = True,
        loggers: Sequence[str] = ("tensorboard",),
        about: dict | None = None,
        lock: RunLock | None = None,
    ):
        self.folder, self.total_steps, self.main, self.about = Path(folder), total_steps, main, about
        self.step = 0
        self.lock = lock
        self.quiet, self.logger_names = quiet or not main, loggers
        self.terminal = not self.quiet and streams.is_terminal(sys.stderr)
        self.metrics = self.bad = None
        self.loggers = Loggers((), LoggedRun(self.folder))
        self.status = FAILED  # until the last step, or a signal
        self.pending: dict[Path, Callable[[Path], None]] = {}
        self.listed: dict[str, str] = {}  # unreadable images, name -> reason
        self.loss, self.shown_at, self.bar = float("nan"), -1e9, ""
        self.seconds_before = 0.0
        self.alarmed = False
        self.start_clock()

    def open(self, step: int, seconds: float = 0.0) -> list[dict]:
        """Open the files after `step` steps and `seconds` of training; returns the records kept, on every rank.

        Records of later steps are cut off. Raises UserError if the disk refuses.
        """
        path = self.folder / "metrics.jsonl"
        self.seconds_before, self.step = seconds, step
        self.start_clock()
        try:
            records, length = read_records(path, step)
            if not self.main:
                return records
            if self.about is not None:
                self._list_start(step)
            logged = logged_after(self.folder, step)
            self._open_files(path, length, step, logged)
            self.start_clock()  # loggers may take seconds to open
        except OSError as error:
            raise UserError(
                f"{write_error(error.filename or path, error)}, then start the same command again"
            ) from None
        return records

    def _open_files(self, path, length, step, logged):
        self.metrics = AppendFile(path, keep=length, print_line=self.print_line)
        if (bad := self.folder / BAD_BATCHES).exists():
            self.bad = AppendFile(bad, keep=read_records(bad, step)[1], print_line=self.print_line)
        for ended in (PREEMPTED, FAILED):
            (self.folder / ended).unlink(missing_ok=True)
        for unfinished in (*self.folder.glob("reports/.*_step_*"), *self.folder.glob("pictures/.*_step_*")):
            unfinished.unlink()  # written by a start that was killed
        self.loggers = Loggers(self.logger_names, LoggedRun(self.folder, step, self.print_line), logged)

    def start_clock(self) -> None:
        """Restart the counts of images and waiting time, so that evaluation and saving are not counted as training."""
        self.since, self.waited, self.images = time.perf_counter(), 0.0, 0

    def stop_clock(self) -> None:
        """Add the time since `start_clock` to the training time."""
        self.seconds_before += time.perf_counter() - self.since
        self.start_clock()

    @property
    def seconds(self) -> float:
        """Training time of this run in seconds, earlier starts included."""
        return self.seconds_before + time.perf_counter() - self.since

    @contextlib.contextmanager
    def waiting(self):
        """Count the time of the block as waiting for data."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    def count(self, step: int, images: int) -> None:
        """Count one more step on `images` images of all ranks; moves the progress bar."""
        self.step = step
        self.images += images
        if self.lock:
            self.lock.beat()
        if self.terminal and time.perf_counter() - self.shown_at > BAR_SECONDS:
            self._show()

    def log_step(self, step: int, values: dict) -> dict:
        """Write one logged step and return its record, with img_s, data_wait (share of the time) and seconds."""
        spent = max(time.perf_counter() - self.since, 1e-9)
        record = {
            "step": step,
            **values,
            "img_s": round(self.images / spent, 2),
            "data_wait": round(self.waited / spent, 4),
            "seconds": round(self.seconds, 2),
        }
        self._write(record)
        self.loss = values.get("loss", self.loss)
        self.loggers.scalars({f"train/{key}": value for key, value in record.items() if key != "step"}, step)
        due = step >= self.total_steps or time.perf_counter() - self.shown_at > PLAIN_SECONDS
        if self.terminal or (not self.quiet and due):
            self._show()
        self.stop_clock()
        return record

    def report(self, step: int, name: str, report) -> None:
        """Save an evaluation's report in reports/ and write its numbers."""
        if not self.main:
            return
        path = self.folder / "reports" / f"{name}_step_{step:08d}.json"
        self._file(path, report.save)
        scalars = {key: value for key, value in report.numbers.items() if isinstance(value, (int, float))}
        self.loggers.scalars({f"{name}/{key}": value for key, value in scalars.items()}, step, name)
        if path not in self.pending:
            self.loggers.report(path, step, name)
        # The record comes last: after a kill, an evaluation without a record is repeated.
        self._write({"step": step, "report": name, "numbers": report.numbers})
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in scalars.items())
        self.print_line(f"{name} at step {step}: {numbers}")

    def keep(self, name: str, report) -> None:
        """Save a report that holds for the whole run as reports/NAME.json."""
        if self.main:
            path = self.folder / "reports" / f"{name}.json"
            self._file(path, report.save)
            if path not in self.pending:
                self.loggers.report(path, self.step, name)

    def alarm(self, step: int, kind: str, text: str) -> None:
        """Write and print one alarm."""
        self._write({"step": step, "alarm": text, "kind": kind})
        self.print_line(f"alarm: {text}")
        if not self.alarmed:
            self.print_line("to change the recipe, start a new run with another --out")
        self.alarmed = True

    def bad_batches(self, batches: list[dict]) -> None:
        """Add skipped steps, with their causes and sample ids, to bad_batches.jsonl."""
        if batches and self.metrics:
            self.bad = self.bad or AppendFile(self.folder / BAD_BATCHES, print_line=self.print_line)
            for batch in batches:
                self.bad.write((json.dumps(batch) + "\n").encode())

    def pictures(self, step: int, pictures: dict) -> None:
        """Save uint8 pictures [H, W, 3] by name under pictures/ and in the loggers."""
        for name, picture in pictures.items():
            path = self.folder / "pictures" / f"{name}_step_{step:08d}.png"
            self._file(path, partial(save_picture, picture=picture))
            if path not in self.pending:
                self.loggers.picture(name, path, step)

    def unreadable(self, images: dict[str, str], any_rank: bool = False) -> None:
        """List replaced images (name -> reason) in bad_images.txt, each once, and print how many where some are new.

        any_rank: also on ranks other than the main one.
        """
        if not (images and (self.main or any_rank)):
            return
        path = self.folder / BAD_IMAGES
        listed = {**self.listed, **read_unreadable(path)}
        self.listed = {**{printable(name): printable(reason) for name, reason in images.items()}, **listed}
        if len(self.listed) > len(listed):
            text = "".join(f"{name}\t{reason}\n" for name, reason in sorted(self.listed.items()))
            self._file(path, partial(write_atomic, text=text))
            self.print_line(f"{len(self.listed)} unreadable images were replaced by others: see {path}")

    def preempted(self, step: int) -> None:
        """Write the file `preempted` and print how to continue."""
        self.status = PREEMPTED
        if self.main:
            self._file(self.folder / PREEMPTED, partial(write_atomic, text=f"{step}\n"))
        saved = f"saved after step {step} of {self.total_steps}" if step else "no step was done yet"
        self.print_line(f"interrupted: {saved}; the same command continues")

    def print_line(self, text: str) -> None:
        """Print one line on standard error, above the progress bar."""
        if not self.quiet:
            self._erase()
            streams.print_error(text)

    def flush(self) -> None:
        """Sync everything written so far, and retry what the disk refused before."""
        self._write_pending()
        for file in (self.metrics, self.bad, self.loggers):
            if file:
                file.flush()

    def close(self) -> None:
        """Flush, close the files and end the progress line; prints what could not be written."""
        if self.bar:
            streams.print_error("")
            self.bar = ""
        self._write_pending()
        if self.pending:
            self.print_line(f"could not be written: {', '.join(str(path) for path in self.pending)}")
        for file in (self.metrics, self.bad):
            if file:
                file.close()
        self.loggers.close(COMPLETE if self.step >= self.total_steps else self.status)
        self.metrics = self.bad = None

    def _write(self, record):
        if self.metrics:
            finite = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in record.items()
            }  # JSON has no NaN
            self.metrics.write((json.dumps(finite) + "\n").encode())

    def _file(self, path, write):
        """Write a file with `write(path)`, now or, if the disk refuses, at the next flush."""
        self.pending[path] = write
        self._write_pending(path)

    def _write_pending(self, new=None):
        for path, write in list(self.pending.items()):
            try:
                if self.lock:
                    self.lock.check()
                path.parent.mkdir(exist_ok=True)
                write(path)
                del self.pending[path]
            except (OSError, UserError) as error:
                if path == new:
                    text = write_error(path, error) if isinstance(error, OSError) else str(error)
                    self.print_line(f"{text}; tried again later, the run continues")

    def _list_start(self, step):
        path = self.folder / "run.json"
        run = {}
        with contextlib.suppress(OSError, ValueError):
            run = json.loads(path.read_text(encoding="utf-8"))
        run["starts"] = [*run.get("starts", []), {"step": step, **self.about}]
        write_atomic(path, json.dumps(run, indent=2))

    def _show(self):
        self.shown_at = time.perf_counter()
        spent = max(self.shown_at - self.since, 1e-9)
        left = self.seconds / max(self.step, 1) * (self.total_steps - self.step)
        rate = self.images / spent
        text = (
            f"step {self.step}/{self.total_steps}  loss {self.loss:.4g}  {rate:.{0 if rate >= 10 else 2}f} img/s  "
            f"data {100 * self.waited / spent:.0f}%  eta {clock(left)}"
        )
        if self.terminal:
            self._erase()
            self.bar = text[: streams.columns(sys.stderr) - 1]  # a longer one would wrap and could not be erased
            streams.print_error(self.bar, end="")
        else:
            streams.print_error(text)

    def _erase(self):
        if self.bar:
            streams.print_error("\r" + " " * len(self.bar) + "\r", end="")
            self.bar = ""


def read_unreadable(path) -> dict[str, str]:
    """Read the unreadable images that a run has listed (name -> reason); {} without a list."""
    try:
        lines = Path(path).read_bytes().decode("utf-8", "replace").split("\n")
    except FileNotFoundError:
        return {}
    return {name: reason for name, _, reason in (line.partition("\t") for line in lines) if name}


def save_picture(path: Path, picture) -> None:
    """Save a uint8 picture [H, W, 3] as a PNG file, atomically."""
    with atomic_path(path) as temporary:
        write_png(temporary, picture)


def read_metrics(path) -> list[dict]:
    """Read the complete records of a metrics.jsonl, up to a line truncated by a kill."""
    return read_records(path)[0]
