"""Examples of README.md and docs/: commands run in miniature or are checked, recipes read, Python executed.

A fenced block runs as written except that paths of the docs are replaced by small folders (PATHS), `train` gets the
sizes of tests/support/miniature.py and two steps, and --out starts empty. Commands outside RUN, blocks under
`<!-- checked, not run -->` and pages outside RUN_PAGES are checked only: command, flags, recipe and options must exist.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from maskwise import api, build, cli
from maskwise.cli.main import VERBS
from maskwise.recipe.evaluation_schedule import options_of
from maskwise.recipe.reading import read_recipe, shipped
from support.miniature import CHOSEN, SIZES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PATHS = {
    "/data/imagenet": "photos",
    "/path/to/images": "photos",
    "/path/to/labeled/train": "photos/train",
    "/path/to/labeled/val": "photos/val",
}
RUN = {
    "train",
    "show",
    "list",
    "look",
    "export",
    "report",
    "embed",
    "search",
    "dupes",
    "runs",
    "replay",
    "evaluate knn",
    "evaluate few_shot",
}
TWO_STEPS = ("train.steps=2", "optimizer.warmup_epochs=1", "teacher.warmup_temp_epochs=1", "train.precision=fp32")
MARKER = "<!-- checked, not run -->"
RUN_PAGES = {
    "README.md",
    "recipes.md",
    "faq.md",
    "evaluations.md",
    "embeddings.md",
    "look.md",
    "runs.md",
}  # the others' examples need data, files, libraries or machines that are not here


def blocks():
    """(page, number, language, text, whether it is only to be checked) of every fenced block."""
    for page in PAGES:
        fences = re.finditer(
            rf"(?:({re.escape(MARKER)})\n+)?^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S
        )
        for number, match in enumerate(fences, start=1):
            if match[2] in ("bibtex", "text"):
                continue
            yield pytest.param(
                match[2], match[3], bool(match[1]) or page.name not in RUN_PAGES, id=f"{page.name}-{number}"
            )


def commands(text):
    """The words of each maskwise, bash or torchrun line, remarks and prompts taken off."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words and words[0] in ("maskwise", "bash", "torchrun"):
            yield [
                PATHS.get(
                    word,
                    "=".join([*word.split("=", 1)[:1], PATHS.get(word.split("=", 1)[1], word.split("=", 1)[1])])
                    if "=" in word
                    else word,
                )
                for word in words
            ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with what the examples name: labeled photographs, two files, a finished run, a recipe."""
    folder = tmp_path_factory.mktemp("docs")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("val", 2)):
        for name in ("cats", "dogs"):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (36, 40, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / "photos" / split / name / f"{i:02d}.png")
    for name in ("photo1.jpg", "photo2.jpg"):
        Image.fromarray(pixels).save(folder / name)
    recipe = read_recipe("attmask/100pct_high", *SIZES, *TWO_STEPS, f"data.path={folder / 'photos'}")
    assert build.train(recipe, out=folder / "runs" / "mine", quiet=True)["status"] == "complete"
    texts = [param.values[1] for param in blocks() if param.values[0] == "yaml"]
    (folder / "mine.yaml").write_text(texts[-1])
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run(words, fresh):
    """Run one command of the docs in miniature."""
    if words[0] == "train":
        out = next((word for before, word in zip(words, words[1:]) if before == "--out"), None)
        if out and out not in fresh:
            shutil.rmtree(out, ignore_errors=True)
            fresh.add(out)
        words = [*words, *(CHOSEN if words[1] == "--data" else SIZES), *TWO_STEPS]
    assert cli.main(words) == 0, words


def check(words):
    """Verb, flags, recipe and options of a command exist."""
    verb, rest = words[0], words[1:]
    assert verb in VERBS, f"no verb {verb}"
    flags = re.findall(r"--[\w-]+", VERBS[verb].parser().format_help())
    assert all(flag.partition("=")[0] in flags for flag in rest if flag.startswith("--")), rest
    if verb in ("train", "show", "doctor"):
        recipe = next((word for word in rest if word in shipped() or word.endswith(".yaml")), None)
        if recipe:
            read_recipe(recipe, *(word for word in rest if re.match(r"\w+(\.\w+)?=", word)), try_model=False)
    if verb == "evaluate" and rest[0] in api.EVALUATIONS:
        options = [word for word in rest[2:] if "=" in word and not word.startswith("--")]
        options_of(options, "evaluate", api.evaluate, api.EVALUATIONS[rest[0]].options)


@pytest.mark.parametrize("language, text, checked", list(blocks()))
def test_example(folder, language, text, checked, capfd):
    if language == "yaml":
        Path("block.yaml").write_text(text)
        read_recipe("block.yaml")
    elif language == "python":
        program = compile(text, "example", "exec")
        if not checked:
            torch.manual_seed(0)
            exec(program, {"images": torch.randn(2, 3, 32, 32)})
    fresh: set[str] = set()
    for words in commands(text) if language != "python" else ():
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), words
            words = ["torchrun", *words[2:]] if words[1] == "launch/torchrun.sh" else []
        if words and words[0] == "torchrun":
            words = words[words.index("maskwise") + 1 :] if "maskwise" in words else ["train", *words[1:]]
            check(words)
        elif words:
            name = f"evaluate {words[2]}" if words[1] == "evaluate" else words[1]
            run(words[1:], fresh) if name in RUN and not checked else check(words[1:])


def test_every_command_has_an_example():
    seen = {
        words[1]
        for block in blocks()
        if block.values[0] != "python"
        for words in commands(block.values[1])
        if words[0] == "maskwise"
    }
    assert {"train", "evaluate", "look", "show", "list"} <= seen


def test_links_between_pages_resolve():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#:]+)(?:#[\w-]*)?\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for target, anchor in re.findall(r"\]\(([\w.]+\.md)#([\w-]+)\)", text):
            titles = re.findall(r"^#+ (.*)$", (page.parent / target).read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, (
                f"{page.name}: {target}#{anchor}"
            )


def test_every_shipped_recipe_is_documented_with_its_published_numbers():
    from maskwise.recipe.reading import SHIPPED
    from maskwise.recipe.yaml_text import header

    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in shipped():
        assert f"`{name}`" in text, f"docs/recipes.md does not name {name}"
        numbers = re.findall(
            r"(?:k-NN|linear|top-1) (\d+\.\d)", header((SHIPPED / f"{name}.yaml").read_text()).published
        )
        if not name.startswith(("pretrain/", "continue/", "debug/")):
            row = re.search(rf"`{name}`(?: \||,| \()? ?((?:\d+\.\d(?: / )?)*)", text)
            assert re.findall(r"\d+\.\d", row[1]) == numbers, f"{name}: {row[0]} and {numbers}"


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 100


def test_the_tour_has_short_paths():
    """At most six stops per path; AttMask from recipe to loss in at most five files and 650 lines."""
    paths = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8").split("\n## ")[1:]
    stops = [re.findall(r"^\| \d \| \[`[^`]+`\]\(\.\./([^)]+)\)", path, re.M) for path in paths]
    assert len(stops) == 3 and all(0 < len(files) <= 6 for files in stops)
    assert len(stops[0]) <= 5
    assert sum((ROOT / file).read_text(encoding="utf-8").count("\n") for file in stops[0]) <= 650
