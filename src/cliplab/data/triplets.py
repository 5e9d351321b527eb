"""Composed triplets with mined hard negatives, in the JSON lines of MegaPairs (BGE-VL, Zhou et al., 2024).

train*.jsonl, val*.jsonl, one object a line: {"q_img": PATH, "q_text": [TEXT, ...], "t_img": PATH, "hns": [PATH, ...]}
with paths below the image folder, by default the root; `hns` may be left out.

These are the fields of MegaPairs' data set card, where hns[0] is the query image itself: it is left out here, because
the loss `reference_negative` adds it. How the release names its files is not documented: rename them. It has no split
to evaluate: hold some lines out as val.jsonl, whose gallery is all images that the file names. Files are read whole.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

from cliplab.benchmark import TRIPLETS_PROTOCOLS, Benchmark, Protocol
from cliplab.data.captions import EVAL_JOINS, training_samples
from cliplab.data.dataset import QUERY_FEATURES, TRAIN_FEATURES, RetrievalDataset, gallery_table, no_rows
from cliplab.data.images import ImageFolder
from cliplab.errors import UserError

SPLITS = ("train", "val")
FEATURES = Features({**TRAIN_FEATURES, "negatives": List(Value("string"))})


@dataclass(frozen=True)
class Triplet:
    """One line: image paths as they stand there."""

    reference: str
    texts: tuple[str, ...]
    target: str
    negatives: tuple[str, ...]  # without the reference and the target

    @property
    def images(self) -> tuple[str, ...]:
        """All that it names."""
        return (self.reference, self.target, *self.negatives)


class Triplets(RetrievalDataset):
    """JSON lines of query image, query texts, target and hard negatives."""

    benchmark_name = "triplets"
    default_protocol = "plain"
    protocol_table = TRIPLETS_PROTOCOLS
    protocols = tuple(TRIPLETS_PROTOCOLS)
    protocol_fields = ("exclude_reference", "train_join", "missing_images")

    def __init__(
        self, root: str | Path, images: str | Path | None = None, categories: Iterable[str] | None = None
    ) -> None:
        super().__init__(root, images if images is not None else root, categories)
        self._triplets: dict[str, list[Triplet]] = {}

    def annotation_files(self) -> list[Path]:
        """Those that are there."""
        return [path for split in SPLITS for path in self._files(split)]

    def _files(self, split: str) -> list[Path]:
        if split not in SPLITS:
            raise UserError(f"data.split={split}: triplets have {', '.join(SPLITS)}")
        return sorted(self.root.glob(f"{split}*.jsonl"))

    def triplets(self, split: str) -> list[Triplet]:
        """The lines of a split, in the order of its files. Raises UserError naming file and line."""
        if split not in self._triplets:
            self._triplets[split] = [triplet for path in self._files(split) for triplet in read_triplets(path)]
        return self._triplets[split]

    @property
    def folder(self) -> ImageFolder:
        """The images where the lines place them."""
        if self._folder is None:
            names = {name for split in SPLITS for triplet in self.triplets(split) for name in triplet.images}
            self._folder = ImageFolder.of(self.image_root, {name: name for name in sorted(names)})
        return self._folder

    def check(self, protocol: Protocol, splits: Iterable[str]) -> None:
        """Lines there and well formed; pictures there unless the policy is `report`."""
        for split in dict.fromkeys(splits):
            self._check_split(split, protocol)

    def _check_split(self, split: str, protocol: Protocol) -> None:
        if not self._files(split):
            hint = "; hold some lines of the training file out" if split == "val" else ""
            raise UserError(f"no {split}*.jsonl in {self.root.resolve()} (data.root){hint}")
        if not self.triplets(split):
            raise no_rows(self._files(split)[0], split)
        self.check_images(
            {name for triplet in self.triplets(split) for name in triplet.images}, protocol.missing_images
        )

    def check_negatives(self) -> None:
        """Raise UserError for a training line without a hard negative whose picture is there."""
        for number, triplet in enumerate(self.triplets("train"), 1):
            if not any(name in self.folder for name in triplet.negatives):
                raise UserError(
                    f"{self._files('train')[0]}: triplet {number} ({triplet.reference} to {triplet.target}) names no "
                    "hard negative (hns) besides its own images: add one, or leave data.hard_negatives at 0"
                )

    def train_table(self, protocol: Protocol) -> Dataset:
        """One sample a line, with the column `negatives` (paths); without missing images (policy `report` only)."""
        self._check_split("train", protocol)
        rows: dict[str, list[Any]] = {key: [] for key in FEATURES}
        ids: dict[str, int] = {}
        for triplet in self.triplets("train"):
            if triplet.reference not in self.folder or triplet.target not in self.folder:
                continue
            for texts in training_samples(protocol.train_join, triplet.texts, ""):
                rows["reference"].append(self.folder.path(triplet.reference))
                rows["target"].append(self.folder.path(triplet.target))
                rows["reference_id"].append(ids.setdefault(triplet.reference, len(ids)))
                rows["target_id"].append(ids.setdefault(triplet.target, len(ids)))
                rows["texts"].append([protocol.prompt.format(text) for text in texts])
                rows["negatives"].append([self.folder.path(n) for n in triplet.negatives if n in self.folder])
        return Dataset.from_dict(rows, features=FEATURES)

    def benchmarks(self, protocol: Protocol, split: str) -> list[Benchmark]:
        """One: each text of a line is a query; all images that the split names are the gallery."""
        self._check_split(split, protocol)
        triplets = self.triplets(split)
        names = list(dict.fromkeys(name for triplet in triplets for name in triplet.images))
        kept = [name for name in names if name in self.folder]
        rows = {name: row for row, name in enumerate(kept)}
        asked = [
            (number, triplet, text)
            for number, triplet in enumerate(triplets)
            if triplet.reference in rows and triplet.target in rows
            for text in EVAL_JOINS[protocol.caption_join](triplet.texts, "")
        ]
        if not asked:
            raise UserError(f"{self._files(split)[0]}: no query is left, as pictures are missing in {self.image_root}")
        left_out = sum(not {triplet.reference, triplet.target} <= rows.keys() for triplet in triplets)
        queries = {
            "query_id": list(range(len(asked))),
            "reference_id": [rows[triplet.reference] for _, triplet, _ in asked],
            "image": [self.folder.path(triplet.reference) for _, triplet, _ in asked],
            "text": [protocol.prompt.format(text) for _, _, text in asked],
        }
        return [
            Benchmark(
                "triplets",
                protocol,
                Dataset.from_dict(queries, features=QUERY_FEATURES),
                gallery_table(kept, images=[self.folder.path(name) for name in kept]),
                [[rows[triplet.target]] for _, triplet, _ in asked],
                [f"{number}:{text}" for number, _, text in asked],
                excluded={"gallery_rows": len(names) - len(kept), "queries": left_out},
            )
        ]

    def counts(self) -> dict[str, Any]:
        """Per split, from the lines that are there."""
        return {
            split: {
                "records": len(self.triplets(split)),
                "images": len({name for triplet in self.triplets(split) for name in triplet.images}),
                "hard_negatives": sum(len(triplet.negatives) for triplet in self.triplets(split)),
                "empty_captions": sum(not text.strip() for t in self.triplets(split) for text in t.texts),
            }
            for split in SPLITS
            if self._files(split)
        }


def read_triplets(path: Path) -> list[Triplet]:
    """The triplets of a file of JSON lines; empty lines are skipped. Raises UserError naming file and line."""
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            return [_triplet(f"{path}: line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {path}: {error}") from error


def _triplet(where: str, line: str) -> Triplet:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    for key in ("q_img", "q_text", "t_img"):
        if not isinstance(row, dict) or key not in row:
            raise UserError(
                f'{where} has no \'{key}\'; a line is {{"q_img": PATH, "q_text": [TEXT], "t_img": PATH, '
                '"hns": [PATH]}}'
            )
    texts = [row["q_text"]] if isinstance(row["q_text"], str) else row["q_text"]
    mined = row.get("hns") or []
    lists_of_strings = all(
        isinstance(each, list) and all(isinstance(item, str) for item in each)
        for each in (texts, mined, [row["q_img"], row["t_img"]])
    )
    if not lists_of_strings or not any(text.strip() for text in texts):
        raise UserError(f"{where}: q_img and t_img must be paths, q_text one text or more, and hns a list of paths")
    # A path stands in many lines: it is kept once.
    reference, target, *mined = (sys.intern(name) for name in (row["q_img"], row["t_img"], *mined))
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in (reference, target, *mined)):
        raise UserError(f"{where}: the paths of images must lie below the image folder (data.images)")
    negatives = tuple(name for name in dict.fromkeys(mined) if name not in (reference, target))
    return Triplet(reference, tuple(texts), target, negatives)
