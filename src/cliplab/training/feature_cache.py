"""What is frozen is encoded once: features of pictures and texts, shared by all runs that name the folder.

Features are what the composers take: projected, not unit length, in the precision that the tower gave them.
A picture's identity is its path, size and time of change; a text's is the text itself. The key of a table is the tower
(weights, buffers, architecture), the preprocessing or the tokenizer, precision, type of device and torch's version.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils import data
from torch.utils.data import DataLoader

from cliplab.data.images import ImageTransform
from cliplab.errors import UserError
from cliplab.models.composed import ComposedRetriever
from cliplab.models.encoding import evaluating, progress
from cliplab.training.feature_keys import (
    identity,
    tokenizer_settings,
    tower_settings,
    tower_tensors,
    transform_settings,
)
from cliplab.training.feature_store import SHARD_ROWS, FeatureStore

log = logging.getLogger(__name__)

NOUNS = {"image": "pictures", "text": "texts"}
NEEDED_RAW = {"image": "image_tokens", "text": "text_tower"}  # composers with these inputs take more than features
# How far a stored row may be from one computed now, as a share of its length: batches of other sizes round differently.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


@dataclass(frozen=True)
class Wanted:
    """Pictures (paths) or texts to find or to encode, each once."""

    modality: str
    names: list[str]
    ids: list[bytes]
    load: Callable[[str], Tensor]
    trainer: L.Trainer | None

    def part(self, places: Sequence[int]) -> "Wanted":
        """Some of them."""
        names, ids = [self.names[place] for place in places], [self.ids[place] for place in places]
        return Wanted(self.modality, names, ids, self.load, self.trainer)


class FeatureCache:
    """The features of the frozen towers of a model; what data/rows.py calls a feature source.

    `transform` makes pictures to inputs, `precision` is how the towers compute, `towers` are the modalities of those
    that are frozen. `is_asked`: a folder that can't be written is an error, and no reason to do without.
    """

    def __init__(
        self,
        folder: Path,
        model: ComposedRetriever,
        transform: ImageTransform,
        precision: Sequence[str],
        towers: Collection[str],
        *,
        is_asked: bool = False,
        batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        self.folder, self.model, self.transform, self.precision = folder, model, transform, list(precision)
        self.towers, self.is_asked, self.batch_size, self.num_workers = towers, is_asked, batch_size, num_workers
        self._stores: dict[str, tuple[Any, FeatureStore]] = {}
        self._told: set[str] = set()
        self._is_usable = True

    def covers(self, modality: str, role: str, training: bool) -> bool:
        """As data/rows.py says; a reason that the user may not expect is logged once."""
        if modality not in self.towers or not self._is_usable:
            return False
        crop_scale, flip, composer = self.transform.crop_scale, self.transform.flip, self.model.composer
        if modality == "image" and training and (crop_scale < 1 or flip):
            self._tell(
                f"data.crop_scale={crop_scale:g} and data.flip={str(flip).lower()} draw training pictures anew each "
                "time: they are encoded at every step; with 1 and false they would be cached"
            )
            return False
        if role == "query" and composer is not None and NEEDED_RAW[modality] in composer.inputs:
            self._tell(f"the composer takes {NEEDED_RAW[modality]}: {NOUNS[modality]} of queries are encoded each time")
            return False
        return True

    def rows(
        self, modality: str, items: Sequence[str], load: Callable[[str], Tensor], trainer: L.Trainer | None
    ) -> np.ndarray | None:
        """As data/rows.py says. Raises UserError for pictures that can't be read and for a disk that is full."""
        with torch.inference_mode(False), torch.no_grad():
            store = self._store(modality, load)
            if not self._is_writable(store):
                return None
            names = list(dict.fromkeys(items))
            wanted = Wanted(modality, names, [identity(modality, name) for name in names], load, trainer)
            self._check(store, wanted)
            computed = self._fill(store, wanted)
            found = dict(zip(names, store.find(wanted.ids), strict=True))
        if -1 in found.values():
            raise UserError(f"files of {store.folder} vanish while a run needs them: let nothing clear it meanwhile")
        if (computed or not store.is_told) and (trainer is None or trainer.is_global_zero):
            store.is_told = True
            how = f"{computed} of them encoded now" if computed else "read from disk"
            log.info("feature cache: %d %s, %s: %s", len(names), NOUNS[modality], how, store.described_size())
        return np.asarray([found[item] for item in items], dtype=np.int64)

    def look_up(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch on its device, with `image_features` [B, D] for `image_row` [B], and so for texts."""
        return {key: self._with_features(value) if isinstance(value, dict) else value for key, value in batch.items()}

    def _with_features(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = dict(inputs)
        for modality in NOUNS:
            rows = found.pop(f"{modality}_row", None)
            if rows is not None:
                found[f"{modality}_features"] = self._stores[modality][1].gather(rows)
        return found

    def _store(self, modality: str, load: Callable[[str], Tensor]) -> FeatureStore:
        """The table of a modality under the tower as it is now."""
        tensors = tower_tensors(self.model.clip, modality)
        signature = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors.values())
        known = self._stores.get(modality)
        if known is not None and known[0] == signature:
            return known[1]
        inputs = transform_settings(self.transform) if modality == "image" else tokenizer_settings(load)
        settings = {**tower_settings(self.model.clip, modality), **inputs, "precision": self.precision}
        store = FeatureStore(self.folder, f"{modality}s", settings)
        if known is not None and known[1].key == store.key:
            store = known[1]  # the weights were only moved: rows that were given out stay valid
        self._stores[modality] = signature, store
        return store

    def _is_writable(self, store: FeatureStore) -> bool:
        try:
            store.make_folder()
        except OSError as error:
            if self.is_asked:
                raise UserError(
                    f"data.feature_cache={self.folder} can't be written: {error}. Name another folder, or null for none"
                ) from error
            self._tell(f"{self.folder} can't be written ({error}): nothing is cached")
            self._is_usable = False
        return self._is_usable

    def _check(self, store: FeatureStore, wanted: Wanted) -> None:
        """Compute a row of each file that is used for the first time again: code may change where weights don't."""
        rows = store.find(wanted.ids)
        samples = store.unchecked(rows)
        if not samples:
            return
        now = self._encode(wanted.part(list(samples.values())))
        for (shard, place), fresh in zip(samples.items(), now, strict=True):
            stored = store.gather(torch.tensor([rows[place]]))[0]
            apart = float((stored.double() - fresh.double()).norm() / fresh.double().norm().clamp_min(1e-12))
            if stored.dtype == fresh.dtype and apart <= TOLERANCE[fresh.dtype]:
                store.checked.add(shard)
            else:
                path = store.drop(shard)
                log.warning(
                    "feature cache: %s holds other features of '%s' than the model gives now (%.1e apart): removed, to "
                    "be computed again",
                    *(path, wanted.names[place], apart),
                )

    def _fill(self, store: FeatureStore, wanted: Wanted) -> int:
        """Encode what is missing; how many that was. Processes of one run share the work and wait for each other."""
        parallel = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if not parallel:
            if -1 not in store.find(wanted.ids):
                return 0
            with store.filling():
                missing = _missing(store, wanted)
                self._write(store, wanted.part(missing))
            return len(missing)
        with store.filling() if distributed.get_rank() == 0 else nullcontext():
            distributed.barrier()  # other runs are done
            missing = _missing(store, wanted)
            distributed.barrier()  # all have looked before the first one writes, so that the shares fit together
            self._write(store, wanted.part(missing[distributed.get_rank() :: distributed.get_world_size()]))
            distributed.barrier()
            self._write(store, wanted.part(_missing(store, wanted)))  # on disks of their own
        return len(missing)

    def _write(self, store: FeatureStore, wanted: Wanted) -> None:
        count = len(wanted.names)
        for start in range(0, count, SHARD_ROWS):
            part = wanted.part(range(start, min(start + SHARD_ROWS, count)))
            features = self._encode(part)
            try:
                store.write(part.ids, features)
            except OSError as error:
                raise UserError(
                    f"can't write the features of {len(part.names)} {NOUNS[part.modality]} to {store.folder}: {error}. "
                    "Make room, name another folder in data.feature_cache, or switch it off with null"
                ) from error
            store.checked.update(store.unchecked(store.find(part.ids)))

    def _encode(self, wanted: Wanted) -> Tensor:
        """Features [N, D] as the uncached path computes them, on the CPU."""
        trainer, device = wanted.trainer, self.model.clip.logit_scale.device
        precision = trainer.precision_plugin.val_step_context() if trainer is not None else nullcontext()
        is_large = len(wanted.names) > self.batch_size
        loader = DataLoader(
            _Items(wanted.names, wanted.load),
            self.batch_size,
            num_workers=self.num_workers if wanted.modality == "image" and is_large else 0,
            generator=torch.Generator(),  # without one it draws from the random numbers of the run
        )
        encode = self.model.image_features if wanted.modality == "image" else self.model.text_features
        parts = []
        with evaluating(self.model), precision:
            for batch in progress(loader, f"encoding {NOUNS[wanted.modality]} once", is_large):
                parts.append(encode({wanted.modality: batch.to(device)}).cpu())
        return torch.cat(parts)

    def _tell(self, text: str) -> None:
        """Once."""
        if text not in self._told:
            self._told.add(text)
            log.info("feature cache: %s", text)


def _missing(store: FeatureStore, wanted: Wanted) -> list[int]:
    return [place for place, row in enumerate(store.find(wanted.ids)) if row < 0]


class _Items(data.Dataset):
    def __init__(self, names: list[str], load: Callable[[str], Tensor]) -> None:
        self.names, self.load = names, load

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> Tensor:
        return self.load(self.names[place])
