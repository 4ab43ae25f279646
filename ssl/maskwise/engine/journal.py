"""`Journal`: metrics.jsonl, TensorBoard, pictures and the progress line of a run folder."""

import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from maskwise.engine.appending import Appending
from maskwise.engine.disk import refused, whole, write_whole
from maskwise.functional.draw import write_png
from maskwise.functional.errors import UserError

PLAIN_SECONDS, BAR_SECONDS = 10.0, 0.2
BAD_BATCHES = "bad_batches.jsonl"


def prepare_folder(path) -> Path:
    """Make the run folder, or raise UserError when nothing can be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # nameless where the system can: a kill leaves nothing
            pass
    except OSError as error:
        raise UserError(f"cannot write into the output folder {path} ({error.strerror}): choose another with --out") from None
    return path


class Journal:
    """Writes what happens to the run folder `folder` and shows progress on standard error.

    `quiet` shows nothing; a terminal gets a progress bar; anything else a plain line now and then. A journal that is not
    `main` (ranks other than 0) keeps time but writes and shows nothing. `about` tells of this start; it is listed in run.json.
    A disk that refuses never stops a journal: what is owed is kept in memory, said once, and written when it can be.
    """

    def __init__(self, folder, total_steps: int, quiet: bool = False, *, main: bool = True, tensorboard: bool = True, about: dict | None = None):
        self.folder, self.total_steps, self.main, self.about = Path(folder), total_steps, main, about
        self.quiet, self.tensorboard = quiet or not main, tensorboard and main
        self.terminal = not self.quiet and sys.stderr.isatty()
        self.metrics = self.bad = self.events = None
        self.late: dict[Path, Callable[[Path], None]] = {}
        self.loss, self.shown_at, self.bar = float("nan"), -1e9, ""
        self.seconds_before = 0.0
        self.start_clock()

    def open(self, step: int, seconds: float = 0.0) -> list[dict]:
        """Begin after `step` steps and `seconds` of training; later lines are cut off, the kept ones returned (on every rank).

        Raises UserError when the disk refuses.
        """
        path = self.folder / "metrics.jsonl"
        kept, length = whole_lines(path, step)
        self.seconds_before, self.step = seconds, step
        self.start_clock()
        if not self.main:
            return kept
        if self.about is not None:
            self._list_start(step)
        try:
            self.metrics = Appending(path, keep=length, say=self.say)
            if (bad := self.folder / BAD_BATCHES).exists():
                self.bad = Appending(bad, keep=whole_lines(bad, step)[1], say=self.say)
            (self.folder / "preempted").unlink(missing_ok=True)
            for half in (*self.folder.glob("reports/.*_step_*"), *self.folder.glob("pictures/.*_step_*")):  # left by a kill
                half.unlink()
            if self.tensorboard:
                from maskwise.engine.event_file import EventFile

                self.events = EventFile(self.folder / "tensorboard", purge=step + 1 if step else 0, say=self.say)
        except OSError as error:
            raise UserError(f"{refused(error.filename or path, error)}, then start the same command again") from None
        return kept

    def start_clock(self) -> None:
        """Count images and waiting from now: what came before (evaluation, saving) is not training time."""
        self.since, self.waited, self.images = time.perf_counter(), 0.0, 0

    def stop_clock(self) -> None:
        """Add the time since the clock was started to the training time."""
        self.seconds_before += time.perf_counter() - self.since
        self.start_clock()

    @property
    def seconds(self) -> float:
        """Training time of this run so far, earlier starts included."""
        return self.seconds_before + time.perf_counter() - self.since

    @contextlib.contextmanager
    def waiting(self):
        """Time spent in here is waiting for data."""
        begin = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begin

    def count(self, step: int, images: int) -> None:
        """One step more, on `images` images of all ranks; moves the progress bar."""
        self.step = step
        self.images += images
        if self.terminal and time.perf_counter() - self.shown_at > BAR_SECONDS:
            self._show()

    def line(self, step: int, values: dict) -> dict:
        """Write one logged step, with img_s, data_wait (share of the time) and seconds; returns the line."""
        spent = max(time.perf_counter() - self.since, 1e-9)
        line = {"step": step, **values, "img_s": round(self.images / spent, 2), "data_wait": round(self.waited / spent, 4), "seconds": round(self.seconds, 2)}
        self._write(line)
        self.loss = values.get("loss", self.loss)
        if self.events:
            for key, value in line.items():
                if key != "step":
                    self.events.scalar(f"train/{key}", value, step)
        due = step >= self.total_steps or time.perf_counter() - self.shown_at > PLAIN_SECONDS
        if self.terminal or (not self.quiet and due):
            self._show()
        self.stop_clock()
        return line

    def report(self, step: int, name: str, report) -> None:
        """Save an evaluation's report beside the checkpoints and write its numbers."""
        if not self.main:
            return
        self._file(self.folder / "reports" / f"{name}_step_{step:08d}.json", report.save)
        for key, value in report.numbers.items():
            if self.events and isinstance(value, (int, float)):
                self.events.scalar(f"{name}/{key}", value, step)
        self._write({"step": step, "report": name, "numbers": report.numbers})  # last: a start after a kill repeats what has no line
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in report.numbers.items() if isinstance(value, (int, float)))
        self.say(f"{name} at step {step}: {numbers}")

    def alarm(self, step: int, kind: str, text: str) -> None:
        """Write and say one alarm."""
        self._write({"step": step, "alarm": text, "kind": kind})
        self.say(f"alarm: {text}")

    def bad_batches(self, batches: list[dict]) -> None:
        """Add the steps that were left out, with their causes and sample ids, to bad_batches.jsonl."""
        if batches and self.metrics:
            self.bad = self.bad or Appending(self.folder / BAD_BATCHES, say=self.say)
            for each in batches:
                self.bad.write((json.dumps(each) + "\n").encode())

    def pictures(self, step: int, pictures: dict) -> None:
        """Save uint8 pictures [H,W,3] by name under pictures/ and show them in TensorBoard."""
        for name, picture in pictures.items():
            path = self.folder / "pictures" / f"{name}_step_{step:08d}.png"
            self._file(path, partial(save_picture, picture=picture))
            if self.events and path not in self.late:
                self.events.picture(name, path.read_bytes(), step)

    def unreadable(self, images: dict[str, str], alone: bool = False) -> None:
        """List the images that were replaced, by name with the reason, in bad_images.txt; says how many. `alone`: whatever the rank."""
        if not (images and (self.main or alone)):
            return
        path = self.folder / "bad_images.txt"
        before = set(path.read_text().splitlines()) if path.exists() else set()
        lines = before | {f"{name}\t{reason}" for name, reason in images.items()}
        if lines != before:
            self._file(path, partial(write_whole, text="".join(line + "\n" for line in sorted(lines))))
            self.say(f"{len(lines)} unreadable images were replaced by others: see {path}")

    def preempted(self, step: int) -> None:
        """Leave the file `preempted` and say how to go on."""
        if self.main:
            self._file(self.folder / "preempted", partial(write_whole, text=f"{step}\n"))
        saved = f"saved after step {step} of {self.total_steps}" if step else "nothing was done yet"
        self.say(f"interrupted: {saved}; the same command continues")

    def say(self, text: str) -> None:
        """One line on standard error, above the bar."""
        if not self.quiet:
            self._erase()
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Bring everything written so far, and what the disk refused before, to the disk."""
        self._catch_up()
        for file in (self.metrics, self.bad, self.events):
            if file:
                file.flush()

    def close(self) -> None:
        """Flush, close the files and leave the terminal on a fresh line; says what could not be written to the end."""
        if self.bar:
            print(file=sys.stderr, flush=True)
            self.bar = ""
        self._catch_up()
        if self.late:
            self.say(f"never written, the disk refused: {', '.join(str(path) for path in self.late)}")
        for file in (self.metrics, self.bad, self.events):
            if file:
                file.close()
        self.metrics = self.bad = self.events = None

    def _write(self, line):
        if self.metrics:
            plain = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()}  # JSON knows no NaN
            self.metrics.write((json.dumps(plain) + "\n").encode())

    def _file(self, path, write):
        """A file of its own, by `write(path)`: now or, where the disk refuses, with the next flush."""
        self.late[path] = write
        self._catch_up(path)

    def _catch_up(self, new=None):
        for path, write in list(self.late.items()):
            try:
                path.parent.mkdir(exist_ok=True)
                write(path)
                del self.late[path]
            except (OSError, UserError) as error:
                if path == new:
                    text = refused(path, error) if isinstance(error, OSError) else str(error)
                    self.say(f"{text}; tried again later, the run goes on")

    def _list_start(self, step):
        path = self.folder / "run.json"
        run = {}
        with contextlib.suppress(OSError, ValueError):
            run = json.loads(path.read_text(encoding="utf-8"))
        run["starts"] = [*run.get("starts", []), {"step": step, **self.about}]
        write_whole(path, json.dumps(run, indent=2))

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
            print(text, end="", file=sys.stderr, flush=True)
            self.bar = text
        else:
            print(text, file=sys.stderr, flush=True)

    def _erase(self):
        if self.bar:
            print("\r" + " " * len(self.bar) + "\r", end="", file=sys.stderr)
            self.bar = ""


def clock(seconds: float) -> str:
    """Seconds as 2:10 or 1:02:10."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def save_picture(path: Path, picture) -> None:
    """A uint8 picture [H,W,3] as a PNG file that is whole or not there."""
    with whole(path) as aside:
        write_png(aside, picture)


def read_metrics(path) -> list[dict]:
    """The whole lines of a metrics.jsonl; a line torn by a kill ends the reading."""
    return whole_lines(path)[0]


def whole_lines(path, step: float = math.inf) -> tuple[list[dict], int]:
    """The lines of a metrics.jsonl up to a step, and how many bytes of the file they are; a torn line ends the reading."""
    lines: list[dict] = []
    length = 0
    if not Path(path).exists():
        return lines, length
    for text in Path(path).read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not text.endswith(b"\n") or line.get("step", 0) > step:
            break
        lines.append(line)
        length += len(text)
    return lines, length
