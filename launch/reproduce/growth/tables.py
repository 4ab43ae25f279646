"""Tables of predicted and measured growth, for a terminal or with the source of each number for a page."""

from __future__ import annotations

from launch.reproduce.growth.efficiency import INTERCONNECTS

FEW, MANY = "16", "512"  # GPUs in the table for a page


def predicted(result: dict) -> str:
    """Return the tables of bytes and of efficiency for all numbers of GPUs."""
    return "\n\n".join([byte_table(result, None), efficiency_table(result)])


def predicted_page(result: dict, name: str) -> str:
    """Return the tables of bytes and of efficiency for a page; `name` is the file of results."""
    return "\n\n".join([byte_table(result, name), short_efficiency_table(result, name)])


def byte_table(result: dict, name: str | None) -> str:
    """Return the bytes per step and rank of each case."""
    head = ["", "gradients, MB", "of the head, MB", "everything else, kB", "sent by one of 8, MB", "buckets"]
    rows, sources = [], []
    for title, case in result["cases"].items():
        key = f'cases["{title}"]'
        megabytes = ("gradients_bytes", "head_gradients_bytes")
        cells = [f"{case[field] / 1e6:.1f}" for field in megabytes] + [f"{case['others_bytes'] / 1e3:.2f}"]
        rows.append([title, *cells, f"{case['sent_bytes'] / 1e6:.1f}", str(case["buckets"])])
        sources += [f"{key}.{field} / 1e6" for field in megabytes] + [f"{key}.others_bytes / 1e3"]
        sources += [f"{key}.sent_bytes / 1e6", f"{key}.buckets"]
    return table(head, rows) + comment(name, sources)


def efficiency_table(result: dict) -> str:
    """Return the efficiency of each case, step time and interconnect, and in parentheses without overlap."""
    labels = [
        (title, label, row) for title, case in result["cases"].items() for label, row in case["efficiency"].items()
    ]
    gpus = sorted({int(count) for _, _, row in labels for count in row})
    rows = [[f"{title}, {label}", *(cell(row.get(str(count))) for count in gpus)] for title, label, row in labels]
    return table(["efficiency, %", *(f"{count} GPUs" for count in gpus)], rows)


def cell(values: dict | None) -> str:
    """Return an efficiency with overlap, and in parentheses without."""
    if values is None:
        return ""
    return f"{100 * values['efficiency']:.1f} ({100 * values['efficiency_without_overlap']:.1f})"


def short_efficiency_table(result: dict, name: str) -> str:
    """Return the efficiency on 8, FEW and MANY GPUs, the last one also without overlap."""
    head = ["step of one GPU", "8 GPUs, NVLink 4", *(f"{link}, {FEW} to {MANY} GPUs" for link in INTERCONNECTS)]
    rows, sources = [], []
    for title, case in result["cases"].items():
        steps = dict.fromkeys(label.rpartition(", ")[2] for label in case["efficiency"])
        for step in steps:
            line = [f"{title}, {step}"]
            sources.append(step.removesuffix(" ms"))
            for link in ("NVLink 4", *INTERCONNECTS):
                label = f"{link}, {step}"
                first, last = ("8", "8") if link == "NVLink 4" else (FEW, MANY)
                values, key = case["efficiency"][label], f'100 * cases["{title}"].efficiency["{label}"]'
                shown = [(first, "efficiency"), (last, "efficiency"), (last, "efficiency_without_overlap")]
                if first == last:
                    del shown[0]
                texts = [f"{100 * values[count][field]:.1f}" for count, field in shown]
                line.append(f"{' to '.join(texts[:-1])} ({texts[-1]})")
                sources += [f'{key}["{count}"].{field}' for count, field in shown]
            rows.append(line)
    return table(head, rows) + comment(name, sources)


MEASURED = {  # column: field, factor, format, whether it means nothing where ranks share cores
    "step, s": ("wall", "", "{:.2f}", True),
    "CPU, s": ("cpu", "", "{:.2f}", False),
    "waiting for gradients, ms": ("gradients_wait", "1000 * ", "{:.1f}", True),
    "for the rest, ms": ("others_wait", "1000 * ", "{:.1f}", True),
    "payload, MB": ("payload_bytes", "1e-6 * ", "{:.1f}", False),
    "sent by ring, MB": ("ring_bytes", "1e-6 * ", "{:.1f}", False),
    "over loopback, MB": ("loopback_bytes", "1e-6 * ", "{:.1f}", False),
    "efficiency, %": ("efficiency", "100 * ", "{:.0f}", True),
    "by CPU, %": ("cpu_efficiency", "100 * ", "{:.0f}", False),
}


def measured(result: dict, name: str | None = None) -> str:
    """Return the table of weak scaling; with the name of the file of results, followed by its sources."""
    rows, sources = [], []
    for ranks, row in result["ranks"].items():
        line = [ranks]
        sources.append(ranks)
        for field, factor, form, needs_core in MEASURED.values():
            if row[field] is None or (needs_core and not row["own_cores"]):
                line.append("")
                continue
            line.append(form.format(row[field] * float(factor.rstrip("* ") or 1)))
            sources.append(f'{factor}ranks["{ranks}"].{field}')
        rows.append(line)
    return table(["ranks", *MEASURED], rows) + comment(name, sources)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comment(name: str | None, sources: list[str]) -> str:
    """Return the comment that names the sources of a table, "" without a file."""
    if name is None:
        return ""
    lines = [", ".join(sources[start : start + 2]) for start in range(0, len(sources), 2)]
    return f"\n\n<!-- numbers {name}:\n  " + ",\n  ".join(lines) + " -->"
