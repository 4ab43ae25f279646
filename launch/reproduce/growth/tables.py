"""Tables of predicted and measured growth, with the source of each number for docs/performance.md."""

from __future__ import annotations

SHOWN_GPUS = ("8", "16", "64", "512")
MB = 1e6


def predicted(result: dict, name: str | None = None) -> str:
    """Return the tables of bytes and of efficiency; with the name of the file, followed by their sources."""
    head = ["", "gradients, MB", "of the head, MB", "others, kB", "sent, 8 ranks, MB", "buckets"]
    rows, sources = [], []
    for title, case in result["cases"].items():
        key = f'cases["{title}"]'
        rows.append(
            [
                title,
                f"{case['gradients_bytes'] / MB:.1f}",
                f"{case['head_gradients_bytes'] / MB:.1f}",
                f"{case['others_bytes'] / 1e3:.2f}",
                f"{case['sent_bytes'] / MB:.1f}",
                f"{case['buckets']}",
            ]
        )
        sources += [f"{key}.gradients_bytes / 1e6", f"{key}.head_gradients_bytes / 1e6", f"{key}.others_bytes / 1e3"]
        sources += [f"{key}.sent_bytes / 1e6", f"{key}.buckets"]
    parts = [table(head, rows) + comment(name, sources)]

    gpus = [count for count in SHOWN_GPUS if count in all_gpus(result)]
    head, rows, sources = ["efficiency, %", "step, ms", *(f"{count} GPUs" for count in gpus)], [], []
    for title, case in result["cases"].items():
        for label, counts in case["efficiency"].items():
            link, _, step = label.rpartition(", ")
            cells = []
            for count in gpus:
                if count not in counts:
                    cells.append("")
                    continue
                values = counts[count]
                cells.append(f"{100 * values['efficiency']:.1f} ({100 * values['efficiency_without_overlap']:.1f})")
                key = f'100 * cases["{title}"].efficiency["{label}"]["{count}"]'
                sources += [f"{key}.efficiency", f"{key}.efficiency_without_overlap"]
            rows.append([f"{title}, {step.removesuffix(' ms')} ms, {link}", *cells])
    head = ["efficiency, %", *(f"{count} GPUs" for count in gpus)]
    return "\n\n".join([*parts, table(head, rows) + comment(name, sources)])


def all_gpus(result: dict) -> set[str]:
    """Return the numbers of GPUs of a result."""
    return {count for case in result["cases"].values() for counts in case["efficiency"].values() for count in counts}


def measured(result: dict, name: str | None = None) -> str:
    """Return the table of weak scaling; with the name of the file, followed by its sources."""
    head = ["ranks", "step, s", "CPU per rank, s", "waiting, gradients, ms", "waiting, others, ms"]
    head += ["payload, MB", "sent by ring, MB", "loopback, MB", "efficiency, %", "by CPU, %"]
    rows, sources = [], []
    for ranks, row in result["ranks"].items():
        shared = not row["own_cores"]
        key = f'ranks["{ranks}"]'
        cells = [
            ("wall", 1, "{:.2f}", shared),
            ("cpu", 1, "{:.2f}", False),
            ("gradients_wait", 1e3, "{:.0f}", shared),
            ("others_wait", 1e3, "{:.1f}", shared),
            ("payload_bytes", 1e-6, "{:.1f}", False),
            ("ring_bytes", 1e-6, "{:.1f}", False),
            ("loopback_bytes", 1e-6, "{:.1f}", row["loopback_bytes"] is None),
            ("efficiency", 100, "{:.0f}", shared),
            ("cpu_efficiency", 100, "{:.0f}", False),
        ]
        line = [ranks]
        for field, factor, form, hidden in cells:
            line.append("" if hidden else form.format(factor * row[field]))
            if not hidden:
                sources.append({1: "", 1e3: "1000 * ", 100: "100 * "}.get(factor, "") + f"{key}.{field}")
                if factor == 1e-6:
                    sources[-1] += " / 1e6"
        rows.append(line)
    return table(head, rows) + comment(name, sources)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comment(name: str | None, sources: list[str]) -> str:
    """Return the comment that names the sources of a table, "" without a file."""
    if name is None:
        return ""
    return f"\n\n<!-- numbers {name}:\n  " + ",\n  ".join(sources) + " -->"
