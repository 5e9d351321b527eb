"""A run directory: config.yaml, results.json, checkpoints/, metrics.csv, ranks/, pictures/, TensorBoard events.

Nothing is lost: a run that must start afresh where another one stands moves that one aside under the time it was last
written.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cliplab.config import Config, load_config, merge_config, read_overrides
from cliplab.errors import UserError
from cliplab.models.checkpoints.torch_file import read_torch_file

log = logging.getLogger(__name__)

# Keys that may change when a run is continued: they say how and how long, not what.
FREE_KEYS = {
    "resume",
    "debug",
    "output_dir",
    "trainer.max_epochs",
    "trainer.max_steps",
    "data.num_workers",
    "data.feature_cache",
}


@dataclass(frozen=True)
class RunDirectory:
    """Where a run lives and which checkpoint it continues from (None = from the start)."""

    path: Path
    resume_from: Path | None = None

    @property
    def best(self) -> Path:
        """The checkpoint with the highest monitored metric."""
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def last(self) -> Path:
        """The checkpoint of the last whole epoch."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def results(self) -> Path:
        """Written last: a run without it was interrupted."""
        return self.path / "results.json"

    @property
    def holds_run(self) -> bool:
        """Whether the folder is that of a run, whole or not."""
        return any((self.path / name).exists() for name in ("config.yaml", "checkpoints", "results.json"))


def run_directory(config: Config) -> RunDirectory:
    """output_dir/name. Raises UserError for a name that leads elsewhere, or a path that is no folder."""
    parts = Path(config.name).parts
    if not parts or Path(config.name).is_absolute() or {".", ".."} & {*parts, config.name}:
        raise UserError(f"name={config.name}: a run's name must be a folder below output_dir, like baseline or a/b")
    path = Path(config.output_dir) / config.name
    blocked = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None)
    if blocked is not None:
        raise UserError(f"output_dir={config.output_dir} name={config.name}: {blocked} is a file, no folder")
    return RunDirectory(path)


def find_run(config: Config) -> RunDirectory:
    """Apply `resume`, touching nothing. Raises UserError for a checkpoint that is not there."""
    run = run_directory(config)
    if config.resume not in ("auto", "never"):
        checkpoint = Path(config.resume)
        if not checkpoint.is_file():
            raise UserError(f"resume={config.resume}: no such checkpoint file; or use resume=auto or resume=never")
        run = RunDirectory(run.path, checkpoint)
    elif config.resume == "auto" and run.last.is_file() and not run.results.is_file():
        changed = _changed_keys(run.path / "config.yaml", config)
        if not changed:
            run = RunDirectory(run.path, run.last)
            log.info("continuing the interrupted run %s from its last epoch", run.path)
        else:
            log.info("not continuing %s: its config differs in %s", run.path, ", ".join(changed))
    return run


def claim_run(run: RunDirectory, config: Config) -> None:
    """Make the directory the run's own, with its config.yaml; called when nothing can be wrong with the config.

    What a fresh start would overwrite is moved aside. Processes beside the first leave that to it.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if run.resume_from is None or run.path.resolve() not in run.resume_from.resolve().parents:
        move_aside(run.path)
    elif run.results.is_file():
        move_aside(run.results)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(asdict(config)), run.path / "config.yaml")
    except OSError as error:
        raise UserError(f"can't write the run directory {run.path}: {error}") from error


def _changed_keys(stored: Path, config: Config) -> list[str]:
    if not stored.is_file():
        return ["everything (no config.yaml)"]
    try:
        old = flat(OmegaConf.to_container(OmegaConf.load(stored)))
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError):
        return ["everything (a damaged config.yaml)"]
    new = flat(asdict(config))
    return sorted(k for k in old.keys() | new.keys() if k not in FREE_KEYS and old.get(k) != new.get(k))


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> `{a.b: value}`; an empty mapping is a value."""
    if not isinstance(node, dict) or not node:
        return {prefix[:-1]: node}
    return {key: value for name, child in node.items() for key, value in flat(child, f"{prefix}{name}.").items()}


def move_aside(path: Path, is_ours: bool = False) -> None:
    """Rename a run directory, or its results, after the time it was last written.

    Raises UserError for a folder that is no run, unless the caller knows that it was one.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if path.is_dir() and not RunDirectory(path).holds_run and not is_ours:
        raise UserError(f"{path} holds files but no run (no config.yaml): choose another name= or output_dir=")
    written = max(item.stat().st_mtime for item in (path.rglob("*") if path.is_dir() else [path]))
    stamp = datetime.fromtimestamp(written).strftime("%Y-%m-%d_%H-%M-%S")
    aside = path.with_name(f"{path.stem}.{stamp}{path.suffix}" if path.is_file() else f"{path.name}.{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = aside.with_name(f"{path.name}.{stamp}.{number}")
    path.rename(aside)
    log.info("the earlier %s was moved to %s", path, aside)


def checkpoint_of(path: str | Path) -> Path:
    """A run directory -> its best checkpoint (else its last); a file -> itself. Raises UserError."""
    path = Path(path)
    run = RunDirectory(path)
    try:
        for checkpoint in (path, run.best, run.last):
            if checkpoint.is_file():
                return checkpoint
    except OSError as error:  # a name that no file system takes
        raise UserError(f"{path} is neither a checkpoint nor a run directory: {error.strerror}") from error
    runs = ", ".join(sorted({str(p.parents[1]) for p in path.parent.glob("*/checkpoints/*.ckpt")})) or "none"
    raise UserError(f"{path} is neither a checkpoint nor a run directory with checkpoints/; runs beside it: {runs}")


def config_of(checkpoint: Path, path: str | None, overrides: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """The config of an evaluation, and the checkpoint's contents.

    It is the checkpoint's own config, or a file's with the model of the checkpoint; overrides win.
    """
    stored = read_checkpoint(checkpoint)
    own, typed = stored["hyper_parameters"]["config"], read_overrides(overrides)
    if path is None:
        layers = [(str(checkpoint), own)]
    else:
        layers = [(path, asdict(load_config(path))), (str(checkpoint), {"model": own["model"]})]
    config = merge_config([*layers, ("command line", typed)])
    config.model.weights = None  # the checkpoint holds them
    return config, stored


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of a run, as plain builtins and tensors. Raises UserError for anything else."""
    stored = read_torch_file(path)
    parts = stored.get("hyper_parameters") if isinstance(stored, dict) else None
    whole = isinstance(parts, dict) and isinstance(parts.get("config"), dict) and "built_from" in parts
    if not whole or "state_dict" not in stored:
        raise UserError(f"{path} is no checkpoint of a run here; give plain weights as model.weights with --config")
    return stored
