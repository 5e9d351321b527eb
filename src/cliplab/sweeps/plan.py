"""A spec -> runs with their whole configs. What can be wrong with rows is found here, before anything runs."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cliplab.build import build_protocol
from cliplab.config import Config, merge_config, read_yaml
from cliplab.data import DATASETS
from cliplab.errors import UserError
from cliplab.published import PublishedRow, load_published
from cliplab.registry import closest
from cliplab.run import checkpoint_of, read_checkpoint, run_directory
from cliplab.sweeps.identity import IDLE_KEYS, digest, numbers_of
from cliplab.sweeps.spec import Changes, Spec, folder_name, layers_of, rows_of

_PLACE = re.compile(r"\{(\w+)\}")  # {NAME} in a value


@dataclass(frozen=True)
class Run:
    """One training, or one evaluation, with its seed."""

    label: str
    config: Config
    evaluated: bool = False
    checkpoint: str | None = None  # what an evaluation measures; None = the weights of its config
    needs: tuple["Run", ...] = field(default=(), repr=False)

    @property
    def directory(self) -> Path:
        """OUTPUT_DIR/EXPERIMENT/LABEL/seed-N."""
        return run_directory(self.config).path

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.label}, seed {self.config.seed}"


@dataclass(frozen=True)
class Plan:
    """All runs of an experiment: `first` ones by name, rows by label, and the published rows below them."""

    spec: Spec
    first: dict[str, Run]
    rows: dict[str, list[Run]]
    published: dict[str, list[PublishedRow]]

    @property
    def runs(self) -> list[Run]:
        """In the order in which they are done."""
        return [*self.first.values(), *(run for runs in self.rows.values() for run in runs)]


def make_plan(spec: Spec) -> Plan:
    """Resolve every row. Raises UserError for a key, a type, a `{NAME}`, a method or a row that can't be meant."""
    first: dict[str, Run] = {}
    for name, changes in spec.first.items():
        with _naming(f"{spec.path}: first.{name}"):
            first[name] = _first_run(spec, name, changes or {}, first)
    rows: dict[str, list[Run]] = {}
    for label, changes in rows_of(spec).items():
        with _naming(_place(spec, label)):
            rows[label] = _row_runs(spec, label, changes, first)
    _require_change(spec, rows, first)
    return Plan(spec, first, rows, {label: _published(spec, rows, label) for label in spec.published})


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Put the place in the experiment's file before a message that does not name it."""
    try:
        yield
    except UserError as error:
        told = str(error)
        raise error if told.startswith(source.partition(":")[0]) else UserError(f"{source}: {told}") from error


def _place(spec: Spec, label: str) -> str:
    return f"{spec.path}: {f'runs.{label}' if label in spec.runs else label}"


def _first_run(spec: Spec, name: str, changes: Changes, first: Mapping[str, Run]) -> Run:
    source = f"{spec.path}: first.{name}"
    needs: dict[str, Run] = {}
    own = _placed({key: value for key, value in changes.items() if key != "config"}, first, needs, source)
    layers = [("command line", spec.typed), *layers_of(own, source)]
    config = _config(changes.get("config", spec.config), layers)
    return Run(name, _named(spec, name, config, config.seed), needs=tuple(needs.values()))


def _row_runs(spec: Spec, label: str, changes: Changes, first: Mapping[str, Run]) -> list[Run]:
    """A run per seed; one where nothing is drawn."""
    source = _place(spec, label)
    evaluated = spec.is_evaluated(label)
    needs: dict[str, Run] = {}
    checkpoint = _placed(spec.checkpoint_of(label), first, needs, f"{spec.path}: checkpoint")
    overrides = f"{spec.path}: overrides"
    layers = layers_of(_placed(spec.overrides, first, needs, overrides), overrides)
    if checkpoint is not None:  # its model stands for that of the base; what is typed wins, as in eval.py
        layers.append((checkpoint, {"model": _model_of(checkpoint, first)}))
    layers += [("command line", spec.typed), *layers_of(_placed(changes, first, needs, source), source)]
    config = _config(spec.config, layers)
    if checkpoint is not None:
        config.model.weights = None  # the checkpoint holds them
    seeds = spec.seeds[:1] if evaluated else spec.seeds
    return [
        Run(label, _named(spec, label, config, seed), evaluated, checkpoint, tuple(needs.values())) for seed in seeds
    ]


def _config(path: str, layers: Sequence[tuple[str, Changes]]) -> Config:
    if not Path(path).is_file():
        there = ", ".join(str(file) for file in sorted(Path("configs").glob("*.yaml"))) or "none in ./configs"
        raise UserError(f"no config file {path} (key config); configs here: {there}")
    config = merge_config([(path, read_yaml(Path(path))), *layers])
    build_protocol(config)  # raises UserError for a data set or a protocol that there is not
    return config


def _named(spec: Spec, label: str, config: Config, seed: int) -> Config:
    named = replace(copy.deepcopy(config), name=f"{spec.name}/{folder_name(label)}/seed-{seed}", seed=seed)
    run_directory(named)  # raises UserError for a name that leads elsewhere
    return named


def _placed(value: Any, first: Mapping[str, Run], needs: dict[str, Run], source: str) -> Any:
    """`{NAME}` -> the directory of that run, which is added to `needs`. Raises UserError for another name."""
    if isinstance(value, dict):
        return {key: _placed(item, first, needs, source) for key, item in value.items()}
    if isinstance(value, list):
        return [_placed(item, first, needs, source) for item in value]
    if not isinstance(value, str):
        return value
    for name in _PLACE.findall(value):
        if name not in first:
            hint = closest(name, first) if first else "there is no `first` run before it"
            raise UserError(f"{source}: '{value}' names no run of `first`: {hint}")
        needs[name] = first[name]
    return _PLACE.sub(lambda found: str(first[found[1]].directory), value)


def _model_of(checkpoint: str, first: Mapping[str, Run]) -> dict[str, Any]:
    """The model of a checkpoint: known beforehand where a `first` run leaves it."""
    for run in first.values():
        if Path(checkpoint).is_relative_to(run.directory):
            return asdict(run.config)["model"]
    return read_checkpoint(checkpoint_of(checkpoint))["hyper_parameters"]["config"]["model"]


def _require_change(spec: Spec, rows: Mapping[str, Sequence[Run]], first: Mapping[str, Run]) -> None:
    """Raise UserError for two rows that are the same run, and for a labelled row that is the base all the same.

    A grid may well hold the value of the base.
    """
    seen: dict[str, str] = {}  # by what a run is: its label
    bases: dict[tuple[bool, str | None], str] = {}  # by how a row is measured: what the base is
    for label, (run, *_) in rows.items():
        found = _digest(run)
        twin = seen.setdefault(found, label)
        if twin != label:
            raise UserError(f"{spec.path}: the rows '{twin}' and '{label}' are the same run: change or remove one")
        changes = {} if spec.grid else spec.runs[label]
        measured = spec.is_evaluated(label), spec.checkpoint_of(label)
        if changes and measured not in bases:
            bases[measured] = _digest(_row_runs(spec, label, {}, first)[0])
        if changes and found == bases[measured]:
            shown = ", ".join(f"{key}={value}" for key, value in changes.items())
            idle = all(key in IDLE_KEYS for key in changes)
            why = f"{shown} changes no number" if idle else f"the base has {shown} already"
            raise UserError(
                f"{spec.path}: the row '{label}' changes nothing: {why}; write `{label}: {{}}` for the base itself"
            )


def _digest(run: Run) -> str:
    numbers = numbers_of(run.config, run.evaluated)
    return digest({"numbers": numbers, "evaluated": run.evaluated, "checkpoint": run.checkpoint})


def _published(spec: Spec, rows: Mapping[str, Sequence[Run]], label: str) -> list[PublishedRow]:
    """The published rows of `METHOD` or `METHOD [BACKBONE]`. Raises UserError with the closest method."""
    data = rows[label][0].config.data.name
    known = load_published(DATASETS[data].benchmark_name)
    asked = spec.published[label]
    found = [row for row in known if asked in (row.method, f"{row.method} [{row.backbone}]")]
    if not found:
        names = {f"{row.method} [{row.backbone}]" if "[" in asked else row.method for row in known}
        hint = closest(str(asked), names) if names else f"nothing is published for data.name={data}"
        raise UserError(f"{spec.path}: published.{label} names no published method '{asked}': {hint}")
    return found
