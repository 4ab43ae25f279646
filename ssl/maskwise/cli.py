"""The command line: verbs, and mistakes told in one line; everything heavy is imported by the verb that needs it."""

from __future__ import annotations

import argparse
import errno
import os
import sys

from maskwise import __version__
from maskwise.functional.errors import UserError

ABOUT = "Self-supervised vision pretraining that chooses what to hide."
STOPPED = 130  # what a shell expects after Ctrl-C
SICK = 1  # `maskwise doctor RUN` found something wrong
PATH_TROUBLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str):
        message = message.replace(", section.key=value", "").replace(", key=value", "")  # argparse lists what may be left out, too
        raise UserError(f"{message}; see `{self.prog} --help`")


def train(words: list[str]) -> int:
    """pretrain from a recipe, or just from --data FOLDER; the same command continues the run it finds"""
    parser = Parser("maskwise train", description="Pretrain from a recipe, or from --data alone; the same command continues the run it finds in DIR.")
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a recipe file, or a shipped one such as debug/tiny; without it one is picked for --data and written out")
    parser.add_argument("--data", metavar="FOLDER", help="the images: a folder, or a list file")
    parser.add_argument("--out", metavar="DIR", help="the run folder (with --data alone: runs/ and the folder's name)")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="what to change in the recipe")
    given = parser.parse_intermixed_args(words)
    if given.recipe and "=" in given.recipe and not os.path.exists(given.recipe):  # an override in the recipe's place
        given.recipe, given.overrides = None, [given.recipe, *given.overrides]
    if given.recipe is None and given.data is None:
        raise UserError("train: give a RECIPE, or --data FOLDER to have one picked; see `maskwise train --help`")
    if given.recipe is not None and given.out is None:
        raise UserError("train: give --out DIR, the folder of the run")
    if given.data is not None and given.recipe is not None:
        kind = "list" if os.path.isfile(given.data) else "folder"
        given.overrides = [f"data.name={kind}", f"data.path={given.data}", *given.overrides]
    from maskwise.engine.interrupts import Interrupts

    with Interrupts(ctrl_c=False):  # told to stop while torch is still being imported
        from maskwise.recipe import read_recipe

        if given.recipe is None:
            given.recipe, given.out = picked(given.data, given.out)
        recipe = read_recipe(given.recipe, *given.overrides)
        from maskwise import build

        status = build.train(recipe, out=given.out)
    if status["status"] == "complete":  # otherwise the journal has said what happened
        say(f"complete: {status['step']} steps in {given.out}")
    return 0


def picked(data: str, out: str | None) -> tuple[str, str]:
    """The recipe file picked for a folder, written beside the run folder unless it is there already, and the run folder."""
    from pathlib import Path

    from maskwise import starter
    from maskwise.distributed.world import World

    folder = Path(out or Path("runs") / (Path(data).resolve().stem or "images"))
    file = folder.parent / f"{folder.name}.yaml"
    if file.exists():
        say(f"recipe: {file}, from an earlier start; remove it to have one picked anew")
        return str(file), str(folder)
    import torch

    found = starter.start(data, World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu")).device)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}")  # every rank writes the same
    aside.write_text(found.text, encoding="utf-8")
    os.replace(aside, file)
    say("\n".join([*found.said, f"recipe: {file} (edit it and start again with `maskwise train {file} --out DIR`)"]))
    return str(file), str(folder)


def doctor(words: list[str]) -> int:
    """measure what a recipe costs here (memory, img/s, advice), or say what is wrong with a RUN"""
    parser = Parser("maskwise doctor", description="Measure a few real steps of a recipe on this machine, and what its batch and data advise; or read a run folder "
                    "and say whether the run is healthy (exit status 0) or what is wrong with it (1). Nothing is written.")  # fmt: skip
    parser.add_argument("recipe", metavar="RECIPE|RUN", nargs="?", help="a recipe file, a shipped one or a run folder; without it only the machine is looked at. RUN/recipe.yaml measures a run's recipe")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="N", help="about how long to measure (default: %(default)s)")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="what to change in the recipe")
    given = parser.parse_intermixed_args(words)
    if given.seconds <= 0:
        raise UserError(f"doctor: --seconds {given.seconds:g} is no time to measure in; give more than 0")
    from maskwise.recipe import read_recipe

    if given.recipe is not None and os.path.isdir(given.recipe):
        from maskwise.doctor.diagnosis import diagnose

        found = diagnose(given.recipe, *given.overrides)
        say(found.text())
        return SICK if found.findings else 0
    recipe = None if given.recipe is None else read_recipe(given.recipe, *given.overrides)
    from maskwise.doctor.report import told

    say(told(recipe, given.seconds))
    return 0


def evaluate(words: list[str]) -> int:
    """measure a model: `maskwise evaluate knn MODEL train=DIR test=DIR`"""
    parser = Parser("maskwise evaluate", description="Measure a model: knn, linear ...; train=DIR test=DIR and the options of its signature, such as k=[10,20].")
    parser.add_argument("name", metavar="NAME", help="the evaluation, such as knn or linear (`maskwise list evaluations` tells which there are); all runs what --data allows")
    parser.add_argument("model", metavar="MODEL", help="a run folder, an exported folder or a checkpoint file")
    parser.add_argument("--out", metavar="FILE", help="write the report there as JSON; with `all`: the folder for reports, pictures and table.md")
    parser.add_argument("--data", metavar="DIR", help="with `all`: a folder of datasets; what it allows is run")
    parser.add_argument("options", metavar="key=value", nargs="*")
    given = parser.parse_intermixed_args(words)
    from maskwise import verbs
    from maskwise.recipe_evaluations import options_of

    if given.name == "all":
        if given.data is None:
            raise UserError("evaluate all: no data; give --data DIR, a folder that holds datasets")
        options = options_of(given.options, "evaluate all", verbs.evaluate_all)
        out = given.out or (os.path.join(given.model, "evaluations") if os.path.isdir(given.model) else "evaluations")
        reports = verbs.evaluate_all(given.model, given.data, out, **options, say=say)
        say(f"{len(reports)} evaluations: {os.path.join(out, 'table.md')}")
        return 0
    if given.name not in verbs.EVALUATIONS:
        from maskwise.recipe_schema import nearest

        raise UserError(f"no evaluation {given.name}{nearest(given.name, verbs.EVALUATIONS)}; there are {', '.join(verbs.EVALUATIONS)}")
    if given.data is not None:
        raise UserError(f"evaluate {given.name}: --data goes with `all`; give train=DIR test=DIR")

    options = options_of(given.options, f"evaluate {given.name}", verbs.evaluate, verbs.EVALUATIONS[given.name])
    report = verbs.evaluate(given.name, given.model, **options)
    for key, value in report.numbers.items():
        say(f"{key:<24} {value:.2f}" if isinstance(value, float) and not 0 < abs(value) < 0.01 else f"{key:<24} {value}")
    for line in report.protocol.get("differences", ()):
        say(f"differs from {report.protocol.get('preset', 'the paper')}: {line}")
    if given.out:
        report.save(given.out)
        say(f"report: {given.out}")
    return 0


def look(words: list[str]) -> int:
    """draw where a model looks and what a masking would hide, for given images"""
    parser = Parser("maskwise look", description="Draw the attention of a model over images, and what a masking would hide, on one PNG sheet.")
    parser.add_argument("model", metavar="MODEL", help="a run folder, an exported folder or a checkpoint file")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files; then masking=NAME and other masking options as key=value")
    parser.add_argument("--out", metavar="FILE", default="look.png", help="the sheet (default: %(default)s)")
    given = parser.parse_intermixed_args(words)
    images = [word for word in given.images if os.path.exists(word) or "=" not in word]
    if not images:
        raise UserError("look: no image given; name at least one image file")
    from maskwise import verbs
    from maskwise.recipe_evaluations import options_of

    options = options_of([word for word in given.images if word not in images], "look", verbs.look)
    verbs.look(given.model, images, given.out, **options)
    say(f"sheet: {given.out}")
    return 0


def show(words: list[str]) -> int:
    """print a recipe resolved, each value with the place it comes from"""
    parser = Parser("maskwise show", description="Print a recipe resolved, each value with the place it comes from.")
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, a run folder, or a shipped recipe such as debug/tiny")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    given = parser.parse_intermixed_args(words)
    from maskwise.recipe import read_recipe

    recipe = read_recipe(given.recipe, *given.overrides)
    say(f"# {recipe.source}, hash {recipe.hash()}\n{recipe.explained()}", end="")
    return 0


def list_(words: list[str]) -> int:
    """say what there is: poolings, maskings, methods, backbones, datasets, evaluations, recipes"""
    parser = Parser("maskwise list", description="Say what there is to choose from, read from the code's own tables.")
    parser.add_argument("table", metavar="TABLE", nargs="?", help="poolings, maskings, methods, backbones, datasets, evaluations or recipes")
    given = parser.parse_args(words)
    import shutil

    from maskwise.listing import LISTINGS, listing

    if given.table is None:
        say("\n".join(f"maskwise list {name:<12} {make.__doc__}" for name, make in LISTINGS.items()))
    else:
        say(listing(given.table).text(shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    return 0


def export(words: list[str]) -> int:
    """write a run's encoder for timm, transformers and `maskwise.load`, or push it to the Hub"""
    parser = Parser("maskwise export", description="Write the encoder of a run as a folder that opens in timm, transformers and maskwise.load.")
    parser.add_argument("model", metavar="RUN", help="a run folder, an exported folder or a checkpoint file")
    parser.add_argument("--to", metavar="DIR|hub:NAME", required=True, help="the folder to write, or hub:owner/name")
    parser.add_argument("--weights", choices=("teacher", "student"), default="teacher", help="which of the two (default: %(default)s)")
    parser.add_argument("--heads", action="store_true", help="add the projection head and the centers, to continue from")
    parser.add_argument("--light", action="store_true", help="of a run with classifier map: its averaged tokens alone (MAP-light)")
    parser.add_argument("--onnx", action="store_true", help="add onnx/model.onnx")
    parser.add_argument("--onnx-attention", action="store_true", help="add onnx/model_attention.onnx, whose third output is the attention")
    parser.add_argument("--pt2", action="store_true", help="add encoder.pt2, a program of torch.export")
    parser.add_argument("--licence", metavar="ID", default="unknown", help="licence of the weights, such as apache-2.0")
    parser.add_argument("--dataset", metavar="ID", action="append", default=[], help="data in the card's header; may be repeated")
    parser.add_argument("--base-model", metavar="ID", help="the model that this one continues")
    parser.add_argument("--picture", choices=("run", "shapes"), help="the card's picture: the run's own, or embedded images (default on a public Hub page)")
    parser.add_argument("--private", action="store_true", help="hub: a private repository")
    parser.add_argument("--revision", metavar="NAME", help="hub: the branch to commit to")
    parser.add_argument("--dry-run", action="store_true", help="hub: tell what would be uploaded, and send nothing")
    given = parser.parse_intermixed_args(words)
    programs = [name for name in ("onnx", "onnx-attention", "pt2") if getattr(given, name.replace("-", "_"))]
    options = {
        "weights": given.weights, "heads": given.heads, "light": given.light, "onnx": programs, "licence": given.licence, "datasets": given.dataset,
        "base_model": given.base_model, "picture": given.picture, "say": say,
    }  # fmt: skip
    from maskwise.export import release

    if given.to.startswith("hub:"):
        name = given.to.removeprefix("hub:")
        address = release.push_to_hub(given.model, name, private=given.private, revision=given.revision, dry_run=given.dry_run, **options)
        say(f"{'would be pushed' if given.dry_run else 'pushed'}: {address}")
        return 0
    for option in ("private", "revision", "dry_run"):
        if getattr(given, option):
            raise UserError(f"--{option.replace('_', '-')} is for the Hub: give --to hub:owner/name, or leave it out")
    release.export(given.model, given.to, **{**options, "picture": given.picture or "run"})
    say(f"exported: {given.to}")
    return 0


def convert(words: list[str]) -> int:
    """turn a file of DINO, iBOT, AttMask, SimPool, MAP, timm, DINOv2 or DINOv3 into a folder of ours, and back"""
    parser = Parser("maskwise convert", description="Read any model that is known here and write a folder of ours, or a file in another layout. key=value: num_heads, "
                    "gamma, name, position and the other overrides of maskwise.load.")  # fmt: skip
    parser.add_argument("model", metavar="FILE", help="a weights file, a run folder or an exported folder")
    parser.add_argument("--to", metavar="FILE|DIR", required=True, help="a folder, or a file ending in .pth, .pt or .safetensors")
    parser.add_argument("--from", dest="source", metavar="LAYOUT", help="the layout of FILE, where its keys do not tell")
    parser.add_argument("--layout", metavar="LAYOUT", help="the layout of the file to write: dino, ibot, attmask, simpool, timm, dinov2 or dinov3")
    parser.add_argument("--weights", metavar="NAME", help="only the teacher, or only the student")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    given = parser.parse_intermixed_args(words)
    from maskwise.export import convert as converting

    options = free_options(given.overrides, "convert")
    for line in converting.convert(given.model, given.to, layout=given.layout, source_layout=given.source, weights=given.weights, **options):
        say(line)
    return 0


def report(words: list[str]) -> int:
    """tell and draw what a run has learnt beside the lines it must beat"""
    parser = Parser("maskwise report", description="k-NN, masks on objects, pictures and curve of a run, beside untrained, pixels and chance.")
    parser.add_argument("run", metavar="RUN", help="a run folder")
    given = parser.parse_intermixed_args(words)
    from maskwise import verbs

    text = verbs.report(given.run)
    if text:
        say(text)
    return 0


def bench(words: list[str]) -> int:
    """measure the data path, a step, training or k-NN, beside named baselines"""
    import importlib
    import json

    from maskwise.bench import BENCHES

    if not words or words[0] in ("-h", "--help"):
        say(f"usage: maskwise bench WHAT ... [--json FILE]\n\n{bench.__doc__}; WHAT is one of {', '.join(BENCHES)}; `maskwise bench WHAT --help` tells more")
        raise SystemExit(0)
    if words[0] not in BENCHES:
        raise UserError(f"bench knows {', '.join(BENCHES)}, not `{words[0]}`")
    module = importlib.import_module(BENCHES[words[0]])
    parser = module.parser(Parser)
    parser.add_argument("--json", metavar="FILE", help="write what was measured there")
    given = parser.parse_intermixed_args(words[1:])
    if given.json and not os.path.isdir(os.path.dirname(given.json) or "."):
        raise UserError(f"--json {given.json}: its folder does not exist; make it first")
    result = module.run(given)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(result, indent=1) + "\n")
    say(module.text(result))
    return 0


VERBS = {"train": train, "doctor": doctor, "evaluate": evaluate, "look": look, "show": show, "list": list_, "export": export, "convert": convert, "report": report, "bench": bench}


def free_options(words: list[str], verb: str) -> dict[str, object]:
    """`key=value` words as keyword arguments, read as YAML reads them; who is called checks the names."""
    import yaml

    options: dict[str, object] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{verb}: `{word}` is not key=value")
        try:
            options[key] = yaml.safe_load(text) if text != "None" else None
        except yaml.YAMLError:
            options[key] = text
    return options


def usage() -> str:
    """The screen of `maskwise --help`."""
    verbs = "\n".join(f"  {name:<10} {verb.__doc__}" for name, verb in VERBS.items())
    more = "`maskwise VERB --help` tells more; several processes: `torchrun --nproc-per-node=2 -m maskwise train ...`"
    return f"usage: maskwise VERB ...\n\n{ABOUT}\n\n{verbs}\n\n{more}"


def say(text: str, end: str = "\n") -> None:
    """Print, from the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, end=end, flush=True)


def complain(text: str) -> None:
    """One line on standard error, from the rank that meets the mistake first."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from maskwise.distributed.world import voice

        text = voice(text)
    elif os.environ.get("RANK", "0") != "0":
        return
    if text is not None:
        print(f"maskwise: {text}", file=sys.stderr, flush=True)


def main(words: list[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 1 where the doctor finds a run sick, 2 after a mistake of the user, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if words is None else words)
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            say(usage())
            return 0
        if words[0] in ("-V", "--version"):
            say(f"maskwise {__version__}")
            return 0
        if words[0] not in VERBS:
            import difflib

            near = difflib.get_close_matches(words[0], VERBS, 1)
            raise UserError(f"no verb `{words[0]}`" + (f"; did you mean `{near[0]}`?" if near else "") + f"; verbs are {', '.join(VERBS)}")
        return VERBS[words[0]](words[1:])
    except UserError as error:
        complain(str(error))
        return 2
    except KeyboardInterrupt:
        complain("stopped by Ctrl-C; what was saved stays, and the same command goes on from it")
        return STOPPED
    except BrokenPipeError:  # `maskwise show ... | head`
        sys.stdout = open(os.devnull, "w")
        return 0
    except OSError as error:
        if error.filename is None or error.errno not in PATH_TROUBLE:
            raise
        complain(f"{error.filename}: {error.strerror}; give a path that can be read and written")
        return 2
