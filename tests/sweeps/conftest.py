"""A finished sweep on the small wardrobe, and an executor of this process: a run takes seconds, without imports."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cliplab.errors import UserError
from cliplab.report import console
from cliplab.sweeps import worker
from cliplab.sweeps.held import beside
from cliplab.sweeps.plan import Plan, Run, make_plan
from cliplab.sweeps.runner import Runner
from cliplab.sweeps.spec import load_spec
from cliplab.sweeps.table import SweepTable, make_table

ROWS = """
config: {config}
seeds: [0, 1]
overrides: {{trainer.max_epochs: 1}}
runs:
  combiner: {{}}
  tirg: {{model.composer: tirg}}
  image: {{model.composer: image_only}}
evaluate: [image]
columns: {{R@10: test/mean/R@10, dress R@10: test/dress/R@10}}
baseline: image
"""
ALL = ["combiner, seed 0", "combiner, seed 1", "tirg, seed 0", "tirg, seed 1", "image, seed 0"]


@dataclass
class InProcess:
    """An executor that has run what it starts when it returns."""

    free: int = 1
    started: list[str] = field(default_factory=list)
    _over: list[Run] = field(default_factory=list)

    def start(self, runs: Sequence[Run]) -> None:
        for run in runs:
            self.started.append(run.title)
            try:
                worker.main([str(beside(run.directory, "request.json"))])
            except UserError as error:
                beside(run.directory, "log").write_text(f"error: {error}\n")
            self._over.append(run)

    def ended(self) -> list[Run]:
        over, self._over = self._over, []
        return over

    def stop(self) -> str:
        return "stopped"


@dataclass
class Swept:
    plan: Plan
    runner: Runner
    started: list[str]

    @property
    def table(self) -> SweepTable:
        return make_table(self.plan, self.runner)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        return {run.title: self.runner.held[id(run)].results["metrics"] for run in self.plan.runs}


def sweep_here(path: Path, *arguments: str) -> Swept:
    """What sweep.py does, in this process."""
    plan = make_plan(load_spec(path, arguments))
    runner, executor = Runner(plan, console(stderr=True)), InProcess()
    runner.check_columns_of_done()
    runner.check()
    runner.run(executor)
    return Swept(plan, runner, executor.started)


@pytest.fixture(scope="session")
def finished(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(experiment file, output_dir) of a finished sweep: not to be changed."""
    folder = tmp_path_factory.mktemp("sweep")
    path = folder / "rows.yaml"
    path.write_text(ROWS.format(config=tiny_config))
    swept = sweep_here(path, f"output_dir={folder / 'out'}")
    assert swept.started == ALL and not swept.runner.failures
    return path, folder / "out"


@pytest.fixture
def copied(finished: tuple[Path, Path], tmp_path: Path) -> Callable[..., Swept]:
    """Call the sweep on a copy of the finished one, also with another text of the file."""
    path, output = finished
    shutil.copytree(output, tmp_path / "out")

    def again(*arguments: str, text: str | None = None) -> Swept:
        mine = tmp_path / path.name
        mine.write_text(text or path.read_text())
        return sweep_here(mine, f"output_dir={tmp_path / 'out'}", *arguments)

    return again
