"""Make a table from its runs: `bash launch/reproduce/attmask_table.sh --out FOLDER`, or `simpool_table.sh`.

Stages: pace (a few timed steps of every row, then the estimated hours), power (two seeds of every row; how many seeds
half a point needs is printed and written to FOLDER/power.json), runs (the other seeds), measures, table. The files
FOLDER/table.json, .md and .png are written at the end, and before it for what there is. The same command continues
after any end, also a kill; it exits with 75 where something is left. Nothing that is finished is done again.

Budget `cpu`: hours on two cores. `gpu`: one GPU, in calls of --seconds. `full`: the papers' recipes on ImageNet, for
those who have it (--gpus N, data.path=/data/imagenet); --dry-run lists the commands.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.reproduce.tables import attmask, simpool
from launch.reproduce.tables.plan import BUDGETS, Job, Setting, Story, chosen, jobs, tiny_words, unequal
from launch.reproduce.tables.runs import Clock, finished, side_by_side, train
from maskwise.engine.atomic_file import write_atomic
from maskwise.engine.run_lock import RunLock
from maskwise.errors import UserError
from maskwise.recipe.recipe import Recipe

STORIES = {"attmask": attmask.STORY, "simpool": simpool.STORY}
STAGES = ("pace", "power", "runs", "measures", "table")
UNFINISHED = 75  # exit status (EX_TEMPFAIL) where the same command has to be given again
PROCESSES = {"cpu": 2, "gpu": 4, "full": 1}


class Session:
    """A call of the command: what is planned, where it is written, and the time that is left."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.name, self.story, self.options = name, STORIES[name], options
        self.out: Path = options.out
        self.settings: dict[str, Setting] = settings_of(self.story, options)
        self.clock = Clock(options.seconds)
        self.planned: dict[str, list[Job]] = {
            key: jobs(key, setting, self.overrides(setting), options.scale) for key, setting in self.settings.items()
        }

    def overrides(self, setting: Setting) -> tuple[str, ...]:
        """Return the overrides of every run of a setting: where its images are, and those of the command line."""
        more = tiny_words(setting) if self.options.miniature else ()
        if setting.pack and not self.options.miniature and not self.options.dry_run:
            more = (*more, f"data.path={self.images(setting.pack)}")
        return (*more, *self.options.overrides)

    def images(self, pack: str) -> Path:
        """Return the folder of a pack, unpacked once."""
        from launch.reproduce.packs import unpack

        archive = self.options.packs / f"{pack}.tar.xz" if self.options.packs else None
        if archive is None or not archive.is_file():
            raise UserError(f"{pack}.tar.xz is not there: give --packs FOLDER that holds it, or leave out its settings")
        return unpack(archive, self.out)

    def run(self) -> int:
        """Go through the stages; returns the exit status."""
        if self.options.dry_run:
            return self.list_commands()
        if self.options.resume:
            from launch.reproduce.tables.writing import restore

            restored = restore(self.options.resume, self.planned, self.out)
            print(f"{restored} runs are taken from {self.options.resume}", flush=True)
        for stage in self.options.stages:
            left = getattr(self, f"do_{stage}")()
            if left:
                self.do_table()
                print(f"{stage}: {left} left; the same command goes on", flush=True)
                return UNFINISHED
        return 0

    def list_commands(self) -> int:
        """Read every recipe and print its command, and in what rows differ."""
        for name, planned in self.planned.items():
            print(f"# {self.settings[name].title}: {len(planned)} runs")
            recipes: dict[str, Recipe] = {}
            for job in planned:
                recipes.setdefault(job.row, job.read())
                print(shlex.join([*self.launcher(), *job.command(self.out)]))
            for key, values in unequal(recipes).items():
                print(f"# rows differ in {key}: {values}")
        return 0

    def launcher(self) -> list[str]:
        """Return the words before those of `maskwise`."""
        return ["torchrun", f"--nproc-per-node={self.options.gpus}", "-m", "maskwise"] if self.many else ["maskwise"]

    @property
    def many(self) -> bool:
        """Whether a run has several ranks."""
        return self.options.gpus > 1

    def left(self, setting: str, planned: list[Job]) -> list[Job]:
        """Return the runs that are not complete; of a setting that ended at its gate none."""
        from launch.reproduce.tables.results import collected, ended_at_gate

        if ended_at_gate(collected(self.planned, self.settings, self.out), setting, self.settings[setting]):
            return []
        return [job for job in planned if finished(job, self.out) is None]

    def train(self, planned: Mapping[str, list[Job]]) -> int:
        """Train what is not complete, the gates first; returns how many runs are unfinished."""
        gates = {
            name: [job for job in todo if job.row == self.settings[name].gate][:1] for name, todo in planned.items()
        }
        return self.train_all(gates) or self.train_all(planned)

    def train_all(self, planned: Mapping[str, list[Job]]) -> int:
        """Train these runs, side by side."""
        from launch.reproduce.tables.ranks import train_on_ranks

        todo = [job for name, jobs in planned.items() for job in self.left(name, jobs)]
        if self.many:
            return sum(not train_on_ranks(job, self.out, self.launcher(), self.clock) for job in todo)
        return self.work([(train, (job, self.out)) for job in todo])

    def work(self, tasks: list) -> int:
        """Do tasks side by side; returns how many are unfinished."""
        return side_by_side(tasks, self.options.processes, self.clock, self.options.threads)

    def do_pace(self) -> int:
        """Time a few steps of every row and print the estimated hours of what is left."""
        from launch.reproduce.tables.pace import hours_left, measure_pace, read_pace

        left = [job for name, planned in self.planned.items() for job in self.left(name, planned)]
        firsts = {(job.setting, job.row): job for job in left if read_pace(job, self.out) is None}
        if self.options.budget == "full":
            return 0
        unfinished = self.work([(measure_pace, (job, self.out)) for job in firsts.values()])
        if left and not unfinished:
            hours = hours_left(left, self.out, max(1, self.options.processes))
            print(
                f"{len(left)} runs are left, about {hours:.2g} hours of training without evaluations, "
                f"{self.options.processes} side by side"
            )
        return unfinished

    def do_power(self) -> int:
        """Train and evaluate two seeds of every row, and say how many half a point needs."""
        from launch.reproduce.tables.results import POWER_SEEDS, collected, power, power_text

        first = {
            name: [job for job in planned if job.seed in self.settings[name].seeds[:POWER_SEEDS]]
            for name, planned in self.planned.items()
        }
        unfinished = self.train(first)
        metrics = {
            name: (("top1",) if setting.metric == "top1" else ("knn",)) for name, setting in self.settings.items()
        }
        unfinished = unfinished or self.measure(first, metrics)
        if unfinished:
            return unfinished
        runs = collected(self.planned, self.settings, self.out)
        found = {name: power(runs, name, setting) for name, setting in self.settings.items()}
        write_atomic(self.out / "power.json", json.dumps(found, indent=1) + "\n")
        for name, one in found.items():
            if one:
                print(power_text(self.settings[name].title, one), flush=True)
        return 0

    def do_runs(self) -> int:
        """Train the other seeds."""
        return self.train(self.planned)

    def do_measures(self) -> int:
        """Evaluate every complete run."""
        return self.measure(self.planned, {name: setting.measures for name, setting in self.settings.items()})

    def measure(self, planned: Mapping[str, list[Job]], names: Mapping[str, tuple[str, ...]]) -> int:
        """Evaluate complete runs by the named measures; returns how many runs are unfinished."""
        from launch.reproduce.tables.measures import measure, missing

        shortened, tasks = self.options.budget != "full", []
        for name, jobs_ in planned.items():
            for job in jobs_:
                if finished(job, self.out) is not None and missing(job, self.out, names[name]):
                    tasks.append((measure, (job, self.out, names[name], shortened, self.options.boxes)))
        return self.work(tasks)

    def do_table(self) -> int:
        """Write table.json, table.md and table.png of what there is, and copy them to docs/results on request."""
        from launch.reproduce.tables.writing import write_table

        write_table(self.name, self.story.title, self.planned, self.settings, self.options)
        return 0


def settings_of(story: Story, options: argparse.Namespace) -> dict[str, Setting]:
    """Return the settings that were asked for. Raises UserError for a name that there is not."""
    there = story.settings[options.budget]
    rows = list(dict.fromkeys(row for setting in there.values() for row in setting.rows))
    for asked, known, what in ((options.settings, list(there), "setting"), (options.rows, rows, "row")):
        for name in asked or ():
            if name not in known:
                raise UserError(f"no {what} {name}; there are {', '.join(known)}")
    return chosen(there, options.settings, options.rows, options.seeds)


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    made = argparse.ArgumentParser(
        prog="launch.reproduce.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("story", choices=STORIES)
    made.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="changes to every run")
    made.add_argument("--budget", choices=BUDGETS, default="cpu")
    made.add_argument("--out", type=Path, required=True, help="folder of runs, evaluations and table")
    made.add_argument("--seconds", type=float, help="stop after that time, runs with a checkpoint")
    made.add_argument("--resume", type=Path, metavar="TABLE.json", help="a table whose runs are not done again")
    made.add_argument("--dry-run", action="store_true", help="read every recipe and print its command")
    made.add_argument("--settings", nargs="+", metavar="NAME", help="only these")
    made.add_argument("--rows", nargs="+", metavar="ROW", help="only these")
    made.add_argument("--seeds", type=int, help="number of seeds (default: as planned)")
    made.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=", ".join(STAGES))
    made.add_argument("--scale", type=float, default=1.0, help="times the epochs of every run (default: 1)")
    made.add_argument("--miniature", action="store_true", help="tiny runs, to see that everything works")
    made.add_argument("--packs", type=Path, help="folder of cifar10-jpeg.tar.xz")
    made.add_argument("--boxes", help="a data set with boxes for localization (full)")
    made.add_argument(
        "--processes", type=int, help="runs side by side (default: 2 on a CPU, 4 on a GPU); 0: in this process"
    )
    made.add_argument("--threads", type=int, default=1, help="of each run (default: 1)")
    made.add_argument("--gpus", type=int, default=1, help="ranks of each run (full)")
    made.add_argument("--publish", action="store_true", help="copy the table to docs/results")
    return made


def main(words: list[str] | None = None) -> int:
    """Run the command; a mistake is one line and status 2."""
    options = parser().parse_intermixed_args(words)
    options.processes = PROCESSES[options.budget] if options.processes is None else options.processes
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with RunLock(options.out) as lock:
            lock.acquire()
            return Session(options.story, options).run()
    except UserError as error:
        print(f"{options.story}_table.sh: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
