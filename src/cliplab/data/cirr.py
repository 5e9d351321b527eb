"""CIRR (Liu et al., ICCV 2021) in its released layout.

cirr/captions/cap.rc2.{train,val,test1}.json       [{pairid, reference, target_hard, target_soft, caption, img_set}]
cirr/image_splits/split.rc2.{train,val,test1}.json {"NAME": "./dev/NAME.png"}, paths below the image root
train/, dev/, test1/                               NLVR2's pictures

The annotations may also lie in the root itself. Test targets are known to the server alone: its test is a submission.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset

from cliplab.benchmark import CIRR_PROTOCOLS, Benchmark, Protocol
from cliplab.data.captions import EVAL_JOINS, training_samples
from cliplab.data.dataset import QUERY_FEATURES, TRAIN_FEATURES, RetrievalDataset, gallery_table, no_rows, read_json
from cliplab.data.images import ImageFolder
from cliplab.errors import UserError

FILES = {"train": "train", "val": "val", "test": "test1"}
SOURCE = "https://github.com/Cuberick-Orion/CIRR (branch cirr_dataset)"
MEMBERS = 6


@dataclass(frozen=True)
class Record:
    """One annotation row."""

    pairid: int
    reference: str
    caption: str
    members: tuple[str, ...]  # six look-alikes, the reference among them
    target: str | None  # None in test1
    soft: Mapping[str, float]  # graded targets; empty in test1


class CIRR(RetrievalDataset):
    """The released annotations; NLVR2's pictures below `images`, by default the root."""

    benchmark_name = "cirr"
    default_protocol = "clip4cir"
    protocol_table = CIRR_PROTOCOLS
    protocols = tuple(CIRR_PROTOCOLS)
    protocol_fields = ("exclude_reference", "caption_join", "train_join", "missing_images", "subset_at", "target")

    def __init__(
        self, root: str | Path, images: str | Path | None = None, categories: Iterable[str] | None = None
    ) -> None:
        super().__init__(root, images if images is not None else root, categories)
        self._records: dict[str, list[Record]] = {}
        self._places: dict[str, dict[str, str]] = {}

    @cached_property
    def annotations(self) -> Path:
        """The folder that holds captions/ and image_splits/."""
        return self.root / "cirr" if (self.root / "cirr").is_dir() else self.root

    def caption_file(self, split: str) -> Path:
        """Where the records of a split are."""
        return self.annotations / "captions" / f"cap.rc2.{_file_of(split)}.json"

    def split_file(self, split: str) -> Path:
        """Where the names and paths of a split's images are."""
        return self.annotations / "image_splits" / f"split.rc2.{_file_of(split)}.json"

    def annotation_files(self) -> list[Path]:
        """Those that exist."""
        files = [kind(split) for kind in (self.caption_file, self.split_file) for split in FILES]
        return [path for path in files if path.is_file()]

    @property
    def folder(self) -> ImageFolder:
        """The images where the split files place them."""
        if self._folder is None:
            places = [self.places(split) for split in FILES if self.split_file(split).is_file()]
            self._folder = ImageFolder.of(self.image_root, {n: p for each in places for n, p in each.items()})
        return self._folder

    def places(self, split: str) -> dict[str, str]:
        """Image name -> path below the image root, in the file's order. Raises UserError naming file and image."""
        if split not in self._places:
            path = self.split_file(split)
            content = read_json(path)
            if not isinstance(content, dict) or not all(isinstance(place, str) for place in content.values()):
                raise UserError(f"{path} must map image names to paths")
            for name, place in content.items():
                if Path(place).stem != name or Path(place).is_absolute() or ".." in Path(place).parts:
                    raise UserError(f"{path}: the path '{place}' of '{name}' is not that of its picture")
            self._places[split] = content
        return self._places[split]

    def records(self, split: str) -> list[Record]:
        """The records of a split, in the file's order. Raises UserError naming file and record."""
        if split not in self._records:
            path, images = self.caption_file(split), self.places(split)
            records = read_records(path, has_target=split != "test")
            for number, record in enumerate(records):
                named = [record.reference, *([record.target] if record.target is not None else []), *record.members]
                lost = [name for name in (*named, *record.soft) if name not in images]
                if lost:
                    raise UserError(f"{path}: record {number} names '{lost[0]}', which {self.split_file(split)} lacks")
            self._records[split] = records
        return self._records[split]

    def check(self, protocol: Protocol, splits: Iterable[str]) -> None:
        """Annotations there and well formed, no image in two splits; pictures there unless the policy is `report`."""
        splits = tuple(dict.fromkeys(splits))
        absent = [p for split in splits for p in (self.caption_file(split), self.split_file(split)) if not p.is_file()]
        if absent:
            missing = ", ".join(map(str, absent))
            raise UserError(
                f"CIRR is not complete in {self.root.resolve()}. Missing: {missing}. The annotations "
                f"come from {SOURCE}, the pictures from NLVR2 by request. Set data.root, or run without any download: "
                "python train.py --config configs/quickstart.yaml"
            )
        seen: dict[str, str] = {}
        for split in (split for split in FILES if self.split_file(split).is_file()):
            for name in self.places(split):
                if seen.setdefault(name, split) != split:
                    raise UserError(f"{self.split_file(split)}: '{name}' is also an image of the split '{seen[name]}'")
        for split in splits:
            self._check_split(split, protocol)
            if protocol.target == "soft" and split == "val":  # training reads no grades
                self._check_grades(split)

    def _check_split(self, split: str, protocol: Protocol) -> None:
        """Raise UserError for an empty list, a malformed record, and under the policy `error` a missing picture."""
        if not self.places(split):
            raise no_rows(self.split_file(split), split)
        if not self.records(split):
            raise no_rows(self.caption_file(split), split)
        self.check_images(self.places(split), protocol.missing_images)

    def _check_grades(self, split: str) -> None:
        """Raise UserError for a record that grades no image but its reference, which is never found."""
        for number, record in enumerate(self.records(split)):
            if not {*record.soft} - {record.reference}:
                raise UserError(
                    f"{self.caption_file(split)}: record {number} (pairid {record.pairid}) grades no image besides the "
                    f"reference in target_soft, which this protocol's target=soft needs: {dict(record.soft)}"
                )

    def train_table(self, protocol: Protocol) -> Dataset:
        """One sample per record; records with a missing image are left out (policy `report` only)."""
        self._check_split("train", protocol)
        rows: dict[str, list[Any]] = {key: [] for key in TRAIN_FEATURES}
        ids = {name: row for row, name in enumerate(self.places("train"))}
        for record in self.records("train"):
            if record.target is None or record.reference not in self.folder or record.target not in self.folder:
                continue
            for texts in training_samples(protocol.train_join, (record.caption,), ""):
                rows["reference"].append(self.folder.path(record.reference))
                rows["target"].append(self.folder.path(record.target))
                rows["reference_id"].append(ids[record.reference])
                rows["target_id"].append(ids[record.target])
                rows["texts"].append([protocol.prompt.format(text) for text in texts])
        return Dataset.from_dict(rows, features=TRAIN_FEATURES)

    def benchmarks(self, protocol: Protocol, split: str) -> list[Benchmark]:
        """One: all images of the split are the gallery, the reference is taken out of it by the protocol.

        The test split has no targets: its benchmark has empty positives and gives predictions alone.
        """
        self._check_split(split, protocol)
        is_soft = protocol.target == "soft" and split != "test"
        if is_soft:
            self._check_grades(split)
        kept = [name for name in self.places(split) if name in self.folder]
        rows = {name: row for row, name in enumerate(kept)}
        asked = [r for r in self.records(split) if r.reference in rows and (r.target is None or r.target in rows)]
        if is_soft:
            asked = [record for record in asked if (rows.keys() & record.soft.keys()) - {record.reference}]
        if not asked:
            raise UserError(
                f"{self.caption_file(split)}: no query is left, as pictures are missing in {self.image_root}"
            )
        texts = [EVAL_JOINS[protocol.caption_join]((record.caption,), "") for record in asked]
        queries = {
            "query_id": [number for number, wordings in enumerate(texts) for _ in wordings],
            "reference_id": [rows[record.reference] for record, each in zip(asked, texts, strict=True) for _ in each],
            "image": [
                self.folder.path(record.reference) for record, each in zip(asked, texts, strict=True) for _ in each
            ],
            "text": [protocol.prompt.format(text) for wordings in texts for text in wordings],
        }
        subsets = [[rows[n] for n in r.members if n != r.reference and n in rows] for r in asked]
        gains = [{rows[n]: grade for n, grade in r.soft.items() if n != r.reference and n in rows} for r in asked]
        return [
            Benchmark(
                "cirr",
                protocol,
                Dataset.from_dict(queries, features=QUERY_FEATURES),
                gallery_table(kept, images=[self.folder.path(name) for name in kept]),
                [[rows[record.target]] if record.target is not None else [] for record in asked],
                [str(record.pairid) for record in asked],
                excluded={
                    "gallery_rows": len(self.places(split)) - len(kept),
                    "queries": len(self.records(split)) - len(asked),
                },
                subsets=subsets,
                blind=split == "test",
                gains=gains if is_soft else None,
            )
        ]

    def counts(self) -> dict[str, Any]:
        """Per split, from the annotations that are there."""
        return {split: self._split_counts(split) for split in FILES if self.split_file(split).is_file()}

    def _split_counts(self, split: str) -> dict[str, Any]:
        found: dict[str, Any] = {"images": len(self.places(split))}
        if not self.caption_file(split).is_file():
            return found
        records = self.records(split)
        found |= {
            "records": len(records),
            "references": len({record.reference for record in records}),
            "empty_captions": sum(not record.caption.strip() for record in records),
        }
        if split != "test":
            found["records_with_one_soft_target"] = sum(len(record.soft) == 1 for record in records)
        return found


def _file_of(split: str) -> str:
    if split not in FILES:
        raise UserError(f"data.split={split}: CIRR has {', '.join(FILES)}")
    return FILES[split]


def read_records(path: Path, has_target: bool) -> list[Record]:
    """The records of a file in its order; those of test1 have no targets. Raises UserError naming file and record."""
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path} must hold a JSON list, found {type(content).__name__}")
    records = [_record(path, number, row, has_target) for number, row in enumerate(content)]
    first: dict[int, int] = {}
    for number, record in enumerate(records):
        if first.setdefault(record.pairid, number) != number:
            raise UserError(f"{path}: records {first[record.pairid]} and {number} share the pairid {record.pairid}")
    return records


def _record(path: Path, number: int, row: Any, has_target: bool) -> Record:
    """Check one annotation row; test1 has no targets."""
    where = f"{path}: record {number}"
    keys = ("pairid", "reference", "caption", "img_set", *(("target_hard", "target_soft") if has_target else ()))
    for key in keys:
        if not isinstance(row, dict) or key not in row:
            raise UserError(f"{where} has no '{key}'")
    members = row["img_set"].get("members") if isinstance(row["img_set"], dict) else None
    if not isinstance(members, list) or len(members) != MEMBERS or len(set(map(str, members))) != MEMBERS:
        raise UserError(f"{where}: img_set.members must be {MEMBERS} different image names, found {members!r}")
    names = [row["reference"], *members, *([row["target_hard"]] if has_target else [])]
    if not all(isinstance(name, str) for name in (*names, row["caption"])):
        raise UserError(f"{where}: image names and the caption must be strings")
    if type(row["pairid"]) is not int or row["reference"] not in members:
        raise UserError(f"{where}: pairid must be a number, and the reference one of img_set.members")
    if has_target and row["target_hard"] == row["reference"]:
        raise UserError(f"{where}: target_hard is the reference itself")
    soft = row.get("target_soft", {}) if has_target else {}
    grades: list[Any] = list(soft.values()) if isinstance(soft, dict) else [None]
    if not all(type(grade) in (int, float) and abs(grade) < 2**31 for grade in grades):  # no NaN, no Infinity
        raise UserError(f"{where}: target_soft must map image names to finite grades, found {soft!r}")
    target = row["target_hard"] if has_target else None
    return Record(row["pairid"], row["reference"], row["caption"], tuple(members), target, soft)
