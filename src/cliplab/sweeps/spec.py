"""An experiment file, as it was written: base config, rows, seeds, columns. Every key and type is checked here.

config: FILE                        the base: one of configs/
seeds: [0, 1, 2]                    of every row that trains; a row that is evaluated alone runs once, nothing is drawn
overrides: {key: value}             changes of the base, for all rows
runs: {LABEL: {key: value}}         rows; {} is the base itself
grid: {key: [values]}               every combination is a row, or, beside `runs`, every combination for each of them
first: {NAME: {config: FILE, key: value}}    runs that come before the rows; `{NAME}` in a value is that run's directory
evaluate: true | [LABELS]           rows that are measured and not trained
checkpoint: "{NAME}" | {LABEL: "{NAME}"}    what those measure, with its own `model`; without it that of their config
columns: {TITLE: metric}            metrics of results.json
baseline: LABEL                     the row that others are compared with
published: {LABEL: METHOD}          what is printed below a row, `METHOD` or `METHOD [BACKBONE]`
jobs: 1                             runs at once on this machine
slurm: {timeout_min: 60, ...}       options of submitit
"""

import hashlib
import itertools
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cliplab.config import read_overrides, read_yaml
from cliplab.errors import UserError
from cliplab.registry import closest, fits

Changes = dict[str, Any]
LONGEST = 150  # bytes of a folder's name
OWN_KEYS = ("name", "seed", "resume")  # of a run's config: the sweep sets them


@dataclass(frozen=True)
class Spec:
    """The content of an experiment file and of the command line."""

    path: Path
    config: str
    columns: dict[str, str]
    seeds: list[int] = field(default_factory=lambda: [0])
    runs: dict[str, Changes] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    baseline: str | None = None
    published: dict[str, str] = field(default_factory=dict)
    first: dict[str, Changes] = field(default_factory=dict)
    overrides: Changes = field(default_factory=dict)
    evaluate: bool | list[str] = False
    checkpoint: str | dict[str, str] | None = None
    slurm: dict[str, Any] = field(default_factory=dict)
    jobs: int = 1
    output: Literal["terminal", "markdown", "latex", "csv", "html"] = "terminal"
    executor: Literal["local", "slurm"] = "local"
    run: bool = True  # false: the table of what is there
    typed: Changes = field(default_factory=dict)  # config keys of the command line: for all runs, `first` ones too

    @property
    def name(self) -> str:
        """The folder of the experiment below output_dir."""
        return self.path.stem

    def is_evaluated(self, label: str) -> bool:
        """Whether a row is measured and not trained."""
        return self.evaluate if isinstance(self.evaluate, bool) else label in self.evaluate

    def checkpoint_of(self, label: str) -> str | None:
        """What an evaluated row measures, as written; None = the weights of its config, or a row that trains."""
        if not self.is_evaluated(label):
            return None
        return self.checkpoint.get(label) if isinstance(self.checkpoint, dict) else self.checkpoint


def load_spec(path: str | Path, arguments: Sequence[str] = ()) -> Spec:
    """Read an experiment file and `key=value`: the keys above, or config keys for all runs. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        there = ", ".join(str(file) for file in sorted(Path("experiments").glob("*.yaml"))) or "none"
        raise UserError(f"no experiment file {path}; experiments here: {there}")
    content = {str(key): value for key, value in read_yaml(path).items()}
    own = {item.name for item in fields(Spec)} - {"path", "typed"}
    options = [argument for argument in arguments if re.split("[.=]", argument)[0] in own and "=" in argument]
    typed = read_overrides([argument for argument in arguments if argument not in options])
    _refuse_own_keys("command line", typed)
    for option in options:
        _set(content, option)
    _check_types(path, content)
    spec = Spec(path=path, typed=typed, **content)
    _check_content(spec)
    return spec


def rows_of(spec: Spec) -> dict[str, Changes]:
    """Label -> what the row changes: the labelled rows, each at every point of the grid if there is one."""
    if not spec.grid:
        return {label: dict(changes or {}) for label, changes in spec.runs.items()}
    last = [key.rpartition(".")[2] if not key.endswith(".name") else key.split(".")[-2] for key in spec.grid]
    short = last if len(set(last)) == len(last) else list(spec.grid)
    rows: dict[str, Changes] = {}
    for label, changes in (spec.runs or {"": {}}).items():
        for values in itertools.product(*spec.grid.values()):
            point = ", ".join(f"{key}={_shown(value)}" for key, value in zip(short, values, strict=True))
            row = {**(changes or {}), **dict(zip(spec.grid, values, strict=True))}
            if rows.setdefault(f"{label}, {point}" if label else point, row) is not row:
                raise UserError(f"{spec.path}: grid: two rows would have the label '{point}': a value is there twice")
    return rows


def layers_of(changes: Mapping[str, Any], source: str) -> list[tuple[str, Changes]]:
    """`{optim.lr: 1e-4}` -> layers for merge_config, in which a part's name stands before its options."""
    layers = []
    for key in sorted(changes, key=lambda key: (key.count("."), not key.endswith(".name"))):
        value = changes[key]
        for part in reversed(key.split(".")):
            value = {part: value}
        layers.append((source, value))
    return layers


def _set(content: dict[str, Any], option: str) -> None:
    """One `key=value` of the command line: a key of the sweep, a key within it, or a config key of one of its rows."""
    place = option.partition("=")[0]
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value{option[len(place) :]}"]))["value"]  # pyright: ignore
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"can't read {option}: {error}") from error
    key, _, rest = place.partition(".")
    table = content.get(key)
    if not rest:
        content[key] = {**table, **value} if isinstance(table, dict) and isinstance(value, dict) else value
        return
    content[key] = table = dict(table) if isinstance(table, dict) else {}
    if key not in ("first", "runs"):
        table[rest] = value
        return
    known = [label for label in map(str, table) if rest == label or rest.startswith(f"{label}.")]
    label = max(known, key=len, default=rest.partition(".")[0])  # a label may have dots
    changed = rest[len(label) + 1 :]
    if changed and label not in table:
        raise UserError(f"{option}: {key} has no '{label}': {closest(label, table)}; a new one: {key}.{label}={{}}")
    old = table.get(label)
    table[label] = {**(old if isinstance(old, dict) else {}), changed: value} if changed else value


def _check_types(path: Path, content: Mapping[str, Any]) -> None:
    hints = {key: hint for key, hint in typing.get_type_hints(Spec).items() if key not in ("path", "typed")}
    for key, value in content.items():
        if key not in hints:
            raise UserError(f"{path}: unknown key '{key}': {closest(key, hints)}")
        _require_names(f"{path}: {key}", value)
        hint = dict if typing.get_origin(hints[key]) is dict else hints[key]  # what is in it is checked apart
        if not fits(value, hint):
            raise UserError(f"{path}: key '{key}' must be {_words(hints[key])}, got {value!r}")
    for key in ("config", "columns"):
        if not content.get(key):
            raise UserError(f"{path}: the key '{key}' is missing; needed are config, columns, and runs or grid")


def _require_names(source: str, value: Any) -> None:
    """Raise UserError for a key that YAML reads as something else than a name: 1, on, null."""
    for name, item in value.items() if isinstance(value, dict) else ():
        if not isinstance(name, str):
            raise UserError(f"{source}: put the name {name!r} in quotes")
        _require_names(f"{source}.{name}", item)


def _check_content(spec: Spec) -> None:
    path = spec.path
    if not spec.runs and not spec.grid:
        raise UserError(f"{path}: there are no rows: write runs: {{LABEL: {{key: value}}}} or grid: {{key: [values]}}")
    if not spec.seeds or len(set(spec.seeds)) < len(spec.seeds):
        raise UserError(f"{path}: seeds must be different numbers, at least one, got {spec.seeds}")
    if spec.jobs < 1:
        raise UserError(f"{path}: jobs must be 1 or more, got {spec.jobs}")
    for key, values in spec.grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: grid.{key} must be a list of values, got {values!r}")
    for key, texts, what in (
        ("columns", spec.columns, "a metric of results.json"),
        ("published", spec.published, "a published method"),
    ):
        for name, text in texts.items():
            if not isinstance(text, str):
                raise UserError(f"{path}: {key}.{name} must be {what}, got {text!r}")
    _check_rows(spec)
    _check_labels(spec)


def _check_rows(spec: Spec) -> None:
    path = spec.path
    for section in ("runs", "first"):
        for label, changes in getattr(spec, section).items():
            if changes is not None and not isinstance(changes, dict):
                raise UserError(f"{path}: {section}.{label} must be a mapping {{key: value}}, got {changes!r}")
            _refuse_own_keys(f"{path}: {section}.{label}", changes or {})
            if section == "first" and not isinstance(config := (changes or {}).get("config", ""), str):
                raise UserError(f"{path}: first.{label}.config must be a file, got {config!r}")
    _refuse_own_keys(f"{path}: overrides", spec.overrides)
    _refuse_own_keys(f"{path}: grid", spec.grid)


def _check_labels(spec: Spec) -> None:
    rows = rows_of(spec)
    named = {"baseline": [spec.baseline] if spec.baseline is not None else [], "published": list(spec.published)}
    named["evaluate"] = spec.evaluate if isinstance(spec.evaluate, list) else []
    named["checkpoint"] = list(spec.checkpoint) if isinstance(spec.checkpoint, dict) else []
    for key, labels in named.items():
        for label in labels:
            if label not in rows:
                raise UserError(f"{spec.path}: {key} names no row '{label}': {closest(label, rows)}")
    folders: dict[str, str] = {}
    for label in (*spec.first, *rows):
        if not folder_name(label).strip("."):
            raise UserError(f"{spec.path}: '{label}' can't be a label: it names no folder")
        if folders.setdefault(folder_name(label), label) != label or (label in spec.first and label in rows):
            other = folders[folder_name(label)]
            raise UserError(
                f"{spec.path}: '{label}' and '{other}' would share the folder {folder_name(label)}: rename one"
            )
    for label in spec.checkpoint if isinstance(spec.checkpoint, dict) else ():
        if not spec.is_evaluated(label):
            raise UserError(f"{spec.path}: checkpoint.{label} changes nothing: the row is not under `evaluate`")
    if isinstance(spec.checkpoint, str) and not any(spec.is_evaluated(label) for label in rows):
        raise UserError(f"{spec.path}: checkpoint={spec.checkpoint} changes nothing: no row is under `evaluate`")


def folder_name(label: str) -> str:
    """A label as a folder; of a long one the beginning and a digest, as file systems end at 255 bytes."""
    name = "".join(c if c.isalnum() or c in "-_=.," else "_" for c in label)
    if len(name.encode()) <= LONGEST:
        return name
    start = name.encode()[: LONGEST - 9].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _refuse_own_keys(source: str, changes: Mapping[str, Any]) -> None:
    for key in OWN_KEYS:
        if key in changes:
            raise UserError(f"{source}: the sweep sets {key} itself; seeds are given as seeds: [0, 1, 2]")


def _shown(value: Any) -> str:
    """A value of the grid within a label."""
    if isinstance(value, dict):
        options = ", ".join(f"{key}={_shown(item)}" for key, item in value.items() if key != "name")
        return f"{value.get('name', '')}({options})" if options else str(value.get("name", ""))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    return {dict: "a mapping", list: "a list"}.get(
        typing.get_origin(hint) or hint, getattr(hint, "__name__", str(hint))
    )
