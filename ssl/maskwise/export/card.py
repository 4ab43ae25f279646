"""The model card and what lies beside it: README.md with metadata, recipe, reports and the attention picture."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from maskwise.export.about import About
from maskwise.export.check import Difference, pools_class_token
from maskwise.export.picture import attention_picture
from maskwise.export.transformers_layout import WEIGHTS
from maskwise.functional.draw import write_png
from maskwise.nn.encoder import Encoder

PICTURE = "attention.png"


def write(encoder: Encoder, folder: Path, about: About, found: list[Difference], absent: list[str]) -> None:
    """Write README.md, recipe.yaml, reports/ and attention.png into an exported folder."""
    folder = Path(folder)
    drawn = False
    if about.picture is not None:
        (folder / PICTURE).write_bytes(about.picture)
        drawn = True
    elif (sheet := attention_picture(encoder)) is not None:
        write_png(folder / PICTURE, sheet)
        drawn = True
    if about.recipe:
        (folder / "recipe.yaml").write_text(about.recipe, encoding="utf-8")
    for name, report in about.reports.items():
        (folder / "reports").mkdir(exist_ok=True)
        (folder / "reports" / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(text(encoder, folder, about, found, absent, drawn), encoding="utf-8")


def metadata(encoder: Encoder, folder: Path, about: About) -> dict:
    """The card's header: library, task, licence, tags, data, base model, and measured results as a model-index."""
    dinov2 = (folder / WEIGHTS).is_file()
    pooling = encoder.spec()["pooling"]["name"]
    words = ["maskwise", "timm", "transformers", "self-supervised-learning", "image-feature-extraction", *about.method.split(" with "), pooling]
    header = {
        "library_name": "transformers" if dinov2 else "timm",
        "pipeline_tag": "image-feature-extraction",
        "license": about.licence,
        "tags": [word for word in dict.fromkeys(words) if word],
    }
    if about.datasets:
        header["datasets"] = list(about.datasets)
    if about.base_model and re.fullmatch(r"[\w.-]+/[\w.-]+", about.base_model):  # a name on the Hub; whatever else it was, the text tells
        header["base_model"] = about.base_model
    results = [result for name, report in about.reports.items() for result in [_result(name, report, about)] if result["metrics"]]
    if results:
        header["model-index"] = [{"name": about.name, "results": results}]
    return header


def _result(name: str, report: dict, about: About) -> dict:
    """One report as an entry of the model-index."""
    protocol = report.get("protocol") or {}
    kind = str(protocol.get("evaluation") or name)
    dataset = about.datasets[0] if about.datasets else "unnamed"
    task = {"type": "image-feature-extraction", "name": f"{kind} of frozen features"}
    metrics = [{"type": "accuracy" if re.search(r"(^|_)(top\d+|acc)", key) else slugged(key), "name": f"{kind} {key}", "value": value}
               for key, value in report["numbers"].items() if isinstance(value, (int, float)) and not isinstance(value, bool)]  # fmt: skip
    return {"task": task, "dataset": {"type": slugged(dataset), "name": dataset}, "metrics": metrics}


def slugged(text: str) -> str:
    """A word that metadata takes as a type."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-") or "unnamed"


def text(encoder: Encoder, folder: Path, about: About, found: list[Difference], absent: list[str], drawn: bool) -> str:
    """README.md."""
    described = json.loads((folder / "config.json").read_text())["maskwise"]
    header = yaml.safe_dump(metadata(encoder, folder, about), sort_keys=False, allow_unicode=False)
    parts = [
        f"---\n{header}---\n",
        f"# {about.name}\n",
        summary(encoder, about, described.get("classifier")),
        f"![images and where the encoder looks in them]({PICTURE})\n" if drawn else "",
        "## Use\n",
        use(encoder, folder, about),
        "## Measured\n",
        measured(about),
        "## How it was trained\n",
        training(about),
        "## Checked\n",
        "When this folder was written it was opened again and compared with the encoder on random images "
        "(largest difference, as a share of the largest feature where that is above 1):\n",
        "\n".join(f"- {each.line().strip()}" for each in found) + "".join(f"\n- {name}: not installed then, not tried" for name in absent) + "\n",
    ]
    return "\n".join(part for part in parts if part)


def summary(encoder: Encoder, about: About, classifier: dict | None = None) -> str:
    """What this is, in a paragraph."""
    spec, backbone = encoder.spec(), encoder.backbone
    million = sum(p.numel() for p in encoder.parameters()) / 1e6
    size = "x".join(map(str, encoder.image_size))
    made = f"the {about.weights} of a run of {about.method}" if about.method else "an encoder"
    step = f" after {about.step} steps" if about.step is not None else ""
    labels = "It gives features and has no classifier."
    if classifier is not None:
        kind = classifier["name"] + (" (light: averaged tokens alone)" if classifier["options"].get("light") else "")
        labels = f"Its classifier `{kind}` of {classifier['count']} classes stands in `classifier.safetensors`; `maskwise evaluate top1 FOLDER test=IMAGES` scores it, the other libraries read features only."
    return (
        f"This is {made}{step}, written by maskwise. Backbone: {backbone.name.partition('.')[0]} (width {encoder.dim}, {million:.1f} M parameters with the pooling); "
        f"pooling: {spec['pooling']['name']}; images: {size} pixels, mean {list(encoder.mean)}, std {list(encoder.std)}, "
        f"crop_pct {encoder.crop_pct}. {labels}\n"
    )


def use(encoder: Encoder, folder: Path, about: About) -> str:
    """Code for each library; `FOLDER` stands for this folder where there is no repository on the Hub."""
    dinov2 = (folder / WEIGHTS).is_file()
    own = not pools_class_token(encoder)
    place, scheme = (about.address, "hf-hub") if about.address else ("FOLDER", "local-dir")
    vector = "the pooled vector of the class token" if not own else f"another vector, the {layout_pool(folder)}: only maskwise has the pooling {encoder.spec()['pooling']['name']}"
    lines = [
        "```python",
        "import maskwise                                     # everything: pooled vector, patches and attention",
        f'encoder = maskwise.load("{place}")',
        "features = encoder(encoder.transform(image)[None])",
        "",
        f"import timm                                         # {vector}",
        f'model = timm.create_model("{scheme}:{place}", pretrained=True)   # num_classes=10 adds a classifier',
        "",
        "from transformers import AutoImageProcessor, AutoModel",
        f'processor = AutoImageProcessor.from_pretrained("{place}")',
        f'model = AutoModel.from_pretrained("{place}", attn_implementation="eager")   # a Dinov2 model: output_attentions=True works'
        if dinov2
        else f'model = AutoModel.from_pretrained("{place}")   # through its timm wrapper, which gives no attentions',
        "```",
        "",
    ]
    if own:
        lines.append(f"The pooling `{encoder.spec()['pooling']['name']}` stands in `maskwise.safetensors`, which timm and transformers do not read; its attention comes from maskwise only.\n")
    lines.append("At another image size timm and transformers resample the position table in their own way; at the size above all three agree.\n")
    return "\n".join(lines)


def layout_pool(folder: Path) -> str:
    """What timm pools in an exported folder, in words."""
    pool = json.loads((folder / "config.json").read_text())["global_pool"]
    return {"token": "class token", "avg": "mean of the patches"}.get(pool, pool)


def measured(about: About) -> str:
    """The reports of this checkpoint as one table."""
    rows = []
    for name, report in about.reports.items():
        protocol = report.get("protocol") or {}
        on = f"data {str(report.get('data_hash', ''))[:12]}"
        for key, value in report["numbers"].items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rows.append(f"| {protocol.get('evaluation') or name} | {key} | {value:g} | {on} |")
    if not rows:
        return "Nothing has been measured on these weights yet.\n"
    return "\n".join(["| evaluation | number | value | on |", "|---|---|---|---|", *rows, "", "Protocols are in `reports/`.\n"])


def training(about: About) -> str:
    """Data, steps, versions and the recipe's place."""
    run = about.run
    versions = ", ".join(f"{name} {number}" for name, number in (run.get("versions") or {}).items())
    known = {
        "data": ", ".join(about.datasets) + (f" ({run['images']} images)" if run.get("images") else "") if about.datasets else "",
        "continued from": about.base_model,
        "seed": about.sections.get("seed"),
        "recipe hash": run.get("recipe_hash"),
        "commit": run.get("commit"),
        "precision": run.get("precision"),
        "device": f"{run['ranks']} x {run['device']}" if run.get("ranks") and run.get("device") else run.get("device"),
        "versions": versions,
    }
    rows = [f"- {name}: {value}" for name, value in known.items() if value not in (None, "")]
    recipe = "The resolved recipe is `recipe.yaml`; `maskwise train recipe.yaml --out DIR data.path=...` repeats the run." if about.recipe else ""
    licence = "No licence has been stated for these weights." if about.licence == "unknown" else f"Licence of the weights: {about.licence}."
    return "\n".join([*(rows or ["Nothing is known of the training."]), "", recipe, "", licence, ""])
