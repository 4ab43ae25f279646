"""The model card (README.md) of an exported folder, with recipe, reports and attention picture."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from maskwise.export.folder.card_picture import attention_picture
from maskwise.export.folder.licenses import UNKNOWN
from maskwise.export.folder.provenance import Provenance
from maskwise.export.folder.transformers_layout import WEIGHTS, processor_type
from maskwise.export.folder.verify import Difference, pools_class_token
from maskwise.imaging.drawing import write_png
from maskwise.nn.backbones.families.conv_stem import StemOptions
from maskwise.nn.encoder import Encoder

PICTURE = "attention.png"
BASELINES = "baselines"  # report of the k-NN of untrained features, in a run's reports
FEATURES = ("pooled", "patch_mean")  # of a network: the better one is listed
BASELINE_ROWS = (("untrained_pooled", "untrained_patch_mean"), ("pixels",), ("whitened_pixels",))
PROCESSORS = {
    "BitImageProcessor": (
        "The processor of transformers rounds the crop's margin down: one crop in four begins one pixel earlier than "
        "in timm and maskwise.\n"
    ),
    "TimmWrapperImageProcessor": (
        "The processor of transformers is timm's transform: it needs timm, and takes images of the encoder's channels "
        "only.\n"
    ),
}


def write(
    encoder: Encoder, folder: Path, provenance: Provenance, differences: list[Difference], untried: dict[str, str]
) -> None:
    """Write README.md, recipe.yaml, reports/ and attention.png into an exported folder.

    `differences` and `untried` (libraries and reasons) are the result of `verify.compare`.
    """
    folder = Path(folder)
    if provenance.picture is not None:
        (folder / PICTURE).write_bytes(provenance.picture)
    elif (sheet := attention_picture(encoder)) is not None:
        write_png(folder / PICTURE, sheet)
    if provenance.recipe:
        (folder / "recipe.yaml").write_text(provenance.recipe, encoding="utf-8")
    for name, report in provenance.reports.items():
        (folder / "reports").mkdir(exist_ok=True)
        (folder / "reports" / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    card = card_text(encoder, folder, provenance, differences, untried)
    (folder / "README.md").write_text(card, encoding="utf-8")


def metadata(encoder: Encoder, folder: Path, provenance: Provenance) -> dict:
    """Return the card's header: library, task, license, tags, data, base model, and results as a model-index."""
    tags = [
        "maskwise",
        "timm",
        "transformers",
        "self-supervised-learning" if provenance.is_self_supervised else "",
        "image-feature-extraction",
        *provenance.method.split(" with "),
        encoder.spec()["pooling"]["name"],
    ]
    header = {
        "library_name": "transformers" if (folder / WEIGHTS).is_file() else "timm",
        "pipeline_tag": "image-feature-extraction",
        "license": provenance.license,
        "tags": [tag for tag in dict.fromkeys(tags) if tag],
    }
    if provenance.datasets:
        header["datasets"] = list(provenance.datasets)
    base_model = provenance.base_model
    if base_model and re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):  # the header takes Hub names only
        header["base_model"] = base_model
    measured = {name: report for name, report in provenance.reports.items() if name != BASELINES}  # of other features
    results = [_result(name, report, provenance) for name, report in measured.items()]
    results = [result for result in results if result["metrics"]]
    if results:
        header["model-index"] = [{"name": provenance.name, "results": results}]
    return header


def _result(name: str, report: dict, provenance: Provenance) -> dict:
    """Return a report as an entry of the model-index."""
    kind = str((report.get("protocol") or {}).get("evaluation") or name)
    dataset = provenance.datasets[0] if provenance.datasets else "unnamed"
    task = {"type": "image-feature-extraction", "name": f"{kind} of frozen features"}
    metrics = [
        {
            "type": "accuracy" if re.search(r"(^|_)(top\d+|acc)", key) else slugged(key),
            "name": f"{kind} {key}",
            "value": value if isinstance(value, int) else float(f"{value:g}"),  # as in the table
        }
        for key, value in numbers_of(report).items()
    ]
    return {"task": task, "dataset": {"type": slugged(dataset), "name": dataset}, "metrics": metrics}


def numbers_of(report: dict) -> dict[str, float]:
    """Return the numeric results of a report."""
    return {
        key: value
        for key, value in report["numbers"].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def slugged(text: str) -> str:
    """Return a word that is valid as a type in the metadata."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-") or "unnamed"


def card_text(
    encoder: Encoder, folder: Path, provenance: Provenance, differences: list[Difference], untried: dict[str, str]
) -> str:
    """Return the text of README.md."""
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))["maskwise"]
    header = yaml.safe_dump(metadata(encoder, folder, provenance), sort_keys=False, allow_unicode=False)
    checks = [f"- {difference.line().strip()}" for difference in differences]
    checks += [f"- {name}: {reason}" for name, reason in untried.items()]
    parts = [
        f"---\n{header}---\n",
        f"# {provenance.name}\n",
        summary(encoder, provenance, description.get("classifier")),
        f"![images and the encoder's attention]({PICTURE})\n" if (folder / PICTURE).is_file() else "",
        "## Use\n",
        usage(encoder, folder, provenance),
        "## Results\n",
        results_table(provenance),
        "## Training\n",
        training(provenance),
        "## Verification\n",
        "This folder was opened again after writing and compared with the encoder on random images "
        "(largest difference, relative to the largest value):\n",
        "\n".join(checks) + "\n",
    ]
    return "\n".join(part for part in parts if part)


def summary(encoder: Encoder, provenance: Provenance, classifier: dict | None = None) -> str:
    """Return a paragraph on origin, backbone, pooling, input and classifier."""
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    size = "x".join(map(str, encoder.image_size))
    origin = f"the {provenance.weights} of a run of {provenance.method}" if provenance.method else "an encoder"
    step = f" after {provenance.step} steps" if provenance.step is not None else ""
    labels = "It computes features and has no classifier."
    if classifier is not None:
        light = " (light: averaged tokens only)" if classifier["options"].get("light") else ""
        labels = (
            f"Its classifier `{classifier['name']}{light}` of {classifier['count']} classes is in "
            "`classifier.safetensors`; `maskwise evaluate top1 FOLDER test=IMAGES` evaluates it, the other libraries "
            "read the features only."
        )
    return (
        f"This is {origin}{step}, written by maskwise. "
        f"Backbone: {encoder.backbone.name.partition('.')[0]} "
        f"(width {encoder.dim}, {millions:.1f} M parameters with the pooling); "
        f"pooling: {encoder.spec()['pooling']['name']}; images: {size} pixels, mean {list(encoder.mean)}, "
        f"std {list(encoder.std)}, crop_pct {encoder.crop_pct}. {labels}\n"
    )


def usage(encoder: Encoder, folder: Path, provenance: Provenance) -> str:
    """Return code for each library; `FOLDER` stands for this folder unless it has an address on the Hub."""
    pooling = encoder.spec()["pooling"]["name"]
    has_own_pooling = not pools_class_token(encoder)
    place, scheme = (provenance.address, "hf-hub") if provenance.address else ("FOLDER", "local-dir")
    vector = "the pooled vector of the class token"
    if has_own_pooling:
        vector = f"another vector, the {timm_pooling(folder)}: only maskwise has the pooling {pooling}"
    transformers = (
        f'model = AutoModel.from_pretrained("{place}")   # through its timm wrapper, which gives no attentions'
    )
    if (folder / WEIGHTS).is_file():
        transformers = (
            f'model = AutoModel.from_pretrained("{place}", attn_implementation="eager")   '
            "# a Dinov2 model: output_attentions=True works"
        )
    stem, stem_argument = stem_code(encoder)
    lines = [
        "```python",
        "import maskwise                                     # everything: pooled vector, patches and attention",
        f'encoder = maskwise.load("{place}")',
        "features = encoder(encoder.transform(image)[None])",
        "",
        f"import timm                                         # {vector}",
        *stem,
        f'model = timm.create_model("{scheme}:{place}", pretrained=True{stem_argument})   '
        "# num_classes=10 adds a classifier",
    ]
    if not stem:
        lines += [
            "",
            "from transformers import AutoImageProcessor, AutoModel",
            f'processor = AutoImageProcessor.from_pretrained("{place}")',
            transformers,
        ]
    lines += ["```", ""]
    if stem:
        lines.append(
            "timm's names hold no stem of given convolutions, so that it is an argument; transformers has none.\n"
        )
    if has_own_pooling:
        lines.append(
            f"The pooling `{pooling}` is in `maskwise.safetensors`, which timm and transformers do not read; "
            "its attention is available in maskwise only.\n"
        )
    lines.append(
        "At another image size timm and transformers resample the position table differently; "
        "at the size above all three agree.\n"
    )
    lines.append(PROCESSORS[processor_type(encoder)])
    return "\n".join(lines)


def stem_code(encoder: Encoder) -> tuple[list[str], str]:
    """Return the lines that build a stem of given convolutions in timm, and create_model's argument; empty without."""
    stem = StemOptions.of_network(encoder.backbone.timm_args)
    return ([], "") if stem is None else (stem.code(encoder.dim, len(encoder.mean)), ", embed_layer=embed_layer")


def timm_pooling(folder: Path) -> str:
    """Return the vector that timm pools in an exported folder, in words."""
    pool = json.loads((folder / "config.json").read_text(encoding="utf-8"))["global_pool"]
    return {"token": "class token", "avg": "mean of the patches"}.get(pool, pool)


def results_table(provenance: Provenance) -> str:
    """Return the reports on this checkpoint as one table."""
    rows = []
    for name, report in provenance.reports.items():
        evaluation = (report.get("protocol") or {}).get("evaluation") or name
        data = f"data {str(report.get('data_hash', ''))[:12]}"
        rows += [f"| {evaluation} | {key} | {value:g} | {data} |" for key, value in numbers_of(report).items()]
    if not rows:
        return "Nothing has been measured on these weights yet.\n"
    header = ["| evaluation | metric | value | data |", "|---|---|---|---|"]
    return "\n".join([*baselines_table(provenance), *header, *rows, "", "Protocols are in `reports/`.\n"])


def baselines_table(provenance: Provenance) -> list[str]:
    """Return the lines of a table of k-NN beside its baselines on the same images; [] without both."""
    baselines = provenance.reports.get(BASELINES) or {}
    header = [
        "| k-NN top-1, per cent, the better of both features | trained | untrained | raw pixels | whitened pixels |",
        "|---|---:|---:|---:|---:|",
    ]
    lines = []
    for report in provenance.reports.values():
        protocol, numbers = report.get("protocol") or {}, numbers_of(report)
        if protocol.get("evaluation") != "knn" or report.get("data_hash") != baselines.get("data_hash"):
            continue
        for k in protocol.get("k") or ():
            sources = ((numbers, FEATURES), *((numbers_of(baselines), names) for names in BASELINE_ROWS))
            found = [
                [given[f"{name}_top1_k{k}"] for name in names if f"{name}_top1_k{k}" in given]
                for given, names in sources
            ]
            cells = [f"{max(values):.1f}" if values else "" for values in found]
            images = f"{protocol.get('bank')} training, {protocol.get('queries')} test images"
            lines.append(f"| k = {k}, {images} | {' | '.join(cells)} |")
    return [*header, *dict.fromkeys(lines), ""] if lines else []


def training(provenance: Provenance) -> str:
    """Return a list of data, seed, versions and so on, and the location of the recipe."""
    run = provenance.run
    data = ", ".join(provenance.datasets)
    if data and run.get("images"):
        data += f" ({run['images']} images)"
    device = run.get("device")
    if run.get("ranks") and device:
        device = f"{run['ranks']} x {device}"
    facts = {
        "data": data,
        "continued from": provenance.base_model,
        "seed": provenance.sections.get("seed"),
        "recipe hash": run.get("recipe_hash"),
        "commit": run.get("commit"),
        "precision": run.get("precision"),
        "device": device,
        "versions": ", ".join(f"{name} {number}" for name, number in (run.get("versions") or {}).items()),
    }
    rows = [f"- {name}: {value}" for name, value in facts.items() if value not in (None, "")]
    recipe = ""
    if provenance.recipe:
        recipe = (
            "The resolved recipe is `recipe.yaml`; "
            "`maskwise train recipe.yaml --out DIR data.path=...` repeats the run."
        )
    license = f"License of the weights: {provenance.license}."
    if provenance.license == UNKNOWN:
        license = "No license has been stated for these weights."
    return "\n".join([*(rows or ["Nothing is known about the training."]), "", recipe, "", license, ""])
