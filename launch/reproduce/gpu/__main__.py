"""Measure one GPU in parts, each in its own process with a time limit: `bash launch/reproduce/gpu.sh --out FOLDER`.

FOLDER/gpu.json and FOLDER/gpu.md are written after every part. A part is started if what it usually takes is left of
--minutes; the same command, later, runs the parts that are missing or failed (--from: a gpu.json from elsewhere).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launch.reproduce.gpu.parts import PARTS, ROOT
from launch.reproduce.gpu.table import markdown
from maskwise.bench import record
from maskwise.engine.atomic_file import write_atomic

FINISHED = ("done", "skipped")
RESERVE = 5  # seconds to write the files


def main(words: list[str] | None = None) -> int:
    """Run the parts that are missing; exit status 1 if one of them failed or is still missing."""
    options = parser().parse_args(words)
    deadline = time.monotonic() + 60 * options.minutes
    source = options.earlier or options.out / "gpu.json"
    result = record.read(source) if source.is_file() else {"record": None, "parts": {}}
    for name in options.parts or PARTS:
        if result["parts"].get(name, {}).get("status") in FINISHED:
            continue
        left = deadline - time.monotonic() - RESERVE
        if left < PARTS[name].usual * (0 if options.miniature else 1):
            print(f"{name}: {left:.0f} s are left, left to the next call", file=sys.stderr)
            continue
        limit = left if options.miniature else min(PARTS[name].limit, left)
        outcome = run_part(name, command_of(name, options, left), limit)
        now = outcome.pop("record", None)
        if now is not None:
            now["command"] = "bash launch/reproduce/gpu.sh"
            result["record"] = now if result["record"] is None else record.continued(result["record"], now)
        result["parts"][name] = outcome
        print(f"{name}: {outcome['status']}, {outcome['seconds']:.0f} s {outcome.get('error', '')[-300:]}", flush=True)
        keep(options.out, result)
    print(markdown(result))
    return 0 if all(result["parts"].get(name, {}).get("status") in FINISHED for name in options.parts or PARTS) else 1


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    made = argparse.ArgumentParser(prog="gpu.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="folder of gpu.json and gpu.md")
    made.add_argument("--from", dest="earlier", type=Path, help="a gpu.json to continue (default: that of --out)")
    made.add_argument("--minutes", type=float, default=9.0, help="of this call (default: %(default)s)")
    made.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=f"of: {', '.join(PARTS)}")
    made.add_argument("--images", help="a folder of JPEGs to load (default: natural-looking ones are made)")
    made.add_argument("--seconds", type=float, default=180.0, help="of the training (default: %(default)s)")
    made.add_argument("--device", default="cuda")
    made.add_argument("--miniature", action="store_true", help="tiny sizes, to see that the parts run")
    return made


def command_of(name: str, options: argparse.Namespace, left: float) -> list[str]:
    """Return the command of a part's process, without --out; training takes what is left if that is less."""
    command = [sys.executable, "-m", "launch.reproduce.gpu.parts", name, "--device", options.device]
    command += ["--seconds", str(min(options.seconds, max(1.0, left - 40)))]
    command += ["--miniature"] if options.miniature else []
    return [*command, "--images", options.images] if options.images else command


def run_part(name: str, command: list[str], limit: float) -> dict:
    """Run a part's process, ended with all its children at the limit -> {"status", "seconds", "result" or "error"}."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "part.json", Path(folder) / "log"
        with log.open("wb") as stream:
            child = subprocess.Popen(
                [*command, "--out", str(out)], cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True
            )
            try:
                child.wait(timeout=limit)
                status = "failed"
            except subprocess.TimeoutExpired:
                status = "timed out"
            finally:
                with contextlib.suppress(ProcessLookupError):  # a part may leave processes behind
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        seconds = time.monotonic() - begin
        if status == "failed" and out.is_file():
            return {"seconds": seconds, **json.loads(out.read_text(encoding="utf-8"))}
        text = log.read_text(encoding="utf-8", errors="replace")
        return {"status": status, "seconds": seconds, "limit": limit, "error": text[-4000:]}


def keep(folder: Path, result: dict) -> None:
    """Write gpu.json and gpu.md."""
    folder.mkdir(parents=True, exist_ok=True)
    if result["record"] is not None:
        record.write(folder / "gpu.json", result)
    write_atomic(folder / "gpu.md", markdown(result) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
