"""A wheel installed away from the checkout runs the verbs of the command line: nothing is read from the repository."""

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("train.steps=2", "train.epochs=1", "data.count=16", "evaluate.knn_every=0")
WARMUPS = ("optimizer.warmup_epochs=0", "teacher.warmup_temp_epochs=0")


@pytest.fixture(scope="module")
def maskwise(tmp_path_factory):
    """Build and install the wheel next to the installed dependencies; return a function that runs the command."""
    folder = tmp_path_factory.mktemp("wheel")
    source, venv_folder, work = folder / "source", folder / "venv", folder / "work"
    skipped = shutil.ignore_patterns("*.egg-info", "__pycache__")
    work.mkdir()
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("ssl", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skipped)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    [wheel] = folder.glob("maskwise-*.whl")
    venv.create(venv_folder, with_pip=False)
    python = venv_folder / "bin" / "python"
    find = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = Path(subprocess.run([python, "-c", find], capture_output=True, text=True, check=True).stdout.strip())
    install = [*pip, "install", "--no-deps", "--no-index", "--target", packages, wheel]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(work)}

    def run(*words):
        command = [str(python), "-m", "maskwise", *map(str, words)]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    where = [str(python), "-c", "import maskwise; print(maskwise.__file__)"]
    imported = subprocess.run(where, cwd=work, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(imported.strip()).is_relative_to(packages), imported
    return run


@pytest.mark.slow
def test_tables_and_recipes(maskwise):
    assert "attmask_hint" in maskwise("list", "maskings") and "debug/tiny" in maskwise("list", "recipes")
    assert "  epochs: " in maskwise("show", "debug/tiny")


@pytest.mark.slow
def test_train_evaluate_export(maskwise):
    assert "complete: 2 steps in run" in maskwise("train", "debug/tiny", "--out", "run", *STEPS, *WARMUPS)
    assert "pooled_top1" in maskwise("evaluate", "knn", "run", "k=[1]")
    assert "exported: exported" in maskwise("export", "run", "--to", "exported")


@pytest.mark.slow
def test_benchmarks(maskwise, tmp_path):
    for i in range(8):
        Image.effect_noise((80, 60), 50.0).convert("RGB").save(tmp_path / f"{i}.jpg")
    short = ("--blocks", "1", "--batch", "4")
    step = maskwise("bench", "step", "debug/tiny", *short, "--threads", "1", "--repeats", "2")
    assert "AttMask alone" in step and "x the speed of reference" in step
    images = ("--images", tmp_path, "--workers", "1", "--seconds", "0.1")
    assert "x Pillow in img/s" in maskwise("bench", "data", "debug/tiny", *short, *images)
