"""What the numbers of a run depend on. A run is reused only where all of it equals what is asked for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from cliplab import results
from cliplab.build import build_dataset, build_protocol
from cliplab.config import Config
from cliplab.run import FREE_KEYS, checkpoint_of, flat
from cliplab.sources import is_run

Identity = dict[str, Any]  # flat: `optim.lr`, `versions.torch`, `data`, `first.NAME`

# A continued run may have another length; its numbers then are others. Python itself changes none.
IDLE_KEYS = FREE_KEYS - {"trainer.max_epochs", "trainer.max_steps"} | {"name", "trainer.log_every_n_steps"}
_TRAINING = ("loss", "optim", "teacher", "zero_shot", "trainer.weight_averaging", "data.hard_negatives")
_TRAINING += ("model.freeze", "model.freeze_bn", "model.grad_checkpointing", "model.chunk_size", "model.fixed_scale")
_TRAINING += ("data.batch_size", "data.same_image", "data.crop_scale", "data.flip", "data.protocol.train_join")
_TRAINING += tuple(
    f"trainer.{key}"
    for key in ("max_epochs", "max_steps", "gradient_clip_val", "check_val_every_n_epoch", "monitor")
    + ("early_stopping_patience",)
)


def numbers_of(config: Config, evaluated: bool) -> Identity:
    """The keys of a config that can change a number, flat, with the protocol written out.

    Of one that is evaluated alone, those of the training don't. Raises UserError for an unknown protocol.
    """
    return _numbers(asdict(config), build_protocol(config).as_dict(), evaluated)


def identity_of(config: Config, evaluated: bool, data_hash: str, versions: Mapping[str, str]) -> Identity:
    """Config, data and versions of a run that is asked for."""
    return _complete(numbers_of(config, evaluated), evaluated, data_hash, versions)


def identity_in(content: Mapping[str, Any], evaluated: bool) -> Identity:
    """The identity that a results.json tells; keys that its version had not yet have their defaults.

    Raises KeyError, TypeError or AttributeError where it tells none.
    """
    protocol = {key: value for key, value in content["protocol"].items() if key != "split"}
    told = _numbers(content["config"], protocol, evaluated)
    for key, value in _defaults(evaluated).items():
        if key not in told and not any(_is_below(known, (key,)) for known in told):
            told[key] = value
    return _complete(told, evaluated, content["data"]["manifest_hash"], content["versions"])


@cache
def _defaults(evaluated: bool) -> Identity:
    return numbers_of(Config(), evaluated)


def _numbers(config: Mapping[str, Any], protocol: Mapping[str, Any], evaluated: bool) -> Identity:
    content = {**config, "data": {**config["data"], "protocol": protocol}}
    found = {key: value for key, value in flat(content).items() if key not in IDLE_KEYS}
    if evaluated:
        found = {key: value for key, value in found.items() if not _is_below(key, _TRAINING)}
    return json.loads(json.dumps(found))  # as it is read back: tuples are lists


def _complete(numbers: Identity, evaluated: bool, data_hash: str, versions: Mapping[str, str]) -> Identity:
    packages = {f"versions.{name}": version for name, version in versions.items() if name != "python"}
    return {**numbers, "evaluated": evaluated, "data": data_hash, **packages}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys in which two identities differ."""
    missing = object()
    return sorted(key for key in one.keys() | other.keys() if one.get(key, missing) != other.get(key, missing))


def digest(identity: Identity) -> str:
    """A short name of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def mark_of(path: Path) -> str:
    """What is read of a model's file or folder: changed by hand or made again, it is another one.

    JSON by its content; a run by the checkpoint that is taken; weights by size and time, as they are large.
    """
    if path.suffix == ".json":
        return f"{path}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    if is_run(path):
        path = checkpoint_of(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    facts = [(str(file.relative_to(path)), *_size_and_time(file)) for file in files if file.is_file()]
    return f"{path}, {digest({'files': facts})}"


def _size_and_time(file: Path) -> tuple[int, int]:
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns


class Here:
    """The data sets and packages of this machine; each data set is looked at once."""

    def __init__(self) -> None:
        self.versions = results.versions()
        self._hashes: dict[str, str] = {}

    def identity_of(self, config: Config, evaluated: bool) -> Identity:
        """What is asked for. Raises UserError for data that are not there."""
        data = config.data
        where = json.dumps([data.name, data.root, data.images, data.categories, data.annotations])
        if where not in self._hashes:
            dataset = build_dataset(config)
            dataset.prepare()
            self._hashes[where] = dataset.manifest_hash()
        return identity_of(config, evaluated, self._hashes[where], self.versions)


def _is_below(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
