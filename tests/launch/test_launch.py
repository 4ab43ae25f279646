"""The launch scripts: what they start, what they make of its end, and signals really sent."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE_PYTHON = """#!/usr/bin/env bash
if [[ "$*" == *distributed.rendezvous* ]]; then exit "${TAKEN:-0}"; fi
{ echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $PET_SHUTDOWN_TIMEOUT"
  echo "$*"; } >> "$RECORD"
if [[ "$*" == *torch.distributed.run* && -n "${WAITS:-}" ]]; then  # as torchrun: only one rank gets the signal
    trap 'echo "told itself" >> "$RECORD"' USR1 TERM
    "$0" rank &
    wait $!
    exit $?
fi
finish() { echo "signal $1" >> "$RECORD"; touch "$RUN/preempted"; exit "${TOLD:-0}"; }
trap "finish USR1" USR1
trap "finish TERM" TERM
mkdir -p "$RUN"
if [ -n "${PREEMPTED:-}" ]; then touch "$RUN/preempted"; fi
if [ -n "${WAITS:-}" ]; then
    touch "$RECORD.waiting$RANK"
    for ((i = 0; i < 600; i++)); do sleep 0.05; done
fi
exit "${STATUS:-0}"
"""
SRUN = """#!/usr/bin/env bash
# Two tasks on this machine; signals are handed to both, as srun does.
echo "$*" | head -n 1 >> "$RECORD.srun"
echo "cpus per task ${SRUN_CPUS_PER_TASK:-}" >> "$RECORD.srun"
while [[ "$1" == --* ]]; do shift; done
tasks=()
for task in $(seq 0 $(( SLURM_NTASKS - 1 ))); do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
trap 'kill -TERM "${tasks[@]}"' TERM
status=0
for task in "${tasks[@]}"; do
    while true; do
        wait "$task"; code=$?
        kill -0 "$task" 2>/dev/null || break
    done
    if [ "$code" -gt 128 ]; then wait "$task"; again=$?; [ "$again" -eq 127 ] || code=$again; fi
    [ "$code" -eq 0 ] || status=$code
done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >> "$RECORD.scontrol"
if [ "$1 $2" = "show hostnames" ]; then printf '127.0.0.1\\nother\\n'; fi
if [ "$1 $2 $3" = "--oneliner show job" ]; then
    echo "JobId=$4 JobState=${STATE:-RUNNING} Reason=${REASON:-None} Dependency=(null)"
fi
"""


@pytest.fixture
def stubs(tmp_path):
    """Fake python, srun and scontrol that record their arguments: (environment, run folder, record)."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"fakepython": FAKE_PYTHON, "srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    run, record = tmp_path / "run", tmp_path / "record"
    environment = {
        **{
            key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "PET_SHUTDOWN_TIMEOUT")
        },
        "PATH": f"{tools}:{os.environ['PATH']}",
        "MASKWISE_PYTHON": str(tools / "fakepython"),
        "RUN": str(run),
        "RECORD": str(record),
        "PROCESSES": "2",
        "HOST": "127.0.0.1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "70123",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "1",
    }
    return environment, run, record


@pytest.fixture
def launched():
    """Start a script on debug/tiny; what is still there after the test is ended."""
    started = []

    def start(script, environment, run, *words, bash="bash"):
        command = [bash, str(ROOT / "launch" / script), "debug/tiny", "--out", str(run), *words]
        started.append((subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True), run))
        return started[-1][0]

    yield start
    for job, run in started:
        job.kill()
        job.communicate()
        for process in processes_of(run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def appears(path, seconds=400):
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} does not appear"
        time.sleep(0.02)


SCRIPTS = ["torchrun.sh", "multinode.sh", "slurm.sbatch"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "end, expected, queued",
    [
        ({}, 0, False),
        ({"STATUS": "3"}, 3, False),
        ({"STATUS": "1", "PREEMPTED": "1"}, 0, True),
        ({"PREEMPTED": "1"}, 0, True),
    ],
    ids=["complete", "failed", "preempted, status 1", "preempted"],
)
def test_exit_status_and_preempted_file_of_each_outcome(stubs, launched, script, end, expected, queued):
    environment, run, record = stubs
    run.mkdir()
    (run / "preempted").write_text("of an earlier start")
    job = launched(script, {**environment, **end}, run, "seed=3")
    _, text = job.communicate(timeout=60)
    assert job.returncode == expected, text
    if script == "slurm.sbatch":
        asked = Path(f"{record}.scontrol").read_text().splitlines()
        requeued = ["--oneliner show job 70123", "requeue 70123"] if queued else []
        assert asked == ["show hostnames node[1-2]", *requeued]


def test_arguments_of_torchrun(stubs, launched):
    environment, run, record = stubs
    assert launched("torchrun.sh", environment, run, "seed=3").wait(60) == 0
    ranks, command = record.read_text().splitlines()
    assert ranks.split()[-1] == "600" and command == (
        "-m torch.distributed.run --standalone --nnodes 1 --nproc-per-node 2 --signals-to-handle "
        "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "
        f"-m maskwise train debug/tiny --out {run} seed=3"
    )


def test_command_and_environment_of_each_slurm_task(stubs, launched):
    environment, run, record = stubs
    assert launched("slurm.sbatch", environment, run, "seed=3").wait(60) == 0
    assert Path(f"{record}.srun").read_text().startswith("--kill-on-bad-exit=1 bash -c")
    recorded = record.read_text().splitlines()
    assert sorted(line for line in recorded if "127.0.0.1" in line) == [
        "0 2 0 2 127.0.0.1 30123 ",
        "1 2 1 2 127.0.0.1 30123 ",
    ]
    assert recorded.count(f"-m maskwise train debug/tiny --out {run} seed=3") == 2


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_forwarded_and_a_saved_run_succeeds(stubs, launched, script, number):
    environment, run, record = stubs
    job = launched(script, {**environment, "WAITS": "1", "TOLD": "1"}, run)
    for task in range(2 if script == "slurm.sbatch" else 1):
        appears(Path(f"{record}.waiting{task if script == 'slurm.sbatch' else ''}"))
    job.send_signal(number)
    _, text = job.communicate(timeout=60)
    assert job.returncode == 0, text
    assert "told itself" not in record.read_text()
    assert f"signal {'USR1' if number == signal.SIGUSR1 else 'TERM'}\n" in record.read_text()
    if script == "slurm.sbatch":
        assert "requeue 70123" in Path(f"{record}.scontrol").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_under_nohup_ignores_a_hangup(stubs, launched, script, tmp_path):
    environment, run, record = stubs
    nohup = tmp_path / "nohup_bash"
    nohup.write_text(f'#!/bin/sh\ntrap "" HUP\nexec {shutil.which("bash")} "$@"\n')
    nohup.chmod(0o755)
    job = launched(script, {**environment, "WAITS": "1"}, run, bash=str(nohup))
    for task in range(2 if script == "slurm.sbatch" else 1):
        appears(Path(f"{record}.waiting{task if script == 'slurm.sbatch' else ''}"))
    job.send_signal(signal.SIGHUP)
    job.send_signal(signal.SIGUSR1)
    _, text = job.communicate(timeout=60)
    assert job.returncode == 0, text
    assert "signal USR1" in record.read_text() and "signal TERM" not in record.read_text()


@pytest.mark.parametrize(
    "job, requeued",
    [
        ({"STATE": "RUNNING"}, ["requeue 70123"]),
        ({"STATE": "COMPLETING"}, []),  # canceled
        ({"STATE": "PENDING"}, []),  # requeued by somebody else
        ({"STATE": "COMPLETING", "REASON": "TimeLimit"}, ["requeue 70123"]),
        ({"SLURM_ARRAY_JOB_ID": "70123", "SLURM_ARRAY_TASK_ID": "2"}, ["requeue 70123_2"]),
        ({"SLURM_ARRAY_JOB_ID": "70122", "SLURM_ARRAY_TASK_ID": "1"}, ["requeue 70122_1"]),
    ],
)
def test_a_saved_run_requeues_its_own_job_unless_that_was_canceled(stubs, launched, job, requeued):
    environment, run, record = stubs
    assert launched("slurm.sbatch", {**environment, **job, "PREEMPTED": "1"}, run).wait(60) == 0
    asked = Path(f"{record}.scontrol").read_text().splitlines()
    assert [line for line in asked if line.startswith("requeue")] == requeued


def test_options_of_srun(stubs, launched):
    environment, run, record = stubs
    options = {"SRUN_OPTIONS": "--container-image=maskwise --cpu-bind=none", "SLURM_CPUS_PER_TASK": "10"}
    assert launched("slurm.sbatch", {**environment, **options}, run).wait(60) == 0
    command, cpus = Path(f"{record}.srun").read_text().splitlines()
    assert command.startswith("--kill-on-bad-exit=1 --container-image=maskwise --cpu-bind=none bash -c")
    assert cpus == "cpus per task 10"


def submit_lines(environment, run, file, text, task):
    """The end of a task of an array that trains the lines of a file."""
    file.write_text(text)
    array = {"SLURM_ARRAY_JOB_ID": "70123", "SLURM_ARRAY_TASK_ID": task} if task else {}
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sbatch"), f"@{file}", "seed=3"],
        env={**environment, **array},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_each_task_of_an_array_trains_its_line(stubs, tmp_path):
    environment, run, record = stubs
    text = f"debug/tiny --out {run}0\ndebug/tiny_supervised --out '{run} 1' 'evaluate.k=[1, 5]'\n"
    assert submit_lines(environment, run, tmp_path / "runs.txt", text, "2").returncode == 0
    assert record.read_text().count(f"train debug/tiny_supervised --out {run} 1 evaluate.k=[1, 5] seed=3\n") == 2


@pytest.mark.parametrize(
    "task, text, says",
    [
        ("3", "debug/tiny --out a\n", "line 3 of {file} is empty: --array=1-N takes lines 1 to N"),
        ("1", "debug/tiny\n", "usage: sbatch launch/slurm.sbatch RECIPE --out DIR [key=value ...]"),
        (
            "",
            "debug/tiny --out a\n",
            "usage: sbatch --array=1-N launch/slurm.sbatch @FILE [key=value ...], N lines of {file}",
        ),
    ],
    ids=["no such line", "no run folder", "no array"],
)
def test_lines_that_cannot_be_trained_are_a_one_line_error(stubs, tmp_path, task, text, says):
    environment, run, record = stubs
    file = tmp_path / "runs.txt"
    done = submit_lines(environment, run, file, text, task)
    assert (done.returncode, done.stderr) == (2, f"maskwise: {says.format(file=file)}\n")
    assert not record.exists()


def test_a_port_in_use_ends_the_script_before_torchrun(stubs, launched):
    environment, run, record = stubs
    assert launched("multinode.sh", {**environment, "TAKEN": "2"}, run).wait(60) == 2
    assert not record.exists()


def test_slurm_without_a_run_folder_is_a_one_line_error(stubs):
    environment = stubs[0]
    job = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sbatch"), "debug/tiny"], env=environment, capture_output=True, text=True
    )
    assert (job.returncode, job.stderr) == (
        2,
        "maskwise: usage: sbatch launch/slurm.sbatch RECIPE --out DIR [key=value ...]\n",
    )


def processes_of(folder) -> list[int]:
    """Processes whose command line names a folder."""
    pids = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in place.read_bytes():
                pids.append(int(place.parent.name))
    return pids


LONG = ("train.epochs=600", "evaluate.knn_every=0", "train.save_every=4", "teacher.warmup_temp_epochs=0")


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, number",
    [("torchrun.sh", signal.SIGUSR1), ("torchrun.sh", signal.SIGTERM), ("slurm.sbatch", signal.SIGUSR1)],
)
def test_two_ranks_stop_on_a_signal(stubs, launched, script, number):
    """Both ranks save the same step, the script succeeds, no process remains, and the same command continues."""
    environment, run, record = stubs
    environment |= {"MASKWISE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    job = launched(script, environment, run, *LONG)
    appears(run / "checkpoints" / "last")
    job.send_signal(number)
    _, text = job.communicate(timeout=400)
    assert job.returncode == 0, text
    step = int((run / "preempted").read_text())
    assert (run / "checkpoints" / "last").read_text().strip() == f"step_{step:08d}" and "Traceback" not in text
    assert f"interrupted: saved after step {step} of 4800; the same command continues" in text
    until = time.monotonic() + 60
    while processes_of(run) and time.monotonic() < until:
        time.sleep(0.05)
    assert not processes_of(run)
    if script == "slurm.sbatch":
        assert Path(f"{record}.scontrol").read_text().splitlines()[-1] == "requeue 70123"
        again = launched(script, environment, run, *LONG)
        appears(run / "checkpoints" / f"step_{step - step % 4 + 4:08d}")
        assert not (run / "preempted").exists()
        again.send_signal(number)
        assert again.wait(400) == 0 and int((run / "preempted").read_text()) > step


OTHER_PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$RECORD"
case "$*" in
    *version_info*) case "$*" in *%d.%d*) echo 3.99 ;; esac ;;
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-c from importlib.metadata import version; version("*) exit 1 ;;  # no torch yet
esac
"""


def test_another_python_and_torch_get_a_separate_environment(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python3.99"
    python.write_text(OTHER_PYTHON)
    python.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MASKWISE")} | {
        "RECORD": str(tmp_path / "record")
    }
    script = ["bash", str(tmp_path / "launch" / "versions.sh")]
    done = subprocess.run(
        [*script, str(python), "9.8.7", "-k", "nothing"], env=environment, capture_output=True, text=True
    )
    recorded = (tmp_path / "record").read_text()
    assert done.returncode == 0, done.stderr
    assert f"-m venv {tmp_path}/.venv-3.99-torch9.8.7\n" in recorded and "install -qq torch==9.8.7\n" in recorded
    assert recorded.splitlines()[-1] == "-m pytest -q -m not slow and not long and not gpu -k nothing"
    refused = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "INTERPRETER TORCH" in refused.stderr
