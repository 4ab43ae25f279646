"""The Markdown table of a GPU session."""

from __future__ import annotations

from launch.reproduce.gpu.parts import PARTS

GIB = 2**30


def markdown(result: dict) -> str:
    """Return one row per part: what was measured, or why nothing was."""
    about = result["record"] or {}
    lines = [
        f"{about.get('hardware')}, torch {about.get('torch')}, commit {about.get('commit')}, {about.get('date')}",
        "",
        "| part | status | s | result |",
        "|---|---|---:|---|",
    ]
    for name in PARTS:
        part = result["parts"].get(name)
        if part is None:
            lines.append(f"| {name} | not yet measured | | |")
            continue
        text = describe(name, part["result"]) if part["status"] == "done" else last_line(part.get("error", ""))
        lines.append(f"| {name} | {part['status']} | {part['seconds']:.0f} | {text} |")
    return "\n".join(lines)


def last_line(error: str) -> str:
    """Return the last line of an error, short and without characters that end a cell."""
    lines = error.strip().splitlines()
    return lines[-1][:200].replace("|", "/") if lines else ""


def describe(name: str, result: dict) -> str:
    """Return the numbers of a finished part in words."""
    return DESCRIPTIONS[name.partition(" ")[0]](result)


def _machine(result: dict) -> str:
    rates = ", ".join(f"{kind} {rate / 1e12:.3g} TFLOP/s" for kind, rate in result["matmul_rate"].items())
    return rates + (f"; missing: {', '.join(result['missing'])}" if result["missing"] else "")


def _step(result: dict) -> str:
    text = f"{result['images_per_second']:.4g} img/s, batch {result['batch']}, {result['precision']}, "
    text += f"peak {result['peak_memory'] / GIB:.3g} GiB, first steps {result['warm_up_seconds']:.3g} s"
    waits = result.get("host_waits")
    return text if waits is None else f"{text}, host waits {waits}"


def _tests(result: dict) -> str:
    return ", ".join(f"{count} {word}" for word, count in result["counts"].items())


def _packed(result: dict) -> str:
    ratio = result["seconds"]["separate"] / result["seconds"]["packed"]
    kernel = "" if result["kernel"] else ", no kernel for it"
    return f"{ratio:.3g} x the speed of separate crops, outputs differ by {result['outputs_differ']:.1e}{kernel}"


def _group(kind: str):
    def text(result: dict) -> str:
        speed, plain = result[kind]["images_per_second"], result["plain"]["images_per_second"]
        return f"{speed:.4g} img/s, {plain:.4g} without, losses differ by {result['relative_difference']:.1e}"

    return text


def _deterministic(result: dict) -> str:
    return f"{result['tensors']} tensors equal bit for bit, {result['images_per_second']:.4g} img/s"


def _knn(result: dict) -> str:
    return f"{result['queries']} queries among {result['bank']} in {result['seconds']:.3g} s"


def _loading(result: dict) -> str:
    whole = result["end_to_end"]["images_per_second"]
    return f"loader {result['loader_images_per_second']:.4g} img/s ({result['workers']} workers), training {whole:.4g}"


def _training(result: dict) -> str:
    first, last = result["losses"][0][1], result["losses"][-1][1]
    accuracies = ", ".join(f"{top1:.4g}" for _, top1 in result["knn"])
    return f"{result['steps']} steps, loss {first:.3g} to {last:.3g}, k-NN {accuracies}"


DESCRIPTIONS = {
    "machine": _machine,
    "step": _step,
    "tests": _tests,
    "packed": _packed,
    "ddp": _group("ddp"),
    "fsdp": _group("fsdp"),
    "deterministic": _deterministic,
    "knn": _knn,
    "loading": _loading,
    "training": _training,
}
