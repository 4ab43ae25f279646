"""Weights & Biases and MLflow: what they stored of a run in two starts, without network."""

import contextlib
import importlib.util
import json
import os
import re
import sqlite3
import struct
import subprocess
import sys

import numpy
import pytest
from PIL import Image

from maskwise.engine import loggers
from maskwise.engine.run_log import read_metrics
from runs.test_no_network import WATCH, own_network

LOOPBACK = "bind (('::1', 0),)"  # urllib3 looks whether there is IPv6 when it is imported

RUN = """
import sys
import maskwise
from maskwise.engine import trainer

class Stop(Exception):
    pass

def train(stop, *more):
    def step(self, *batch, **options):
        if self.step_index == stop:
            raise Stop
        return whole(self, *batch, **options)
    trainer.Trainer.step = step
    recipe = maskwise.read_recipe("debug/tiny", *sys.argv[2:], *more)
    try:
        maskwise.train(recipe, out=sys.argv[1])
    except Stop:
        pass

whole = trainer.Trainer.step
train(3)  # step 3 is done and logged, the last checkpoint is of step 2
train(None, "train.log_every=1", "evaluate.pictures_every=1")
"""
TINY = (
    *("data.count=16", "train.batch_size=4", "train.steps=4", "train.save_every=2", "train.log_every=1"),
    *("evaluate.knn_every=1", "evaluate.k=[3]", "evaluate.baselines=false", "optimizer.warmup_epochs=0"),
    *("teacher.warmup_temp_epochs=0", "optimizer.freeze_last_layer=0"),
)


def trained(folder, *words, **variables):
    """Train debug/tiny in two starts, in a process without network where the system allows it; returns its lines."""
    (folder / "sitecustomize.py").write_text(WATCH)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_", "HTTP"))
    }
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "WATCH_LOG": str(folder / "watched")}
    arguments = [*own_network(), sys.executable, "-c", RUN, "runs/mine", *TINY, *words]
    done = subprocess.run(
        arguments, cwd=folder, env={**environment, **variables}, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set((folder / "watched").read_text().splitlines()) <= {"watching", LOOPBACK}
    return done.stderr


def expected(folder):
    """{(name, step): value} of all numbers of a run, by its metrics.jsonl."""
    numbers = {}
    for record in read_metrics(folder / "metrics.jsonl"):
        kind = record.get("report", "train")
        values = {key: value for key, value in record.items() if key != "step"}
        for key, value in record.get("numbers", values).items():
            if loggers.is_number(value):
                numbers[f"{kind}/{key}", record["step"]] = value
    return numbers


TIMES = ("train/img_s", "train/data_wait", "train/seconds")


def untimed(rows):
    """Rows (name, step, value) as a dict; each name and step must occur once."""
    rows = [(name, step, value) for name, step, value in rows if name not in TIMES]
    assert len({row[:2] for row in rows}) == len(rows), "logged twice"
    return {(name, step): pytest.approx(value, rel=1e-12) for name, step, value in rows}


def needs(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.mark.slow
def test_mlflow_stores_one_run_for_both_starts(tmp_path):
    needs("mlflow")
    needs("sqlalchemy")
    lines = trained(tmp_path, "train.loggers=[mlflow]")
    assert "the run continues without this logger" not in lines
    run = tmp_path / "runs" / "mine"
    with contextlib.closing(sqlite3.connect(tmp_path / "runs" / "mlflow" / "mlflow.db")) as store:
        ((number, name, status),) = store.execute("select run_uuid, name, status from runs").fetchall()
        rows = store.execute("select key, step, value from metrics").fetchall()
        parameters = dict(store.execute("select key, value from params").fetchall())
    assert (name, status) == ("mine", "FINISHED")
    assert untimed(rows) == {key: value for key, value in expected(run).items() if key[0] not in TIMES}
    assert {("train/loss", 1), ("train/loss", 4), ("knn/top1", 4)} <= {row[:2] for row in rows}
    assert parameters["train.batch_size"] == "4" and parameters["masking.name"] == "attmask_hint"
    kept = tmp_path / "runs" / "mlflow" / "artifacts" / number / "artifacts"
    assert (kept / "recipe.yaml").read_bytes() == (run / "recipe.yaml").read_bytes()
    for folder in ("reports", "pictures"):
        files = sorted(path.name for path in (run / folder).iterdir())
        assert files and sorted(path.name for path in (kept / folder).iterdir()) == files
        assert all((kept / folder / name).read_bytes() == (run / folder / name).read_bytes() for name in files)
    assert not (run / "tensorboard").exists() and not (run / "wandb").exists()


def wandb_records(path):
    """Records of an offline file: LevelDB's log format, blocks of 32 KiB, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, part = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(part)
            yield record
            part = b""


@pytest.mark.slow
def test_wandb_stores_one_run_for_both_starts_offline(tmp_path):
    needs("wandb")
    lines = trained(tmp_path, "train.loggers=[tensorboard, wandb]")
    assert "the run continues without this logger" not in lines
    run = tmp_path / "runs" / "mine"
    folders = sorted(run.glob("wandb/offline-run-*"))
    identity = json.loads((run / "loggers.json").read_text())["wandb"]["id"]
    named = re.compile(rf"offline-run-\d{{8}}_\d{{6}}-{identity}(-\d+)?")  # a number where both start in one second
    assert len(folders) == 2 and all(named.fullmatch(folder.name) for folder in folders)
    rows, configs, codes, pictures = [], [], [], []
    for folder in folders:
        for record in wandb_records(folder / f"run-{identity}.wandb"):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                assert record.run.run_id == identity and record.run.project == "maskwise"
                configs.append({item.key: json.loads(item.value_json) for item in record.run.config.update})
            elif kind == "exit":
                codes.append(record.exit.exit_code)
            elif kind == "history":
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                step = int(items.pop("step"))
                values = {name: json.loads(value) for name, value in items.items() if not name.startswith("_")}
                pictures += [folder / "files" / value for name, value in values.items() if name.endswith(".path")]
                rows += [(name, step, value) for name, value in values.items() if not name.startswith("pictures/")]
    assert untimed(rows) == {key: value for key, value in expected(run).items() if key[0] not in TIMES}
    assert configs[0]["train"]["batch_size"] == 4 and codes == [1, 0]
    (drawn,) = (run / "pictures").iterdir()
    assert [numpy.array(Image.open(path)).tolist() for path in pictures] == [numpy.array(Image.open(drawn)).tolist()]
    files = folders[1] / "files"
    assert (files / "recipe.yaml").read_bytes() == (run / "recipe.yaml").read_bytes()
    assert (files / "reports" / "knn_step_00000004.json").read_bytes() == (
        run / "reports" / "knn_step_00000004.json"
    ).read_bytes()
    assert list((run / "tensorboard").iterdir())
