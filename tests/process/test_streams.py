"""Standard streams that are gone, full, closed, missing or too narrow: nothing raises, and the exit status is right."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maskwise import cli
from maskwise.cli.console import print_line
from maskwise.cli.main import VERBS
from maskwise.cli.verb import Verb
from maskwise.process import streams

SMALL = ["data.count=16", "train.epochs=1", "teacher.warmup_temp_epochs=1", "evaluate.limit_bank=null"]
FULL = "maskwise: cannot write to standard output (No space left on device): free some space\n"
TEXT = "Straße 🦉 \udcff\n"


def reader_gone():
    """A pipe without a reader."""
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


def closed():
    """A stream that was closed."""
    stream = io.StringIO()
    stream.close()
    return stream


class Bare:
    """An object that a program uses as a stream: it can only write."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


UNUSABLE = {"reader gone": reader_gone, "full": lambda: open("/dev/full", "w"), "closed": closed, "none": lambda: None}


@pytest.fixture(params=UNUSABLE)
def unusable(request):
    """A stream that takes no text."""
    return UNUSABLE[request.param]()


def test_nothing_else_prints():
    """Benchmarks aside, which talk to their own processes through pipes."""
    package = Path(streams.__file__).parent
    for path in package.rglob("*.py"):
        if path.name == "streams.py" or path.is_relative_to(package / "bench"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), path
            assert getattr(node, "attr", "") not in ("__stdout__", "__stderr__"), path


def test_no_stream_raises(unusable, monkeypatch):
    monkeypatch.setattr(sys, "stdout", unusable)
    monkeypatch.setattr(sys, "stderr", unusable)
    for print_text in (streams.print_output, streams.print_error, streams.print_notice):
        print_text("x" * 100_000)
    assert not streams.is_terminal(unusable) and streams.columns(unusable) == 80


def test_a_stream_that_can_only_write():
    stream = Bare()
    streams.write(stream, "one\n"), streams.write(stream, "two\n")
    assert stream.text == "one\ntwo\n" and not streams.is_terminal(stream) and streams.columns(stream) == 80


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", rb"Stra\xdfe \U0001f989 \udcff" + b"\n"),
        ("latin-1", b"Stra\xdfe " + rb"\U0001f989 \udcff" + b"\n"),
        ("utf-8", "Straße 🦉 ".encode() + rb"\udcff" + b"\n"),
    ],
)
def test_characters_that_a_locale_lacks_become_escapes(encoding, expected):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert streams.write(stream, TEXT) is None and stream.buffer.getvalue() == expected


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert streams.is_terminal(stream)
    monkeypatch.setenv("TERM", "dumb")
    assert not streams.is_terminal(stream)


def test_rank_counts_only_among_several(monkeypatch, capsys):
    for size, rank, speaks in (("1", "3", True), ("2", "3", False), ("2", "0", True), (None, "1", True)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        streams.print_notice("line")
        assert capsys.readouterr().err == "line\n" * speaks


def test_everything_that_prints_in_a_command_is_safe(unusable, monkeypatch):
    monkeypatch.setattr(sys, "stdout", unusable)
    monkeypatch.setattr(sys, "stderr", unusable)
    with streams.safe_streams():
        print(TEXT * 10_000)
        print(TEXT * 10_000, file=sys.stderr, flush=True)
        sys.stdout.flush()
    assert sys.stdout is unusable and sys.stderr is unusable


def test_training_goes_on_without_standard_error(unusable, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stderr", unusable)
    assert cli.main(["train", "debug/tiny", "--out", str(tmp_path / "r"), *SMALL]) == 0
    assert (tmp_path / "r" / "checkpoints" / "last").read_text() == "step_00000002\n"
    assert capfd.readouterr() == (f"complete: 2 steps in {tmp_path}/r\n", "")


def verb(monkeypatch, lines):
    """Make `maskwise say` print lines and return its status."""
    printed = []

    def say(words):
        for line in lines:
            print_line(line)
            printed.append(line)
        return 0

    monkeypatch.setitem(VERBS, "say", Verb("", None, say))
    return printed


@pytest.mark.parametrize(
    ("make", "status", "error"),
    [(reader_gone, 0, ""), (lambda: None, 0, ""), (lambda: open("/dev/full", "w"), 2, FULL)],
    ids=["reader gone", "none", "full"],
)
def test_results_that_standard_output_refuses(monkeypatch, capsys, make, status, error):
    """The verb comes to its end; a reader that has seen enough is no error, a full disk is one."""
    printed = verb(monkeypatch, ["one", "two"])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", make())
        assert cli.main(["say"]) == status
    assert printed == ["one", "two"] and capsys.readouterr().err == error


def run(script, **options):
    """Run a shell line with $MASKWISE as the command -> (status, standard output, standard error)."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment = {**inherited, "PYTHONPATH": os.pathsep.join(sys.path), "MASKWISE": f"{sys.executable} -m maskwise"}
    done = subprocess.run(["bash", "-c", script], env={**environment, **options}, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("redirection", "status"),
    [
        (">/dev/full", 2),
        ("2>/dev/full", 0),
        (">&- 2>&- <&-", 0),
        ("| true", 0),
        ("2>&1 | true", 0),
        ("nonsense 2>/dev/full", 2),
        ("nonsense 2>&-", 2),
    ],
)
def test_exit_status_of_the_process(redirection, status):
    """Python's own flush at the end must not change it (120) or print anything."""
    words = "" if "nonsense" in redirection else "--help"
    done, _, error = run(f"set -o pipefail; $MASKWISE {words} {redirection}")
    assert (done, error) == (status, "" if status != 2 or "2>" in redirection else FULL)


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path):
    """What C code writes to descriptor 2 must not end up in a file that was opened later."""
    program = "import os, sys; from maskwise.process.streams import safe_streams\n"
    program += (
        "with safe_streams():\n    file = open(sys.argv[1], 'w')\n    os.write(2, b'warning'); os.write(1, b'warning')"
    )
    done, _, _ = run(f'{sys.executable} -c "$PROGRAM" {tmp_path}/file <&- >&- 2>&-', PROGRAM=program)
    assert done == 0 and (tmp_path / "file").read_bytes() == b""


def test_a_locale_without_the_characters(tmp_path):
    folder = tmp_path / "Straße 🦉"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done, output, error = run(f"$MASKWISE doctor '{folder}'; $MASKWISE --version", **ascii_only)
    assert done == 0 and output.startswith("maskwise ") and "Traceback" not in error
    assert r"Stra\xdfe \U0001f989" in error or r"\udcc3" in error
