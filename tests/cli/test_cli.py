"""The command line: every verb on one small run, and how fast and how quietly it starts."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import maskwise.api
from maskwise import cli
from maskwise.bench import BENCHES
from maskwise.cli.main import VERBS
from maskwise.errors import UserError
from maskwise.evaluation import EVALUATIONS
from maskwise.imaging import drawing
from maskwise.nn import Backbone, Encoder
from maskwise.nn.pooling.simple import GAP

SMALL = ["data.count=16", "train.epochs=1", "teacher.warmup_temp_epochs=1", "evaluate.limit_bank=null"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two steps, made through the command line."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert cli.main(["train", "debug/tiny", "--out", str(folder), *SMALL]) == 0
    return folder


@pytest.fixture
def main(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def of(*words):
        capsys.readouterr()
        status = cli.main([str(word) for word in words])
        return (status, *capsys.readouterr())

    return of


def test_help_takes_under_a_second_of_cpu_and_no_torch():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import sys; from maskwise.cli.main import main; main(['--help']); "
        "print([name for name in ('torch', 'timm', 'yaml') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert shown.splitlines()[-1] == "[]"
    assert all(f"  {verb} " in shown for verb in ("train", "evaluate", "look", "show", "export", "report"))


def test_version_and_help_of_every_command(main):
    assert main("--version") == (0, f"maskwise {maskwise.__version__}\n", "")
    for verb in VERBS:
        with pytest.raises(SystemExit) as left:
            main(verb, "--help")
        assert left.value.code == 0
    for name in BENCHES:  # `argparse` drops the defaults of positional arguments while it reads a mixed command line
        with pytest.raises(SystemExit) as left:
            main("bench", name, "--help")
        assert left.value.code == 0


def test_the_module_runs_as_a_program():
    shown = subprocess.run([sys.executable, "-m", "maskwise", "--version"], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, f"maskwise {maskwise.__version__}\n")


def test_train_writes_a_run_folder_and_the_same_command_reports_complete(run, main):
    assert {"recipe.yaml", "metrics.jsonl", "checkpoints", "reports"} <= {path.name for path in run.iterdir()}
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1] == 2
    before = (run / "metrics.jsonl").read_bytes()
    status, out, _ = main("train", "debug/tiny", "--out", run, *SMALL)
    assert (status, out) == (0, f"complete: 2 steps in {run}\n")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert main("train", run, "--out", run)[0] == 0  # a run folder is its own recipe


def test_evaluate(run, main, tmp_path):
    status, out, error = main("evaluate", "knn", run, "--out", "knn.json", "k=[1,5]", "pixels=true")
    assert (status, error) == (0, "")
    numbers = json.loads((tmp_path / "knn.json").read_text())["numbers"]
    assert {"pooled_top1_k1", "pooled_top1_k5", "patch_mean_top1_k5", "pixels_top1_k5"} <= set(numbers)
    assert f"{'pooled_top1_k5':<24} {numbers['pooled_top1_k5']:.2f}" in out.splitlines()
    assert out.splitlines()[-1] == "report: knn.json"


def test_evaluate_prints_what_differs_from_the_paper(run, main, tmp_path):
    status, out, error = main(
        "evaluate",
        "linear",
        run,
        "preset=attmask",
        "feature=cls2",
        "augment=false",
        "epochs=2",
        f"save={tmp_path / 'probe.safetensors'}",
    )
    assert (
        (status, error) == (0, "")
        and (tmp_path / "probe.safetensors").is_file()
        and json.loads((run / "reports" / "linear.json").read_text())["protocol"]["preset"] == "attmask"
    )
    lines = out.splitlines()
    assert (
        lines[0].startswith("top1 ")
        and "differs from attmask: epochs 2 instead of 100" in lines
        and "differs from attmask: feature cls2 instead of cls4" in lines
    )


@pytest.mark.parametrize(
    "words, line",
    [
        (["knm", "RUN"], f"no evaluation knm; did you mean `knn`?; there are {', '.join(EVALUATIONS)}"),
        (
            ["knn", "RUN", "kk=3"],
            "evaluate knn has no option kk; did you mean `k`?; it accepts train, test, light, k, temperature, feature, "
            "pixels, whitened_pixels, few_shot, batch_size, precision, cache",
        ),
        (["knn", "RUN", "k=1", "k=2"], "evaluate knn: k is given twice; keep one"),
        (["knn", "RUN", "fast"], "evaluate knn: `fast` is not key=value"),
        (["knn", "RUN", "temperature=warm"], "evaluate knn: temperature: expects a number, not `warm`"),
        (["knn", "RUN", "test=nowhere"], "data.path: nowhere does not exist; give the folder that holds the images"),
        (["knn"], "the following arguments are required: MODEL; see `maskwise evaluate --help`"),
    ],
)
def test_evaluate_errors_are_one_line(run, main, words, line):
    status, out, error = main("evaluate", *(run if word == "RUN" else word for word in words))
    assert (status, out, error) == (2, "", f"maskwise: {line}\n")


def test_an_image_next_to_class_folders_is_named(run, main, tmp_path):
    from PIL import Image

    for name in ("a/1.png", "a/2.png", "b/1.png", "preview.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "photos" / name)
    reason = "photos/preview.png lies beside the class folders, so they are not read as classes; move it"
    words = ("evaluate", "knn", run, "train=photos", "test=photos")
    assert main(*words) == (2, "", f"maskwise: evaluate knn: {reason}\n")
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "z.png")
    assert "photos/preview.png and 1 more lie beside the class folders" in main(*words)[2]


def test_look_draws_a_sheet(run, main, tmp_path):
    picture = next((run / "pictures").glob("*.png"))
    assert main("look", run, picture, picture, "--out", "sheet.png", "masking=attmask_low", "ratio=.3") == (
        0,
        "sheet: sheet.png\n",
        "",
    )
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    assert main("look", run, "masking=random") == (
        2,
        "",
        "maskwise: look: no image given; name at least one image file\n",
    )
    accepted = "masking, ratio, mass, blocks, beside, size, limit, point, json"
    assert (
        main("look", run, picture, "maskng=random")[2]
        == f"maskwise: look has no option maskng; did you mean `masking`?; it accepts {accepted}\n"
    )
    assert main("look", run, "gone.jpg") == (2, "", "maskwise: gone.jpg is not a file; give image files\n")


def test_look_draws_blocks_and_other_models_beside(run, main, tmp_path, monkeypatch):
    titles = []
    draw = drawing.sheet
    monkeypatch.setattr(drawing, "sheet", lambda rows, names, **options: titles.append(names) or draw(rows, names))
    picture = next((run / "pictures").glob("*.png"))
    words = ("look", run, picture, "--out", "sheet.png")
    assert main(*words, "blocks=true", f"beside=[{run}]", "mass=.6", "size=48") == (0, "sheet: sheet.png\n", "")
    blocks, name = ["block 1", "block 2"], Path(run).name  # the same run twice: named by its folder
    assert titles == [["image", *blocks, name, name]]
    assert main(*words, f"beside={run}")[0] == 0 and Image.open(tmp_path / "sheet.png").width > 200
    for option, text in (
        (("mass=2",), "look: mass is 2; it must be above 0 and at most 1, such as 0.6"),
        (("mass=.6", "masking=random"), "look: masking draws another sheet than mass, blocks and beside"),
        (("size=33", "mass=.6"), "images of 33x33 pixels do not divide into patches of"),
        (("size=wide",), "look: size is wide; it must be a number of pixels"),
    ):
        assert text in main(*words, *option)[2]


@pytest.mark.parametrize("masking", ["attmask_high", "none"])
def test_look_names_the_pooling_that_gives_no_attention(run, tmp_path, masking):
    picture = next((run / "pictures").glob("*.png"))
    model = Encoder(
        Backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1), GAP(8)
    )
    with pytest.raises(UserError) as error:
        maskwise.api.look(model, [picture], tmp_path / "sheet.png", masking=masking)
    assert str(error.value) == (
        "look: pooling gap gives no attention to draw or to mask by; masking=random or masking=block draws masks alone"
    )
    assert not (tmp_path / "sheet.png").exists()
    assert maskwise.api.look(model, [picture], tmp_path / "sheet.png", masking="random").is_file()


def test_export_round_trip(run, main, tmp_path):
    status, out, error = main("export", run, "--to", "exported")
    assert (
        status == 0 and out.splitlines()[-1] == "exported: exported" and "features 0.0e+00   attention 0.0e+00" in out
    )
    import torch

    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, again = (maskwise.load(str(folder)).eval()(images) for folder in (run, tmp_path / "exported"))
    assert torch.equal(first.pooled, again.pooled)


def test_report_measures_prints_and_draws(run, main):
    status, out, error = main("report", run, "--measure")
    assert (status, error) == (0, "")
    assert "trained teacher" in out and (run / "pictures" / "curves.png").is_file()
    assert out.splitlines()[-1] == f"page: {run / 'report.html'}"
    table = out[out.index("k-NN top-1, per cent") : out.index("\n\n")]
    assert table in (run / "report.html").read_text(encoding="utf-8"), "the page shows what was measured"


def test_show(run, main):
    status, out, error = main("show", "debug/tiny", "train.epochs=9")
    assert (status, error) == (0, "") and "  epochs: 9" in out and "# command line" in out
    assert main("show", run)[0] == 0


def test_only_rank_zero_prints(main, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main("--version") == (0, "", "")
    monkeypatch.setenv("WORLD_SIZE", "1")  # a variable of some other program: this process is alone
    assert main("--version") == (0, f"maskwise {maskwise.__version__}\n", "")


def test_closed_pipe_is_no_error(run):
    shown = subprocess.run(
        f"{sys.executable} -m maskwise show debug/tiny | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("# configs/debug/tiny.yaml, hash ")


def test_public_names_exist_and_export_is_a_function_and_a_package(run, tmp_path):
    names = {
        "load",
        "read_recipe",
        "train",
        "evaluate",
        "embed",
        "look",
        "Embedder",
        "export",
        "push_to_hub",
        "Encoder",
        "Backbone",
        "Features",
        "Tokens",
        "Pooled",
        "SimPool",
        "ProjectionHead",
        "DINO",
        "IBOT",
        "Report",
        "__version__",
    }
    assert set(maskwise.__all__) == names and names <= set(dir(maskwise))
    assert all(getattr(maskwise, name) is not None for name in names)
    import maskwise.export.load as layouts

    assert layouts.load is maskwise.load
    maskwise.export(maskwise.load(run), tmp_path / "there")
    assert (tmp_path / "there" / "config.json").is_file()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        maskwise.nothing  # noqa: B018
