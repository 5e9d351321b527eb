"""The runs of a plan -> rows of numbers: means, spreads, intervals, p values, published rows, what failed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from cliplab.build import build_dataset, build_protocol
from cliplab.published import PublishedRow, differing_fields
from cliplab.report import STAND_IN_NOTICE, published_metrics
from cliplab.sweeps.held import Held, beside
from cliplab.sweeps.plan import Plan, Run
from cliplab.sweeps.runner import Runner, failure_of
from cliplab.sweeps.significance import Hits, hits_of, interval, p_value, same_queries

ALPHA = 0.05
SETTING = ("data", "split", "protocol")


@dataclass(frozen=True)
class Cell:
    """A number of the table: the mean over seeds, in the units of results.json."""

    mean: float
    std: float | None = None  # over seeds, of a sample (n - 1); None for one seed
    low: float | None = None  # 95 % interval over queries
    high: float | None = None
    p: float | None = None  # of the difference to the baseline row
    is_best: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table. `foreign`: a published row under another protocol."""

    label: str
    kind: Literal["ours", "published", "foreign"]
    cells: Mapping[str, Cell]  # by title of the column
    seeds: int = 0
    fit_seconds: float | None = None  # mean of a run; None where nothing was trained
    note: str = ""
    setting: Mapping[str, str] = field(default_factory=dict)  # data, split, protocol


@dataclass(frozen=True)
class SweepTable:
    """What every output shows."""

    title: str
    columns: list[str]
    rows: list[Row]
    notes: list[str]
    varying: list[str]  # which of data, split and protocol differ among the rows


def make_table(plan: Plan, runner: Runner) -> SweepTable:
    """Collect what the runs of a plan have left."""
    done = {label: _done(runner, runs) for label, runs in plan.rows.items()}
    protocols = {label: _protocol(plan.rows[label][0], held) for label, held in done.items()}
    settings = {label: _setting(plan.rows[label][0], protocols[label]) for label in done}
    varying = [key for key in SETTING if len({s[key] for s in settings.values()}) > 1]
    base = done.get(plan.spec.baseline or "", [])
    rows: list[Row] = []
    for label, runs in plan.rows.items():
        row = _our_row(plan, runner, runs, done[label], [] if label == plan.spec.baseline else base)
        rows.append(replace(row, setting=settings[label]))
    best = _with_best(rows, plan.spec.columns)
    with_published: list[Row] = []
    for row in best:
        with_published.append(row)
        with_published += _published_rows(plan, row.label, done[row.label], protocols[row.label])
    title, notes = _title(plan, settings, varying), _notes(plan, runner, done, best)
    return SweepTable(title, list(plan.spec.columns), with_published, notes, varying)


def _done(runner: Runner, runs: Sequence[Run]) -> list[Held]:
    return [held for run in runs if not (held := runner.held[id(run)]).missing]


def _protocol(run: Run, held: Sequence[Held]) -> Mapping[str, Any]:
    """The protocol with its split, as results.json has it; of a row without results, what it would be."""
    if held:
        return held[0].results["protocol"]
    return {**build_protocol(run.config).as_dict(), "split": build_dataset(run.config).test_split}


def _setting(run: Run, protocol: Mapping[str, Any]) -> dict[str, str]:
    return {"data": run.config.data.name, "split": protocol["split"], "protocol": protocol["name"]}


def _our_row(plan: Plan, runner: Runner, runs: Sequence[Run], held: Sequence[Held], base: Sequence[Held]) -> Row:
    cells = {title: _cell(metric, held, base) for title, metric in plan.spec.columns.items()} if held else {}
    seconds = [each.results["seconds"]["fit"] for each in held if "fit" in each.results["seconds"]]
    notes = [_state(runner, run) for run in runs if runner.held[id(run)].missing]
    mean = float(np.mean(seconds)) if seconds else None
    return Row(runs[0].label, "ours", cells, len(held), mean, "; ".join(notes))


def _state(runner: Runner, run: Run) -> str:
    """Why a run has no numbers."""
    failure = runner.failures.get(id(run))
    reason = runner.held[id(run)].missing
    if failure is None and beside(run.directory, "log").is_file() and reason in ("not finished", "interrupted"):
        return f"seed {run.config.seed} {reason}: {failure_of(run)}"
    return f"seed {run.config.seed} " + (f"FAILED: {failure}" if failure is not None else reason)


def _cell(metric: str, held: Sequence[Held], base: Sequence[Held]) -> Cell:
    values = [each.results["metrics"][metric] for each in held]
    cell = Cell(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)
    hits = _hits(metric, held)
    if hits is None:
        return cell
    low, high = interval(hits)
    other = _hits(metric, base) if base and same_queries([h.ranks for h in held], [h.ranks for h in base]) else None
    return replace(cell, low=low, high=high, p=p_value(hits, other) if other is not None else None)


def _hits(metric: str, held: Sequence[Held]) -> Hits | None:
    if any(metric not in each.results["metrics"] for each in held):
        return None
    return hits_of(metric, [each.ranks for each in held], [each.results["metrics"][metric] for each in held])


def _with_best(rows: Sequence[Row], columns: Mapping[str, str]) -> list[Row]:
    """Mark the best mean of each column among the rows of one protocol, where there are several; the least of ranks."""
    marked = []
    for row in rows:
        rivals = [other for other in rows if other.setting == row.setting and other.cells]
        cells = {}
        for title, cell in row.cells.items():
            best = (min if columns[title].endswith("_rank") else max)(rival.cells[title].mean for rival in rivals)
            cells[title] = replace(cell, is_best=len(rivals) > 1 and cell.mean == best)
        marked.append(replace(row, cells=cells))
    return marked


def _published_rows(plan: Plan, label: str, held: Sequence[Held], protocol: Mapping[str, Any]) -> list[Row]:
    """The published rows below one of ours; beside stand-in pictures nothing is comparable."""
    if held and held[0].results["data"]["stand_in_images"]:
        return []
    ours = list(held[0].results["metrics"]) if held else list(plan.spec.columns.values())
    return [_published_row(plan, row, protocol, ours) for row in plan.published.get(label, [])]


def _published_row(plan: Plan, row: PublishedRow, protocol: Mapping[str, Any], ours: Sequence[str]) -> Row:
    differing = [f"split={row.split}"] if row.split != protocol["split"] else []
    differing += [f"{name}={row.protocol[name]}" for name in differing_fields(row, protocol)]
    known = [name for name, value in row.protocol.items() if value is not None and name != "label"]
    if not known:
        differing.append("protocol unknown")
    metrics = published_metrics(row, ours)
    cells = {title: Cell(metrics[key]) for title, key in plan.spec.columns.items() if key in metrics}
    note = f"published{f', {row.year}' if row.year else ''}, {row.confidence}"
    note += f"; another protocol: {', '.join(differing)}" if differing else ""
    return Row(f"{row.method} [{row.backbone}]", "foreign" if differing else "published", cells, note=note)


def _title(plan: Plan, settings: Mapping[str, Mapping[str, str]], varying: Sequence[str]) -> str:
    first = next(iter(settings.values()))
    fixed = [f"{key} {first[key]}" for key in SETTING if key not in varying]
    seeds = ", ".join(map(str, dict.fromkeys(run.config.seed for runs in plan.rows.values() for run in runs)))
    return f"{plan.spec.name}: {', '.join([*fixed, f'seeds {seeds}'])} (recalls in %)"


def _notes(plan: Plan, runner: Runner, done: Mapping[str, Sequence[Held]], rows: Sequence[Row]) -> list[str]:
    notes = ["± is the standard deviation over seeds; brackets: 95 % bootstrap interval of the mean, over queries"]
    if plan.spec.baseline is not None:
        notes.append(
            f"† differs from {plan.spec.baseline}: p < {ALPHA} in a paired bootstrap over queries, hits averaged over "
            "seeds; not corrected for the number of comparisons"
        )
        others = [row.label for row in rows if row.label != plan.spec.baseline and _is_unpaired(row)]
        if others and done[plan.spec.baseline]:
            notes.append(f"not compared with {plan.spec.baseline}, as their queries are others: {', '.join(others)}")
    finished = _done(runner, list(plan.first.values()))
    results = [held for each in done.values() for held in each]
    total = sum(held.results["seconds"].get("fit", 0.0) for held in [*finished, *results])
    for name, run in plan.first.items():
        held = runner.held[id(run)]
        spent = f"{held.results['seconds'].get('fit', 0.0):.0f} s" if not held.missing else _state(runner, run)
        notes.append(f"{name}, once before the rows: {spent}")
    notes.append(f"training of all runs together: {total:.0f} s; of a continued run, the part since it was continued")
    commits = sorted({str(held.results.get("commit")) for held in results})
    if len(commits) > 1:
        notes.append(f"the rows were run at different commits of the code: {', '.join(commits)}")
    if any(held.results["data"]["stand_in_images"] for held in results):
        notes.append(STAND_IN_NOTICE)
    return notes


def _is_unpaired(row: Row) -> bool:
    """Whether a row has intervals and no p."""
    return any(cell.low is not None for cell in row.cells.values()) and all(c.p is None for c in row.cells.values())
