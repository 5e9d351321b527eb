"""Run what is missing, in an order in which every run finds what it needs; tell each start and end in a line."""

import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Protocol

from rich.console import Console
from rich.markup import escape

from cliplab import build
from cliplab.errors import UserError
from cliplab.ranges import metric_keys
from cliplab.registry import closest
from cliplab.results import write_json
from cliplab.run import checkpoint_of
from cliplab.sweeps.held import Held, beside, holds
from cliplab.sweeps.identity import Here, Identity, digest, mark_of
from cliplab.sweeps.local import Local
from cliplab.sweeps.plan import Plan, Run
from cliplab.sweeps.spec import Spec

log = logging.getLogger(__name__)
PAUSE = 0.2  # seconds between two looks at what is going on


class Executor(Protocol):
    """Where runs are run."""

    @property
    def free(self) -> int:
        """How many more may start."""
        ...

    def start(self, runs: Sequence[Run]) -> None:
        """Start the worker of each, whose request is written."""
        ...

    def ended(self) -> list[Run]:
        """Those whose worker is gone since the last call, done or not."""
        ...

    def stop(self) -> str:
        """Leave, and say how things stand."""
        ...


class Runner:
    """The state of all runs of a plan, and what brings it forward."""

    def __init__(self, plan: Plan, told: Console) -> None:
        self.plan, self.told = plan, told
        self._here = Here()
        self._kept = {id(need) for run in plan.runs for need in run.needs}
        self.held: dict[int, Held] = {}
        self.failures: dict[int, str] = {}  # by id(run): where a failed run says why
        for run in plan.runs:
            self.look(run)

    def look(self, run: Run) -> Held:
        """Read what the run's directory holds."""
        try:
            held = holds(run.directory, self.identity(run), run.evaluated, id(run) in self._kept)
        except UserError as error:
            raise UserError(f"{self.plan.spec.path}: {run.label}: {error}") from error
        self.held[id(run)] = held
        return held

    def identity(self, run: Run) -> Identity:
        """What is asked for: config, data, versions, and the same of the runs that it builds on."""
        found = self._here.identity_of(run.config, run.evaluated)
        if run.checkpoint is not None:
            found["checkpoint"] = run.checkpoint if run.needs else mark_of(checkpoint_of(run.checkpoint))
        model, teacher = run.config.model, run.config.teacher
        read = {"model.arch": model.arch, "model.weights": model.weights}
        read |= {} if run.evaluated else {"teacher.arch": teacher.arch, "teacher.weights": teacher.weights}
        for key, name in read.items():
            of_need = name is not None and any(Path(name).is_relative_to(need.directory) for need in run.needs)
            if name is not None and not of_need and Path(name).exists():
                found[f"files.{key}"] = mark_of(Path(name))
        for need in run.needs:
            # Its metrics too: made again, it may be another one where sums are not repeatable, as on a GPU.
            metrics = self.held[id(need)].results.get("metrics")
            found[f"first.{need.label}"] = digest({"identity": self.identity(need), "metrics": metrics})
        return found

    def missing(self) -> list[Run]:
        """The runs that are to be run."""
        return [run for run in self.plan.runs if self.held[id(run)].missing]

    def check(self) -> None:
        """All that can be said about the missing runs before one starts. Raises UserError."""
        seen: list[tuple[str, bool]] = []
        for run in self.missing():
            if (run.label, run.evaluated) in seen:
                continue
            seen.append((run.label, run.evaluated))
            try:
                to_come = [str(need.directory) for need in run.needs if self.held[id(need)].missing]
                dataset = build.check(run.config, not run.evaluated, run.checkpoint is not None, to_come)
            except UserError as error:
                raise UserError(f"{run.label}: {error}") from error
            if run in self.plan.first.values():
                continue
            protocol = build.build_protocol(run.config)
            benchmarks = [d for b in dataset.benchmarks(protocol, dataset.test_split) for d in b.directions]
            if any(b.blind for b in benchmarks):
                raise UserError(
                    f"{self.plan.spec.path}: {run.label}: the targets of data.name={run.config.data.name} "
                    f"data.split={run.config.data.split} are known to the test server alone, so there is nothing to "
                    "compare: use data.split=val, or eval.py for the files of the server"
                )
            names = metric_keys("test", benchmarks, protocol)
            names += [f"test/{b.name}/{kind}" for b in benchmarks for kind in ("median_rank", "mean_rank")]
            names += [f"test/{b.name}/mAP@10/{aspect}" for b in benchmarks for aspect in b.groups or {}]
            names += [f"test/{b.name}/mean_per_class" for b in benchmarks if protocol.hit == "class"]
            names += ["test/linear_probe/top1"] if run.config.linear_probe else []
            self._check_columns(run, names)
        self._here = Here()  # the check of a data set may have written its pictures

    def check_columns_of_done(self) -> None:
        """Raise UserError for a column that finished rows don't have."""
        for runs in self.plan.rows.values():
            for run in runs:
                if not self.held[id(run)].missing:
                    self._check_columns(run, list(self.held[id(run)].results["metrics"]))

    def _check_columns(self, run: Run, names: Sequence[str]) -> None:
        for title, metric in self.plan.spec.columns.items():
            if metric not in names:
                protocol = build.build_protocol(run.config).name
                raise UserError(
                    f"{self.plan.spec.path}: columns.{title}: the row '{run.label}' (protocol {protocol}) has no "
                    f"metric '{metric}': {closest(metric, names)}"
                )

    def run(self, executor: Executor) -> None:
        """Run all that is missing. Raises KeyboardInterrupt when it is interrupted, after the workers have stopped."""
        waiting = self.missing()
        started: dict[int, float] = {}
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            while waiting or started:
                starting = self._ready(waiting, executor.free)
                for run in starting:
                    waiting.remove(run)
                    started[id(run)] = time.monotonic()
                    self._request(run)
                    told = f"{self.held[id(run)].missing}; {len(waiting)} wait"
                    self._tell(f"[bold]start[/]  {escape(run.title)}  [dim]{escape(told)}[/]")
                if starting:
                    self._start(executor, starting, started)
                for run in executor.ended():
                    seconds = time.monotonic() - started.pop(id(run))
                    self._finish(run, f"{seconds:.0f} s; {len(waiting) + len(started)} left")
                time.sleep(PAUSE)
        except KeyboardInterrupt:
            self._tell(f"interrupted: {escape(executor.stop())}. Give the same command again to go on")
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    def _start(self, executor: Executor, runs: Sequence[Run], started: dict[int, float]) -> None:
        try:
            executor.start(runs)
        except OSError as error:
            for run in runs:
                del started[id(run)]
                self.failures[id(run)] = f"can't be started: {error}"
                self._tell(f"[red]failed[/] {escape(run.title)}  {escape(self.failures[id(run)])}")

    def _ready(self, waiting: list[Run], most: int) -> list[Run]:
        """At most `most` that may start; what needs a failed run fails, what turns out to hold is kept."""
        ready = []
        for run in list(waiting):
            failed = next((need for need in run.needs if id(need) in self.failures), None)
            if len(ready) >= most:
                break
            if failed is not None:
                self.failures[id(run)] = f"needs {failed.label}: {self.failures[id(failed)]}"
                waiting.remove(run)
            elif any(self.held[id(need)].missing for need in run.needs):
                continue
            elif run.needs and not self.look(run).missing:
                waiting.remove(run)
            else:
                ready.append(run)
        return ready

    def _request(self, run: Run) -> None:
        content = {
            "config": asdict(run.config),
            "identity": self.identity(run),
            "evaluated": run.evaluated,
            "checkpoint": run.checkpoint,
            "keeps_checkpoint": id(run) in self._kept,
        }
        write_json(beside(run.directory, "request.json"), content)

    def _finish(self, run: Run, rest: str) -> None:
        if not self.look(run).missing:
            self._tell(f"[green]done[/]   {escape(run.title)}  [dim]{rest}[/]")
            return
        self.failures[id(run)] = failure_of(run)
        self._tell(f"[red]failed[/] {escape(run.title)}  [dim]{rest}[/]  {escape(self.failures[id(run)])}")

    def _tell(self, text: str) -> None:
        self.told.print(text, highlight=False, soft_wrap=True)


def failure_of(run: Run) -> str:
    """The log of a run that did not end well, and the first line of its message, or else its last line."""
    path = beside(run.directory, "log")
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "no log"
    said = [line.strip() for line in reversed(lines) if line.strip()]
    message = next((line for line in said if line.startswith("error: ")), said[0] if said else "it says nothing")
    return f"{path}: {message[:300]}"


def executor_of(spec: Spec, plan: Plan) -> Executor:
    """The executor of a spec. Raises UserError where there is no such cluster."""
    if spec.executor == "local":
        return Local(spec.jobs)
    from cliplab.sweeps.slurm import Slurm  # imports submitit

    return Slurm(plan.runs[0].directory.parents[1] / ".slurm", spec.slurm)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
