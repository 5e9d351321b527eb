"""The rows of tables as batches in the vocabulary of datamodule.py, made a batch at a time."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils import data
from torch.utils.data import default_collate

from cliplab.data.images import ImageTransform

Tokenize = Callable[[str], Tensor]
Columns = Mapping[str, np.ndarray]  # column -> rows of the feature source, one per row of the table
Asked = tuple[str, str, list[Any]]  # modality, role, paths or texts (or None in all rows)

# By what is learned from: the columns of the training table that are read.
LESSONS = {"triplets": ("reference", "target", "texts"), "images": ("target",), "texts": ("texts",)}


class FeatureSource(Protocol):
    """Features of towers that stay as they are; training/feature_cache.py has them."""

    def covers(self, modality: str, role: str, training: bool) -> bool:
        """Whether pictures (image) or texts (text) of a role (query, target) can come from here."""
        ...

    def rows(
        self, modality: str, items: Sequence[str], load: Callable[[str], Tensor], trainer: L.Trainer | None
    ) -> np.ndarray | None:
        """Rows int64 [N] of pictures (paths) or texts; what is missing is read with `load` and encoded first.

        None where nothing can be kept. Every process of a run calls this with the same items.
        """
        ...

    def look_up(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with features in place of rows."""
        ...


class TrainRows(data.Dataset):
    """The training table; keys are (row, epoch). `columns`: what of reference, target and texts is read.

    `cached` may name some of them (texts: rows text by text).
    """

    def __init__(
        self,
        table: Dataset,
        transform: ImageTransform,
        tokenize: Tokenize,
        seed: int,
        cached: Columns | None = None,
        columns: Sequence[str] = LESSONS["triplets"],
    ) -> None:
        self.table, self.transform, self.tokenize, self.seed = table, transform, tokenize, seed
        self.cached = cached or {}
        is_composed = len(table) > 0 and table[0]["reference"] is not None
        self.columns = [name for name in columns if name != "reference" or is_composed]
        self._ids = {name: np.asarray(table[name][:], dtype=np.int64) for name in ("target_id", "reference_id")}
        lengths = [len(texts) for texts in table["texts"][:]]
        self._counts, self._starts = np.asarray(lengths), np.cumsum([0, *lengths])[:-1]
        self._uncached = [name for name in self.columns if name not in self.cached]
        self._drawn: tuple[int, np.ndarray] = (-1, np.empty(0))
        self.hard_negatives = 0  # of each row, drawn from its column `negatives`

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return _first(self.__getitems__([key]))

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> dict[str, Any]:
        rows, epoch = np.asarray([row for row, _ in keys]), keys[0][1]
        chosen = self.chosen_texts(epoch)[rows]
        found = self.table.select_columns(self._uncached)[rows] if self._uncached else {}
        drawing = rows.tolist() if {"reference", "target"} & {*self._uncached} else []
        generators = [np.random.default_rng((self.seed, epoch, row)) for row in drawing]
        query = self._texts(rows, chosen, found) if "texts" in self.columns else {}
        if "reference" in self.columns:
            query |= self._images("reference", rows, found, generators)
        target = self._images("target", rows, found, generators) if "target" in self.columns else {}
        ids = {"row_id": rows, "query_id": rows} | {name: column[rows] for name, column in self._ids.items()}
        batch: dict[str, Any] = {"query": query, "target": target}
        if self.hard_negatives:
            batch["negatives"] = {"image": self._negatives(rows, epoch)}
        return batch | {name: torch.from_numpy(column) for name, column in ids.items()}

    def _negatives(self, rows: np.ndarray, epoch: int) -> Tensor:
        """uint8 [B, N, 3, H, W]; where a row has fewer than N, some stand there again."""
        images = []
        for row, paths in zip(rows.tolist(), self.table.select_columns(["negatives"])[rows]["negatives"], strict=True):
            generator = np.random.default_rng((self.seed, epoch, row, 1))
            chosen = generator.choice(len(paths), self.hard_negatives, replace=len(paths) < self.hard_negatives)
            images.append(torch.stack([self.transform(paths[place], generator) for place in chosen]))
        return torch.stack(images)

    def chosen_texts(self, epoch: int) -> np.ndarray:
        """By row: which of its texts an epoch asks with [N]; it depends on seed, epoch and row alone."""
        if self._drawn[0] != epoch:
            shares = np.random.default_rng((self.seed, epoch)).random(len(self))
            self._drawn = epoch, (shares * self._counts).astype(np.int64)
        return self._drawn[1]

    def _texts(self, rows: np.ndarray, chosen: np.ndarray, found: Mapping[str, list[list[str]]]) -> dict[str, Tensor]:
        if "texts" in self.cached:
            return {"text_row": torch.from_numpy(self.cached["texts"][self._starts[rows] + chosen])}
        texts = [texts[choice] for texts, choice in zip(found["texts"], chosen, strict=True)]
        return {"text": default_collate([self.tokenize(text)[0] for text in texts])}

    def _images(
        self, column: str, rows: np.ndarray, found: Mapping[str, list[str]], generators: list[np.random.Generator]
    ) -> dict[str, Tensor]:
        if column in self.cached:
            return {"image_row": torch.from_numpy(self.cached[column][rows])}
        pairs = zip(found[column], generators, strict=True)
        return {"image": default_collate([self.transform(path, generator) for path, generator in pairs])}


class EvalRows(data.Dataset):
    """The queries or the gallery of a benchmark; keys are rows. `cached` may name image and text."""

    def __init__(
        self,
        table: Dataset,
        role: str,
        transform: ImageTransform,
        tokenize: Tokenize,
        cached: Columns | None = None,
    ) -> None:
        self.table, self.role, self.transform, self.tokenize = table, role, transform, tokenize
        self.cached = cached or {}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return _first(self.__getitems__([row]))

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Any]:
        found, index = self.table[list(rows)], torch.tensor(rows)
        inputs: dict[str, Tensor] = {}
        loads: dict[str, Callable[[str], Tensor]] = {
            "image": self.transform,
            "text": lambda text: self.tokenize(text)[0],
        }
        for modality, load in loads.items():
            if modality in self.cached:
                inputs[f"{modality}_row"] = torch.from_numpy(self.cached[modality][index.numpy()])
            elif found[modality][0] is not None:
                inputs[modality] = default_collate([load(item) for item in found[modality]])
        if self.role == "query":
            ids = {name: torch.tensor(found[name]) for name in ("query_id", "reference_id")}
        else:
            ids = {"target_id": index}
        return {self.role: inputs, "row_id": index, **ids}


def _first(batch: Any) -> Any:
    return {key: _first(value) for key, value in batch.items()} if isinstance(batch, dict) else batch[0]


def training_columns(table: Dataset, columns: Sequence[str] = LESSONS["triplets"]) -> dict[Any, Asked]:
    """What `columns` of a training table need, by name; texts lie one after another, row by row."""
    asked: dict[Any, Asked] = {
        "reference": ("image", "query", table["reference"][:]),
        "target": ("image", "target", table["target"][:]),
        "texts": ("text", "query", [text for texts in table["texts"][:] for text in texts]),
    }
    return {name: asked[name] for name in columns}


def evaluation_columns(tables: Sequence[tuple[str, Dataset]]) -> dict[Any, Asked]:
    """What tables of queries and galleries (role, table) need, by (number of the table, modality)."""
    return {
        (number, modality): (modality, role, table[modality][:])
        for number, (role, table) in enumerate(tables)
        for modality in ("image", "text")
    }


def cached_rows(
    source: FeatureSource | None,
    columns: Mapping[Any, Asked],
    load: Mapping[str, Callable[[str], Tensor]],
    trainer: L.Trainer | None,
    training: bool = False,
) -> dict[Any, np.ndarray]:
    """The rows of the columns that a feature source holds; each modality is asked for once."""
    found: dict[Any, np.ndarray] = {}
    if source is None:
        return found
    for modality in ("image", "text"):
        wanted = {
            name: items
            for name, (kind, role, items) in columns.items()
            if kind == modality and items and items[0] is not None and source.covers(kind, role, training)
        }
        items = list(itertools.chain.from_iterable(wanted.values()))
        rows = source.rows(modality, items, load[modality], trainer) if items else None
        if rows is not None:
            ends = np.cumsum([len(column) for column in wanted.values()])[:-1]
            found |= dict(zip(wanted, np.split(rows, ends), strict=True))
    return found
