"""`Journal`: metrics.jsonl, TensorBoard, pictures and the progress line of a run folder."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from maskwise.functional.draw import write_png
from maskwise.functional.errors import UserError

PLAIN_SECONDS, BAR_SECONDS = 10.0, 0.2


def prepare_folder(path) -> Path:
    """Make the run folder, or raise UserError when nothing can be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe_{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write into the output folder {path} ({error.strerror}): choose another with --out") from None
    return path


class Journal:
    """Writes what happens to the run folder `folder` and shows progress on standard error.

    `quiet` shows nothing; a terminal gets a progress bar; anything else a plain line now and then. A journal that is not
    `main` (ranks other than 0) keeps time but writes and shows nothing.
    """

    def __init__(self, folder, total_steps: int, quiet: bool = False, *, main: bool = True, tensorboard: bool = True):
        self.folder, self.total_steps, self.main = Path(folder), total_steps, main
        self.quiet, self.tensorboard = quiet or not main, tensorboard and main
        self.terminal = not self.quiet and sys.stderr.isatty()
        self.metrics = self.writer = None
        self.loss, self.shown_at, self.bar = float("nan"), -1e9, ""
        self.seconds_before = 0.0
        self.start_clock()

    def open(self, step: int, seconds: float = 0.0) -> list[dict]:
        """Begin after `step` steps and `seconds` of training; later lines are cut off, the kept ones returned (on every rank)."""
        path = self.folder / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        self.seconds_before, self.step = seconds, step
        self.start_clock()
        if self.main:
            aside = path.with_name(".metrics.jsonl")
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(aside, path)
            self.metrics = open(path, "a")
            (self.folder / "preempted").unlink(missing_ok=True)
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1 if step else None)
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
        if self.writer:
            for key, value in line.items():
                if key != "step":
                    self.writer.add_scalar(f"train/{key}", value, step)
        due = step >= self.total_steps or time.perf_counter() - self.shown_at > PLAIN_SECONDS
        if self.terminal or (not self.quiet and due):
            self._show()
        self.stop_clock()
        return line

    def report(self, step: int, name: str, report) -> None:
        """Save an evaluation's report beside the checkpoints and write its numbers."""
        if not self.main:
            return
        path = self.folder / "reports" / f"{name}_step_{step:08d}.json"
        path.parent.mkdir(exist_ok=True)
        report.save(path)
        self._write({"step": step, "report": name, "numbers": report.numbers})
        for key, value in report.numbers.items():
            if self.writer and isinstance(value, (int, float)):
                self.writer.add_scalar(f"{name}/{key}", value, step)
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in report.numbers.items() if isinstance(value, (int, float)))
        self.say(f"{name} at step {step}: {numbers}")

    def alarm(self, step: int, text: str) -> None:
        """Write and say one alarm."""
        self._write({"step": step, "alarm": text})
        self.say(f"alarm: {text}")

    def pictures(self, step: int, pictures: dict) -> None:
        """Save uint8 pictures [H,W,3] by name under pictures/ and show them in TensorBoard."""
        for name, picture in pictures.items():
            path = self.folder / "pictures" / f"{name}_step_{step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            write_png(path, picture)
            if self.writer:
                self.writer.add_image(name, picture, step, dataformats="HWC")

    def unreadable(self, images: dict[str, str], alone: bool = False) -> None:
        """List the images that were replaced, by name with the reason, in bad_images.txt; says how many. `alone`: whatever the rank."""
        if not (images and (self.main or alone)):
            return
        path = self.folder / "bad_images.txt"
        before = set(path.read_text().splitlines()) if path.exists() else set()
        lines = before | {f"{name}\t{reason}" for name, reason in images.items()}
        if lines != before:
            path.write_text("".join(line + "\n" for line in sorted(lines)))
            self.say(f"{len(lines)} unreadable images were replaced by others: see {path}")

    def preempted(self, step: int) -> None:
        """Leave the file `preempted` and say how to go on."""
        if self.main:
            (self.folder / "preempted").write_text(f"{step}\n")
        self.say(f"interrupted: saved after step {step} of {self.total_steps}; the same command continues")

    def say(self, text: str) -> None:
        """One line on standard error, above the bar."""
        if not self.quiet:
            self._erase()
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Bring every line written so far to the disk."""
        if self.metrics:
            self.metrics.flush()
            os.fsync(self.metrics.fileno())
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """Flush, close the files and leave the terminal on a fresh line."""
        if self.bar:
            print(file=sys.stderr, flush=True)
            self.bar = ""
        if self.metrics:
            self.flush()
            self.metrics.close()
        if self.writer:
            self.writer.close()
        self.metrics = self.writer = None

    def _write(self, line):
        if self.metrics:
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()

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


def read_metrics(path) -> list[dict]:
    """The whole lines of a metrics.jsonl; a line torn by a kill ends the reading."""
    lines: list[dict] = []
    if not Path(path).exists():
        return lines
    for text in Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
