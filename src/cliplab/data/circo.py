"""CIRCO (Baldrati et al., ICCV 2023) in its released layout.

annotations/{val,test}.json                                     queries
COCO2017_unlabeled/annotations/image_info_unlabeled2017.json    the gallery, in the order of its `images`
COCO2017_unlabeled/unlabeled2017/000000000042.jpg               123,403 pictures

Zero-shot: there is no training split. Test targets are known to the server alone: its test is a submission.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from cliplab.benchmark import CIRCO_PROTOCOLS, Benchmark, Protocol
from cliplab.data.captions import EVAL_JOINS
from cliplab.data.dataset import QUERY_FEATURES, RetrievalDataset, gallery_table, no_rows, read_json
from cliplab.data.images import ImageFolder
from cliplab.errors import UserError

SPLITS = ("val", "test")
SOURCE = "https://github.com/miccunifi/CIRCO"
UNLABELED = "COCO2017_unlabeled"


@dataclass(frozen=True)
class Record:
    """One query."""

    id: int
    reference: int
    caption: str
    shared_concept: str
    target: int | None  # None in test
    relevant: tuple[int, ...]  # all ground truths, the target first; empty in test
    aspects: tuple[str, ...]


class CIRCO(RetrievalDataset):
    """The released annotations and COCO's unlabeled pictures of 2017."""

    benchmark_name = "circo"
    default_protocol = "searle"
    protocol_table = CIRCO_PROTOCOLS
    protocols = tuple(CIRCO_PROTOCOLS)
    protocol_fields = ("exclude_reference", "caption_join", "missing_images")

    def __init__(
        self, root: str | Path, images: str | Path | None = None, categories: Iterable[str] | None = None
    ) -> None:
        super().__init__(root, images or Path(root) / UNLABELED / "unlabeled2017", categories)
        self._records: dict[str, list[Record]] = {}
        self._gallery: list[int] | None = None

    def query_file(self, split: str) -> Path:
        """Where the queries of a split are."""
        if split not in SPLITS:
            raise UserError(f"CIRCO has no split '{split}': it is zero-shot and has {', '.join(SPLITS)} (use eval.py)")
        return self.root / "annotations" / f"{split}.json"

    @property
    def gallery_file(self) -> Path:
        """Where the gallery is listed."""
        return self.root / UNLABELED / "annotations" / "image_info_unlabeled2017.json"

    def annotation_files(self) -> list[Path]:
        """Those that exist."""
        return [path for path in (*map(self.query_file, SPLITS), self.gallery_file) if path.is_file()]

    @property
    def folder(self) -> ImageFolder:
        """The pictures of the gallery."""
        if self._folder is None:
            self._folder = ImageFolder.of(self.image_root, {str(i): f"{i:012d}.jpg" for i in self.gallery()})
        return self._folder

    def gallery(self) -> list[int]:
        """Image ids in the order of the list. Raises UserError naming the file."""
        if self._gallery is None:
            self._gallery = read_gallery(self.gallery_file)
        return self._gallery

    def records(self, split: str) -> list[Record]:
        """The queries of a split in the file's order. Raises UserError naming file and record."""
        if split not in self._records:
            self._records[split] = read_records(self.query_file(split), has_target=split == "val")
        return self._records[split]

    def _asked(self, split: str) -> list[Record]:
        if not self.records(split):
            raise no_rows(self.query_file(split), split)
        return self.records(split)

    def check(self, protocol: Protocol, splits: Iterable[str]) -> None:
        """Annotations there and well formed; pictures there unless the policy is `report`."""
        splits = tuple(dict.fromkeys(splits))
        absent = [path for path in (*map(self.query_file, splits), self.gallery_file) if not path.is_file()]
        if absent:
            raise UserError(
                f"CIRCO is not complete in {self.root.resolve()}. Missing: {', '.join(map(str, absent))}. The queries "
                f"come from {SOURCE}, pictures and image_info_unlabeled2017.json from https://cocodataset.org. Set "
                "data.root, or run without any download: python train.py --config configs/quickstart.yaml"
            )
        known = set(self.gallery())
        for split in splits:
            for record in self._asked(split):
                lost = [number for number in (record.reference, *record.relevant) if number not in known]
                if lost:
                    raise UserError(
                        f"{self.query_file(split)}: query {record.id} names the image {lost[0]}, which "
                        f"{self.gallery_file} lacks"
                    )
        self.check_images(map(str, self.gallery()), protocol.missing_images)

    def train_table(self, protocol: Protocol) -> Dataset:
        """Raises UserError: there is nothing to train on."""
        raise UserError("CIRCO has no training split: train on another data set and evaluate with eval.py")

    def benchmarks(self, protocol: Protocol, split: str) -> list[Benchmark]:
        """One: recall on the single target, mean average precision over all ground truths, and per semantic aspect.

        The test split has no targets: its benchmark has empty positives and gives predictions alone.
        """
        self.check_images(map(str, self.gallery()), protocol.missing_images)
        kept = [str(number) for number in self.gallery() if str(number) in self.folder]
        rows = {name: row for row, name in enumerate(kept)}
        asked = [r for r in self._asked(split) if all(str(n) in rows for n in (r.reference, *r.relevant))]
        if not asked:
            raise UserError(f"{self.query_file(split)}: no query is left, as pictures are missing in {self.image_root}")
        texts = [EVAL_JOINS[protocol.caption_join]((r.caption, r.shared_concept), "")[0] for r in asked]
        queries = {
            "query_id": list(range(len(asked))),
            "reference_id": [rows[str(record.reference)] for record in asked],
            "image": [self.folder.path(str(record.reference)) for record in asked],
            "text": [protocol.prompt.format(text) for text in texts],
        }
        aspects = sorted({aspect for record in asked for aspect in record.aspects})
        groups = {a: [number for number, record in enumerate(asked) if a in record.aspects] for a in aspects}
        has_targets = split == "val"
        return [
            Benchmark(
                "circo",
                protocol,
                Dataset.from_dict(queries, features=QUERY_FEATURES),
                gallery_table(kept, images=[self.folder.path(name) for name in kept]),
                [[rows[str(record.target)]] if record.target is not None else [] for record in asked],
                [str(record.id) for record in asked],
                excluded={
                    "gallery_rows": len(self.gallery()) - len(kept),
                    "queries": len(self.records(split)) - len(asked),
                },
                relevant=[[rows[str(number)] for number in record.relevant] for record in asked]
                if has_targets
                else None,
                groups=groups if has_targets else None,
                blind=not has_targets,
            )
        ]

    def counts(self) -> dict[str, Any]:
        """Per split, from the annotations that are there."""
        found: dict[str, Any] = {}
        for split in (split for split in SPLITS if self.query_file(split).is_file()):
            records = self.records(split)
            found[split] = {"records": len(records), "empty_captions": sum(not r.caption.strip() for r in records)}
            if split == "val":
                names = sorted({aspect for record in records for aspect in record.aspects})
                found[split]["ground_truths"] = sum(len(record.relevant) for record in records)
                found[split]["aspects"] = {name: sum(name in r.aspects for r in records) for name in names}
        if self.gallery_file.is_file():
            found["gallery"] = len(self.gallery())
        return found


def read_records(path: Path, has_target: bool) -> list[Record]:
    """The queries of a file in its order; those of test have no targets. Raises UserError naming file and query."""
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path} must hold a JSON list, found {type(content).__name__}")
    return [_record(path, number, row, has_target) for number, row in enumerate(content)]


def read_gallery(path: Path) -> list[int]:
    """The image ids of image_info_unlabeled2017.json in its order. Raises UserError naming the file."""
    content = read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    rows = images if isinstance(images, list) else []
    ids = [row["id"] for row in rows if isinstance(row, dict) and type(row.get("id")) is int]
    if not ids or len(ids) < len(rows):
        raise UserError(f"{path} must hold a list 'images' of objects with a number 'id'")
    if len(set(ids)) < len(ids):
        raise UserError(f"{path} lists an image twice")
    return ids


def _record(path: Path, number: int, row: Any, has_target: bool) -> Record:
    """Check one query; test has no targets."""
    where = f"{path}: query {number}"
    kinds: dict[str, type] = {"reference_img_id": int, "relative_caption": str, "shared_concept": str, "id": int}
    kinds |= {"target_img_id": int, "gt_img_ids": list, "semantic_aspects": list} if has_target else {}
    for key, kind in kinds.items():
        if not isinstance(row, dict) or key not in row:
            raise UserError(f"{where} has no '{key}'")
        if type(row[key]) is not kind:
            raise UserError(f"{where}: '{key}' must be {kind.__name__}, found {row[key]!r}")
    if row["id"] != number:
        raise UserError(f"{where} has the id {row['id']}: ids must count up from 0 in file order")
    relevant = tuple(row["gt_img_ids"]) if has_target else ()
    aspects = tuple(row["semantic_aspects"]) if has_target else ()
    if not all(type(number) is int for number in relevant) or not all(isinstance(a, str) for a in aspects):
        raise UserError(f"{where}: gt_img_ids must be image ids and semantic_aspects names")
    if len(set(aspects)) < len(aspects):
        raise UserError(f"{where}: semantic_aspects names one twice: {', '.join(aspects)}")
    if has_target and (not relevant or relevant[0] != row["target_img_id"] or len(set(relevant)) < len(relevant)):
        raise UserError(f"{where}: gt_img_ids must be different ids and begin with target_img_id")
    if row["reference_img_id"] in relevant:
        raise UserError(f"{where}: the reference {row['reference_img_id']} is one of its own gt_img_ids")
    target = row["target_img_id"] if has_target else None
    words = (row["relative_caption"], row["shared_concept"])
    return Record(row["id"], row["reference_img_id"], *words, target, relevant, aspects)
