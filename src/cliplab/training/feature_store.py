"""Features on disk: rows of a table under a key, each found by its identity. Knows no model, no picture and no text.

FOLDER/README.txt
FOLDER/KIND-KEY/key.json                what the key stands for
FOLDER/KIND-KEY/NAME.safetensors        a shard: features [N, D] as the tower gave them, ids uint8 [N, 16]

A shard appears whole or not at all and is never changed, so any number of processes may read and write at once. One
that fills the table holds `filling`; where a file system knows no locks, rows that two compute are there twice.
"""

import hashlib
import json
import logging
import os
import uuid
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cliplab.files import alone, write_whole

log = logging.getLogger(__name__)

FORMAT = "cliplab-features-1"  # raise it when the same key would give other features
SHARD_ROWS = 65_536
SUFFIX = ".safetensors"
RESIDENT_BYTES = 4 * 2**30  # tables up to this size are copied to a GPU, larger ones are read row by row
_README = """Features of frozen towers, computed once and shared by all runs that name this folder (data.feature_cache).
Everything here can be computed again: delete the folder, or parts of it, whenever no run is using it.
"""


class FeatureStore:
    """The rows of one key: `find` what is there, `write` what is not, `gather` by row number.

    Row numbers are those of this object: they stay valid while it lives, also after more rows were found.
    """

    def __init__(self, folder: Path, kind: str, settings: Mapping[str, Any]) -> None:
        described = json.dumps({"format": FORMAT, "kind": kind, **settings}, indent=1, sort_keys=True)
        self.key = hashlib.sha256(described.encode()).hexdigest()
        self.root, self.kind, self.described = folder, kind, described
        self.folder = folder / f"{kind}-{self.key[:16]}"
        self._shards: list[Tensor] = []
        self._starts: list[int] = [0]
        self._rows: dict[bytes, int] = {}
        self._files: list[Path] = []  # by shard
        self.is_told = False  # the user knows where it is
        self.checked: set[int] = set()  # shards whose features are those of the model
        self._resident: dict[torch.device, tuple[int, Tensor]] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def find(self, ids: Sequence[bytes]) -> list[int]:
        """The row of each id, -1 where it is in none of the files; damaged and foreign files are removed."""
        names: list[str] = []
        with suppress(FileNotFoundError):  # the folder may be deleted at any time
            names = os.listdir(self.folder)
        for path in sorted(self.folder / name for name in names if name.endswith(SUFFIX) and not name.startswith(".")):
            if path not in self._files and path.is_file():
                self._open(path)
        return [self._rows.get(each, -1) for each in ids]

    def write(self, ids: Sequence[bytes], features: Tensor) -> None:
        """Add a shard of features [N, D]. Raises OSError where that can't be done."""
        self.make_folder()
        tensors = {
            "features": features.contiguous(),
            "ids": torch.frombuffer(bytearray(b"".join(ids)), dtype=torch.uint8).view(len(ids), 16),
        }
        name = hashlib.sha256(b"".join(ids)).hexdigest()[:16]
        scratch = self.folder / f".{name}-{uuid.uuid4().hex}.tmp"
        try:
            save_file(tensors, scratch, {"key": self.key, "sha256": _checksum(tensors)})
            os.replace(scratch, self.folder / f"{name}{SUFFIX}")
        except SafetensorError as error:  # how a full disk shows itself
            raise OSError(str(error)) from error
        finally:
            scratch.unlink(missing_ok=True)

    def filling(self) -> AbstractContextManager[None]:
        """Wait for another process that computes rows of this table, then keep others waiting."""
        busy = f"feature cache: another process is filling {self.folder}"
        return alone(self.folder / ".lock", busy, f"feature cache: {self.folder}")

    def make_folder(self) -> None:
        """Create the folder, with what it is for. Raises OSError where it can't be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path, text in ((self.root / "README.txt", _README), (self.folder / "key.json", self.described)):
            if not path.is_file():
                write_whole(path, text)
        probe = self.folder / f".{uuid.uuid4().hex}.tmp"
        probe.touch()
        probe.unlink()

    def gather(self, rows: Tensor) -> Tensor:
        """Row numbers int64 [B] -> features [B, D] on the same device, as they were written."""
        if rows.device.type == "cpu":
            return self._gather(rows)
        size = sum(shard.nbytes for shard in self._shards)
        if size > RESIDENT_BYTES:
            return self._gather(rows.cpu()).to(rows.device)
        return self._on(rows.device)[rows]

    def unchecked(self, rows: Sequence[int]) -> dict[int, int]:
        """Per shard that `rows` lie in and that is not `checked`: the place in `rows` of one of its own."""
        found: dict[int, int] = {}
        for place, row in enumerate(rows):
            if row >= 0:
                found.setdefault(bisect_right(self._starts, row) - 1, place)
        return {shard: place for shard, place in found.items() if shard not in self.checked}

    def drop(self, shard: int) -> Path:
        """Forget a shard and remove its file, whose path is returned."""
        low, high = self._starts[shard], self._starts[shard + 1]
        self._rows = {each: row for each, row in self._rows.items() if not low <= row < high}
        path, self._files[shard] = self._files[shard], Path()
        path.unlink(missing_ok=True)
        return path

    def described_size(self) -> str:
        """Where it is and how large, for people."""
        files = (os.path.join(folder, name) for folder, _, names in os.walk(self.root) for name in names)
        size = 0
        for file in files:
            with suppress(FileNotFoundError):
                size += os.path.getsize(file) if file.endswith(SUFFIX) else 0
        return f"{self.folder} (all of {self.root}: {size / 1e6:.1f} MB, may be deleted)"

    def _open(self, path: Path) -> None:
        try:
            features, ids = _read(path, self.key)
        except FileNotFoundError:
            return  # another process has removed it
        except (OSError, ValueError, SafetensorError) as error:
            log.warning("feature cache: %s is of no use (%s): removed, to be computed again", path, error)
            path.unlink(missing_ok=True)
            return
        raw, start = ids.numpy().tobytes(), len(self)
        self._rows.update({raw[16 * n : 16 * n + 16]: start + n for n in range(len(ids))})
        self._shards.append(features)
        self._files.append(path)
        self._starts.append(start + len(features))

    def _gather(self, rows: Tensor) -> Tensor:
        if len(self._shards) == 1:
            return self._shards[0][rows]
        found = self._shards[0].new_empty(len(rows), self._shards[0].shape[1])
        for shard, low, high in zip(self._shards, self._starts, self._starts[1:], strict=False):
            inside = (rows >= low) & (rows < high)
            found[inside] = shard[rows[inside] - low]
        return found

    def _on(self, device: torch.device) -> Tensor:
        count, table = self._resident.get(device, (0, torch.empty(0)))
        if count != len(self._shards):
            table = torch.cat(self._shards).to(device)
            self._resident[device] = len(self._shards), table
        return table


def _read(path: Path, key: str) -> tuple[Tensor, Tensor]:
    """Memory-mapped features [N, D] and ids [N, 16] of a shard. Raises ValueError, OSError or SafetensorError."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("key") != key:
            raise ValueError("it belongs to another model or preprocessing")
        if set(file.keys()) != {"features", "ids"}:
            raise ValueError("it holds other tables")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    features, ids = tensors["features"], tensors["ids"]
    if features.dim() != 2 or ids.shape != (len(features), 16) or ids.dtype != torch.uint8:
        raise ValueError("its tables don't fit together")
    if _checksum(tensors) != metadata.get("sha256"):
        raise ValueError("its content is damaged")
    return features, ids


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in ("features", "ids"):
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
