"""What the directory of a run holds: the run that is asked for, or why it has to be run.

LABEL/seed-N/               the run directory, as train.py leaves it; of an evaluation without checkpoints
LABEL/seed-N.request.json   what is asked for: written by the sweep, read by the worker
LABEL/seed-N.started.json   what the directory holds: written by the worker before it starts
LABEL/seed-N.log            what the worker printed
LABEL/seed-N.lock           held while a worker is at it
"""

import csv
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cliplab.benchmark import metric_names
from cliplab.errors import UserError
from cliplab.results import read_results
from cliplab.run import RunDirectory
from cliplab.sweeps.identity import Identity, differences, identity_in

Columns = dict[str, NDArray[np.float64]]  # "rank" and metrics in percent -> by query [Q]
Ranks = dict[str, tuple[list[str], Columns]]  # benchmark -> names of the queries, columns of ranks/NAME.csv
CONTENT = ("metrics", "config", "versions", "data", "protocol", "seconds")  # of a results.json


ELSEWHERE = ("first.", "checkpoint", "files.")  # what a results.json does not tell of a run's identity


@dataclass(frozen=True)
class Held:
    """The results of a run, or the reason why it has none that count."""

    missing: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=dict)
    is_damaged: bool = False


def beside(directory: Path, ending: str) -> Path:
    """A file of the sweep beside a run directory."""
    return directory.with_name(f"{directory.name}.{ending}")


def holds(directory: Path, identity: Identity, evaluated: bool, keeps_checkpoint: bool) -> Held:
    """Compare a run directory with the identity that is asked for; `keeps_checkpoint`: others need its weights.

    A directory that was damaged by hand counts as not run, and its reason names the file.
    """
    run = RunDirectory(directory)
    started = read_json(beside(directory, "started.json"))
    if started is None:
        return Held("not run yet" if not directory.is_dir() else f"{directory} is not this sweep's")
    differing = differences(started, identity)
    if differing:
        return Held("differs in " + ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else ""))
    if not run.results.is_file():
        return Held("interrupted" if run.last.is_file() else "not finished")
    try:
        content = read_results(run.results)
        absent = [key for key in CONTENT if not isinstance(content.get(key), dict)]
        if absent:
            raise UserError(f"{run.results} has no {', '.join(absent)}")
        own = {key: value for key, value in identity.items() if not key.startswith(ELSEWHERE)}
        differing = differences(identity_in(content, evaluated), own)
        if differing:
            raise UserError(f"{run.results} differs in {', '.join(differing[:5])}")
        check_told(run.results, content)
        ranks = read_ranks(directory, content)
        if keeps_checkpoint:
            require_whole(run.best if run.best.is_file() else run.last)
    except (UserError, KeyError, TypeError, AttributeError) as error:
        return Held(f"damaged: {error}", is_damaged=True)
    return Held("", content, ranks)


def require_whole(checkpoint: Path) -> None:
    """Raise UserError for a checkpoint that is not there or was cut off: its table of contents is at its end."""
    if not zipfile.is_zipfile(checkpoint):
        raise UserError(f"{checkpoint} is missing or no checkpoint")


def check_told(path: Path, content: Mapping[str, Any]) -> None:
    """Raise UserError for what a table reads of a results.json and no run writes, as far as types tell."""
    for section in ("metrics", "seconds"):
        for key, value in content[section].items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{path}: {section}.{key} is {value!r}")
    if not isinstance(content["data"].get("stand_in_images"), bool):
        raise UserError(f"{path} does not tell data.stand_in_images")
    if not isinstance(content["protocol"].get("split"), str):
        raise UserError(f"{path} does not tell protocol.split")


def read_ranks(directory: Path, content: Mapping[str, Any]) -> Ranks:
    """ranks/NAME.csv of every benchmark. Raises UserError where they are not those of the metrics."""
    ranks: Ranks = {}
    protocol, metrics = content["protocol"], content["metrics"]
    recalls = metric_names(protocol["recall_at"]) if protocol["target"] == "hard" else []
    there = {path.stem for path in (directory / "ranks").glob("*.csv")}
    if there != content["data"]["benchmarks"].keys():
        named = ", ".join(content["data"]["benchmarks"]) or "none"
        raise UserError(f"{directory / 'ranks'} holds {', '.join(sorted(there)) or 'nothing'}, results.json {named}")
    for name, benchmark in content["data"]["benchmarks"].items():
        path = directory / "ranks" / f"{name}.csv"
        try:
            with path.open(newline="", encoding="utf-8") as file:
                lines = list(csv.DictReader(file))
            kinds = [key for key in lines[0] if key not in ("query", "ties")]
            columns = {kind: np.array([float(line[kind]) for line in lines]) for kind in kinds}
            ranks[name] = [line["query"] for line in lines], columns
            told = {k: per_query(columns, k) for k in dict.fromkeys((*recalls, *kinds)) if k != "rank"}
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"can't read {path}: {error}") from error
        if len(lines) != benchmark["queries"]:
            raise UserError(f"{path} has {len(lines)} queries, results.json {benchmark['queries']}")
        for kind, values in told.items():
            _require_equal(str(path), kind, float(values.mean()), metrics.get(f"test/{name}/{kind}"))
    for key in metrics:
        kind = key.removeprefix("test/mean/")
        try:
            means = [float(per_query(columns, kind).mean()) for _, columns in ranks.values() if kind != key]
        except KeyError:  # no mean over queries
            continue
        if means:
            _require_equal(str(directory / "ranks"), f"mean {kind}", sum(means) / len(means), metrics[key])
    return ranks


def _require_equal(source: str, kind: str, value: float, told: Any) -> None:
    if not isinstance(told, int | float) or abs(told - value) > 1e-6:
        raise UserError(f"{source} gives {kind} {value:.4f}, results.json {told}")


def per_query(columns: Columns, kind: str) -> NDArray[np.float64]:
    """A metric in percent by query [Q]: its own column, or R@K of the ranks; FashionIQ's Avg is that of R@10 and R@50.

    Raises KeyError for what neither tells.
    """
    if kind == "Avg" and kind not in columns:
        return (per_query(columns, "R@10") + per_query(columns, "R@50")) / 2
    if kind in columns or not kind.removeprefix("R@").isdigit():
        return columns[kind]
    return np.where(columns["rank"] <= int(kind.removeprefix("R@")), 100.0, 0.0)


def read_json(path: Path) -> dict[str, Any] | None:
    """A file of the sweep; None where there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
