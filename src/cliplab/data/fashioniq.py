"""FashionIQ (Wu et al., CVPR 2021) in its released layout.

captions/cap.{dress,shirt,toptee}.{train,val,test}.json       [{"target", "candidate", "captions": [str, str]}]
image_splits/split.{dress,shirt,toptee}.{train,val,test}.json [image id]
images/ID.{jpg,jpeg,png}                                      in one folder or in one folder per category
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset

from cliplab.benchmark import PROTOCOLS, Benchmark, Protocol
from cliplab.data.captions import EVAL_JOINS, training_samples
from cliplab.data.dataset import (
    GALLERY_FEATURES,
    QUERY_FEATURES,
    TRAIN_FEATURES,
    RetrievalDataset,
    no_rows,
    read_json,
)
from cliplab.errors import UserError

SPLITS = ("train", "val", "test")
SOURCE = "https://github.com/XiaoxiaoGuo/fashion-iq"


@dataclass(frozen=True)
class Record:
    """One annotation row."""

    reference: str
    target: str | None  # None in test files
    captions: tuple[str, str]


class FashionIQ(RetrievalDataset):
    """The released annotations, with photographs of one's own below `images`."""

    benchmark_name = "fashioniq"
    default_protocol = "clip4cir"
    protocols = tuple(name for name, protocol in PROTOCOLS.items() if protocol.hit == "single_target")
    protocol_fields = ("gallery", "exclude_reference", "caption_join", "train_join", "query_unit", "missing_images")

    @property
    def all_categories(self) -> tuple[str, ...]:
        """dress, shirt, toptee."""
        return ("dress", "shirt", "toptee")

    @cached_property
    def _records(self) -> dict[tuple[str, str], list[Record]]:
        return {}

    @cached_property
    def _splits(self) -> dict[tuple[str, str], list[str]]:
        return {}

    def caption_file(self, category: str, split: str) -> Path:
        """Where the records of a category and split are."""
        return self.root / "captions" / f"cap.{category}.{split}.json"

    def split_file(self, category: str, split: str) -> Path:
        """Where the image ids of a category and split are."""
        return self.root / "image_splits" / f"split.{category}.{split}.json"

    def annotation_files(self) -> list[Path]:
        """Of the chosen categories, those that exist."""
        files = [
            kind(category, split)
            for kind in (self.caption_file, self.split_file)
            for category in self.categories
            for split in SPLITS
        ]
        return [path for path in files if path.is_file()]

    def records(self, category: str, split: str) -> list[Record]:
        """The records of a file, in its order. Raises UserError naming file and record."""
        key = (category, split)
        if key not in self._records:
            path = self.caption_file(category, split)
            records = [_record(path, number, row) for number, row in enumerate(_list(path))]
            members = set(self.split_images(category, split))
            for number, record in enumerate(records):
                for role, name in (("candidate", record.reference), ("target", record.target)):
                    if name is not None and name not in members:
                        split_file = self.split_file(category, split)
                        raise UserError(f"{path}: the {role} '{name}' of record {number} is not in {split_file}")
            self._records[key] = records
        return self._records[key]

    def split_images(self, category: str, split: str) -> list[str]:
        """The image ids of a split file, in its order."""
        key = (category, split)
        if key not in self._splits:
            path = self.split_file(category, split)
            names = _list(path)
            wrong = [name for name in names if not isinstance(name, str)]
            if wrong:
                raise UserError(f"{path} must be a list of image ids, found {wrong[0]!r}")
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UserError(f"{path} names the image '{twice}' more than once")
            self._splits[key] = names
        return self._splits[key]

    def gallery(self, category: str, split: str, protocol: Protocol) -> list[str]:
        """The image ids that a query of `category` is ranked against."""
        if protocol.gallery == "original_split":
            return self.split_images(category, split)
        if protocol.gallery == "val_split":
            records = self.records(category, split)
            named = {record.reference for record in records} | {record.target for record in records if record.target}
            return sorted(named)
        union = dict.fromkeys(name for each in self.all_categories for name in self.split_images(each, split))
        return list(union)

    def check(self, protocol: Protocol, splits: Iterable[str]) -> None:
        """Annotations there and well formed; images there unless the policy is `report`."""
        splits = tuple(dict.fromkeys(splits))
        wanted = [kind(c, s) for kind in (self.caption_file, self.split_file) for c in self.categories for s in splits]
        absent = [path for path in wanted if not path.is_file()]
        if absent or not self.image_root.is_dir():
            raise self._absent(absent)
        self._require_rows(splits)
        self._require_one_split()
        self.check_images(self._needed(protocol, splits), protocol.missing_images)

    def _require_one_split(self) -> None:
        """Raise UserError for an image in two splits of a category; the released lists share none."""
        for category in self.categories:
            seen: dict[str, Path] = {}
            for split in SPLITS:
                path = self.split_file(category, split)
                for name in self.split_images(category, split) if path.is_file() else ():
                    if name in seen:
                        raise UserError(f"{path}: '{name}' is also an image of {seen[name]}")
                    seen[name] = path

    def _require_rows(self, splits: Iterable[str]) -> None:
        """Raise UserError naming the first empty list: a category without rows would be left out in silence."""
        for category, split in itertools.product(self.categories, splits):
            if not self.split_images(category, split):
                raise no_rows(self.split_file(category, split), split)
            if not self.records(category, split):
                raise no_rows(self.caption_file(category, split), split)

    def _absent(self, files: list[Path]) -> UserError:
        lines = [f"FashionIQ is not complete in {self.root.resolve()}."]
        if files:
            lines.append("Missing: " + ", ".join(str(path.relative_to(self.root)) for path in files) + ".")
        if not self.image_root.is_dir():
            lines.append(f"Missing: the folder of photographs {self.image_root} (set data.images for another place).")
        lines.append(
            f"The annotations (captions/, image_splits/) come from {SOURCE}; the photographs are not distributed"
        )
        lines.append("with them: their URLs by image id are in https://github.com/hongwang600/fashion-iq-metadata.")
        lines.append("Set data.root to the folder, or run without any download:")
        lines.append("  python train.py --config configs/quickstart.yaml")
        return UserError("\n".join(lines))

    def _needed(self, protocol: Protocol, splits: Iterable[str]) -> set[str]:
        needed: set[str] = set()
        for split in splits:
            for category in self.categories:
                for record in self.records(category, split):
                    needed.update(name for name in (record.reference, record.target) if name)
                if split != "train":
                    needed.update(self.gallery(category, split, protocol))
        return needed

    def train_table(self, protocol: Protocol) -> Dataset:
        """All chosen categories jointly; records with a missing image are left out (policy `report` only)."""
        self._require_rows(("train",))
        self.check_images(self._needed(protocol, ("train",)), protocol.missing_images)
        rows: dict[str, list[Any]] = {key: [] for key in TRAIN_FEATURES}
        ids: dict[str, int] = {}
        for category in self.categories:
            for record in self.records(category, "train"):
                if record.target is None or self._lacks_image(record):
                    continue
                for texts in training_samples(protocol.train_join, record.captions, category):
                    rows["reference"].append(self.folder.path(record.reference))
                    rows["target"].append(self.folder.path(record.target))
                    rows["reference_id"].append(ids.setdefault(record.reference, len(ids)))
                    rows["target_id"].append(ids.setdefault(record.target, len(ids)))
                    rows["texts"].append([protocol.prompt.format(text) for text in texts])
        return Dataset.from_dict(rows, features=TRAIN_FEATURES)

    def _lacks_image(self, record: Record) -> bool:
        return any(name is not None and name not in self.folder for name in (record.reference, record.target))

    def benchmarks(self, protocol: Protocol, split: str) -> list[Benchmark]:
        """One per category."""
        for category in self.categories:
            if any(record.target is None for record in self.records(category, split)):
                raise UserError(f"{self.caption_file(category, split)} has no targets: recall can't be measured on it")
        self._require_rows((split,))
        self.check_images(self._needed(protocol, (split,)), protocol.missing_images)
        return [self._benchmark(category, split, protocol) for category in self.categories]

    def _benchmark(self, category: str, split: str, protocol: Protocol) -> Benchmark:
        names = self.gallery(category, split, protocol)
        kept = [name for name in names if name in self.folder]
        rows = {name: row for row, name in enumerate(kept)}
        queries: dict[str, list[Any]] = {key: [] for key in QUERY_FEATURES}
        positives: list[list[int]] = []
        query_names: list[str] = []
        excluded = {"gallery_rows": len(names) - len(kept), "queries": 0, "empty_captions": 0}
        for record in self.records(category, split):
            assert record.target is not None, "`benchmarks` refuses records without target"
            texts = EVAL_JOINS[protocol.caption_join](record.captions, category)
            groups = [texts] if protocol.query_unit == "record" and texts else [[text] for text in texts]
            excluded["empty_captions"] += len(record.captions) - len(texts) if protocol.query_unit == "caption" else 0
            if self._lacks_image(record) or not groups:
                excluded["queries"] += max(1, len(groups))
                continue
            for number, group in enumerate(groups):
                for text in group:
                    queries["query_id"].append(len(positives))
                    queries["reference_id"].append(rows.get(record.reference, -1))
                    queries["image"].append(self.folder.path(record.reference))
                    queries["text"].append(protocol.prompt.format(text))
                positives.append([rows[record.target]])
                suffix = f"#{number}" if len(groups) > 1 else ""
                query_names.append(f"{record.reference}->{record.target}{suffix}")
        if not positives:
            raise UserError(f"{self.caption_file(category, split)}: no query is left ({excluded} left out)")
        gallery = {"id": kept, "image": [self.folder.path(name) for name in kept], "text": [None] * len(kept)}
        return Benchmark(
            category,
            protocol,
            Dataset.from_dict(queries, features=QUERY_FEATURES),
            Dataset.from_dict(gallery, features=GALLERY_FEATURES),
            positives,
            query_names,
            excluded=excluded,
        )

    def counts(self) -> dict[str, Any]:
        """Per category and split, from the annotations alone."""
        return {category: self._category_counts(category) for category in self.categories}

    def _category_counts(self, category: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for split in SPLITS:
            if not (self.caption_file(category, split).is_file() and self.split_file(category, split).is_file()):
                continue
            records = self.records(category, split)
            captions = [caption for record in records for caption in record.captions]
            found[split] = {
                "records": len(records),
                "split_images": len(self.split_images(category, split)),
                "references": len({record.reference for record in records}),
                "references_and_targets": len(
                    {record.reference for record in records} | {record.target for record in records if record.target}
                ),
                "empty_captions": sum(not caption.strip() for caption in captions),
                "captions_with_outer_spaces": sum(caption != caption.strip() for caption in captions),
            }
            if split == "test":
                del found[split]["references_and_targets"]
        return found


def _list(path: Path) -> list[Any]:
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path} must hold a JSON list, found {type(content).__name__}")
    return content


def _record(path: Path, number: int, row: Any) -> Record:
    """Check one annotation row; only files of the split `test` may lack targets."""
    if not isinstance(row, dict):
        raise UserError(f"{path}: record {number} must be an object, found {type(row).__name__}")
    keys = ("candidate", "captions") if path.stem.endswith(".test") else ("candidate", "captions", "target")
    for key in keys:
        if key not in row:
            raise UserError(f"{path}: record {number} has no '{key}' (it has: {', '.join(row) or 'nothing'})")
    captions = row["captions"]
    if not isinstance(captions, list) or len(captions) != 2 or not all(isinstance(c, str) for c in captions):
        raise UserError(f"{path}: record {number} must have exactly two captions that are strings, found {captions!r}")
    for key in ("candidate", "target"):
        if key in row and not isinstance(row[key], str):
            raise UserError(f"{path}: record {number}: '{key}' must be an image id, found {row[key]!r}")
    return Record(row["candidate"], row.get("target"), (captions[0], captions[1]))
