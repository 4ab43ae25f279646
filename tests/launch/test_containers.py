"""The container image and the pods of a PyTorchJob: files, manifest, and what launch/container/pod.sh starts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from maskwise.recipe.reading import read_recipe

ROOT = Path(__file__).resolve().parents[2]
CONTAINER = ROOT / "launch" / "container"
DOCKERFILE = (CONTAINER / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
JOB = yaml.safe_load((CONTAINER / "pytorchjob.yaml").read_text(encoding="utf-8"))
REPLICAS = JOB["spec"]["pytorchReplicaSpecs"]
PODS = [("Master", 0), ("Worker", 1)]

PYTHON = """#!/usr/bin/env bash
# torchrun with one rank, which ends at once or waits for a signal
if [[ "$*" == *distributed.rendezvous* ]]; then exit 0; fi
if [ "$1" = rank ]; then
    trap 'touch "$RUN/preempted"; exit 0' TERM
    touch "$RECORD.waiting"
    while true; do sleep 0.05; done
fi
printf '%s\\n' "$@" > "$RECORD"
env > "$RECORD.environment"
if [ -n "${WAITS:-}" ]; then "$0" rank & wait $!; fi
exit "${STATUS:-0}"
"""


def instructions(name):
    """The arguments of each instruction of the Dockerfile with this name."""
    return re.findall(rf"^{name} (.*)$", DOCKERFILE, re.M)


def test_image_holds_what_the_command_needs(tmp_path):
    """The copied files alone list the shipped recipes, by the command that the image starts."""
    context = re.findall(r"^!(.*)$", (CONTAINER / "Dockerfile.dockerignore").read_text(encoding="utf-8"), re.M)
    copied = []
    for arguments in instructions("COPY"):
        *sources, target = arguments.split()
        copied += sources
        for source in sources:
            place = tmp_path / target / (source if target == "./" else "")
            if (ROOT / source).is_dir():
                shutil.copytree(
                    ROOT / source, place, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
                )
            else:
                shutil.copy(ROOT / source, place)
    assert sorted(copied) == sorted(context)
    python, *words = json.loads(instructions("ENTRYPOINT")[0])
    assert python == "python"
    listed = subprocess.run(
        [sys.executable, *words, "list", "recipes"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "ssl")},
        capture_output=True,
        text=True,
    )
    assert listed.returncode == 0 and "attmask/100pct_hint" in listed.stdout, listed.stderr
    assert (tmp_path / "launch" / "container" / "pod.sh").is_file()


def test_image_installs_the_torch_of_the_launch_scripts():
    [torch] = [line for line in instructions("ARG") if line.startswith("TORCH=")]
    pair = torch.removeprefix("TORCH=").strip('"')
    assert f"${{MASKWISE_TORCH:-{pair}}}" in (ROOT / "launch" / "env.sh").read_text(encoding="utf-8")


def test_manifest():
    assert (JOB["apiVersion"], JOB["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert sorted(REPLICAS) == ["Master", "Worker"] and REPLICAS["Master"]["replicas"] == 1
    for replica in REPLICAS.values():
        pod = replica["template"]["spec"]
        [container] = pod["containers"]
        assert replica["restartPolicy"] == "ExitCode" and pod["terminationGracePeriodSeconds"] >= 600
        assert container["name"] == "pytorch" and container["ports"][0]["name"] == "pytorchjob-port"  # the operator's
        assert (ROOT / container["command"][1]).is_file()
        recipe, flag, out, *overrides = container["args"]
        assert flag == "--out" and read_recipe(recipe, *overrides, try_model=False)
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        assert out.startswith(f"{mounts['runs']}/") and f"data.path={mounts['images']}" in overrides


@pytest.fixture
def pod(tmp_path):
    """Start the command of a pod in the environment that the training operator makes; python is a stand-in."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    run = tmp_path / "run"
    run.mkdir()
    started = []

    def start(kind, number, **variables):
        [container] = REPLICAS[kind]["template"]["spec"]["containers"]
        given = {entry["name"]: entry.get("value", f"10.0.0.{number}") for entry in container["env"]}
        size = sum(replica["replicas"] for replica in REPLICAS.values())
        operator = {
            "MASTER_ADDR": f"{JOB['metadata']['name']}-master-0",
            "MASTER_PORT": "23456",
            "WORLD_SIZE": str(size * 8),
            "RANK": str(number),
            "PET_NNODES": str(size),
            "PET_NPROC_PER_NODE": "8",
            "PET_NODE_RANK": str(number),
            "PET_MASTER_ADDR": f"{JOB['metadata']['name']}-master-0",
            "PET_MASTER_PORT": "23456",
        }
        fixed = {"MASKWISE_PYTHON": str(python), "PROCESSES": "8", "RECORD": str(tmp_path / "record"), "RUN": str(run)}
        arguments = [str(run) if word.startswith("/runs/") else word for word in container["args"]]
        started.append(
            subprocess.Popen(
                [*container["command"], *arguments],
                cwd=ROOT,
                env={**os.environ, **given, **operator, **fixed, **variables},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind, number", PODS)
def test_torchrun_of_a_pod(pod, tmp_path, monkeypatch, kind, number):
    """torchrun's own reading of its command line and of the variables PET_*, which the operator sets too."""
    process = pod(kind, number)
    assert process.wait(60) == 0, process.stderr.read()
    command = (tmp_path / "record").read_text().splitlines()
    assert command[:2] == ["-m", "torch.distributed.run"]
    recorded = dict(
        line.partition("=")[::2] for line in (tmp_path / "record.environment").read_text().splitlines() if "=" in line
    )
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & recorded.keys()
    for name in [name for name in recorded if name.startswith("PET_")]:
        monkeypatch.setenv(name, recorded[name])
    from torch.distributed import run

    config, _, words = run.config_from_args(run.parse_args(command[2:]))
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 8)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "hint-master-0:29400")
    assert config.rdzv_configs["is_host"] == str(kind == "Master").lower()
    assert config.local_addr == {"Master": "hint-master-0", "Worker": "10.0.0.1"}[kind]
    assert words[words.index("train") + 1 :] == ["attmask/100pct_hint", "--out", f"{tmp_path}/run", "data.path=/images"]


@pytest.mark.parametrize("status", [0, 2])
def test_a_pod_ends_with_the_status_of_the_run(pod, status):
    process = pod("Master", 0, STATUS=str(status))
    assert process.wait(60) == status, process.stderr.read()


def test_a_pod_that_is_removed_saves_and_asks_for_a_restart(pod, tmp_path):
    process = pod("Worker", 1, WAITS="1")
    until = time.monotonic() + 300
    while not (tmp_path / "record.waiting").exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, process.stderr.read()  # at least 128: retried by restartPolicy ExitCode
    assert (tmp_path / "run" / "preempted").exists()


def test_a_pod_without_the_variables_of_the_operator_is_a_one_line_error(pod):
    process = pod("Worker", 1, MASTER_ADDR="")
    assert process.wait(60) == 2 and process.stderr.read().startswith("maskwise: usage, in a pod of a PyTorchJob")
