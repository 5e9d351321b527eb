"""What every data set gives: training records, benchmarks, counts and a manifest. Annotations only; no pixels here."""

import gzip
import hashlib
import json
import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, Features, List, Value

from cliplab.benchmark import PROTOCOLS, Benchmark, Protocol, make_protocol
from cliplab.data.images import ImageFolder
from cliplab.errors import UserError

log = logging.getLogger(__name__)

STAND_IN_MARKER = "STAND_INS.txt"
SHARED_FIELDS = ("prompt", "ties", "recall_at", "map_at")  # of a protocol: they change something on every data set
QUERY_FEATURES = Features(
    {"query_id": Value("int64"), "reference_id": Value("int64"), "image": Value("string"), "text": Value("string")}
)
GALLERY_FEATURES = Features({"id": Value("string"), "image": Value("string"), "text": Value("string")})
TRAIN_FEATURES = Features(
    {
        "reference": Value("string"),
        "target": Value("string"),
        "reference_id": Value("int64"),
        "target_id": Value("int64"),
        "texts": List(Value("string")),
    }
)


class RetrievalDataset(ABC):
    """Annotations on disk, read once. Subclasses: one file per data set.

    A training table has the columns `reference` (image path or None), `target` (image path), `reference_id` (-1 =
    none), `target_id` (rows of the data set's images) and `texts` (one is drawn at random each epoch).
    """

    benchmark_name: ClassVar[str]  # under which published numbers are looked up
    default_protocol: ClassVar[str]
    protocols: ClassVar[tuple[str, ...]]  # those of its table that it can be asked under
    protocol_table: ClassVar[Mapping[str, Protocol]] = PROTOCOLS
    protocol_fields: ClassVar[tuple[str, ...]]  # those that change something here, besides SHARED_FIELDS
    same_image: ClassVar[str] = "ignore"  # what data.same_image=null means: separate, positives, ignore
    own_split: str = "val"  # the split that `test/...` metrics are measured on
    asked_split: str | None = None  # another one, of the user's choice

    def __init__(
        self, root: str | Path, images: str | Path | None = None, categories: Iterable[str] | None = None
    ) -> None:
        self.root = Path(root)
        self.image_root = Path(images) if images is not None else self.root / "images"
        self.categories = self._chosen(categories)
        self.missing: list[str] = []  # images that `check` did not find and the policy `report` left out
        self._folder: ImageFolder | None = None

    @classmethod
    def make_protocol(cls, changes: Mapping[str, Any], key: str = "") -> Protocol:
        """The default protocol or the one that `changes` names, with its other fields changed. Raises UserError."""
        part = {"name": cls.default_protocol, **changes}
        if part["name"] in cls.protocol_table and part["name"] not in cls.protocols:
            where = key or f"data.name={cls.benchmark_name}"
            raise UserError(f"protocol '{part['name']}' is none of {where}: there is: {', '.join(cls.protocols)}")
        return make_protocol(part, cls.protocol_table, (*cls.protocol_fields, *SHARED_FIELDS), cls.benchmark_name)

    @property
    def all_categories(self) -> tuple[str, ...]:
        """The parts of the data set that can be chosen; most have none."""
        return ()

    def prepare(self) -> None:  # noqa: B027 - most data sets have nothing to prepare
        """Create what can be created (rendered data); nothing for downloaded data."""

    @abstractmethod
    def check(self, protocol: Protocol, splits: Iterable[str]) -> None:
        """Raise UserError unless the annotations and images that `splits` need are there and well formed."""

    def check_negatives(self) -> None:
        """Raise UserError unless every training sample names hard negatives (the column `negatives`, of paths)."""
        raise UserError(f"data.hard_negatives: data.name={self.benchmark_name} names none; data.name=triplets does")

    @abstractmethod
    def train_table(self, protocol: Protocol) -> Dataset:
        """The training samples under the protocol's `train_join`."""

    @abstractmethod
    def benchmarks(self, protocol: Protocol, split: str) -> list[Benchmark]:
        """The benchmarks of a split, one per category or direction."""

    @abstractmethod
    def counts(self) -> dict[str, Any]:
        """Records, images, empty captions and what else a loader must reproduce; needs no pixels."""

    @abstractmethod
    def annotation_files(self) -> list[Path]:
        """The annotation files that are there."""

    @property
    def test_split(self) -> str:
        """The split that `test/...` metrics are measured on."""
        return self.asked_split or self.own_split

    @property
    def folder(self) -> ImageFolder:
        """The image folder, listed once."""
        if self._folder is None:
            self._folder = ImageFolder(self.image_root)
        return self._folder

    @property
    def stand_ins(self) -> bool:
        """Whether the pictures are stand-ins for photographs that can't be had (marked by a file in the folder)."""
        return (self.image_root / STAND_IN_MARKER).is_file()

    def check_images(self, names: Iterable[str], policy: str) -> None:
        """Raise UserError for missing images under the policy `error`; under `report` remember and log them."""
        missing = self.folder.missing(names)
        if missing and (policy == "error" or len(self.folder) == 0):
            raise _missing_images_error(missing, self.image_root)
        new = set(missing) - set(self.missing)
        if new:
            log.warning("%d image(s) are missing in %s and left out", len(new), self.image_root)
            self.missing = sorted({*self.missing, *new})

    def image_sizes(self) -> list[tuple[str, int]]:
        """(name, bytes) of every image, sorted by name."""
        return self.folder.sizes()

    def manifest_hash(self) -> str:
        """SHA-256 over the annotation files' bytes and the names and sizes of all images."""
        digest = hashlib.sha256()
        for path in self.annotation_files():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        for name, size in self.image_sizes():
            digest.update(f"{name}\0{size}\n".encode())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """What results.json says of the data."""
        counts = self.counts()
        return {
            "name": self.benchmark_name,
            "categories": list(self.categories),
            "counts": counts,
            "empty_captions": _empty_by_split(counts),
            "manifest_hash": self.manifest_hash(),
            "stand_in_images": self.stand_ins,
            "missing_images": {"count": len(self.missing), "first": self.missing[:10]},
        }

    def empty_captions(self) -> dict[str, int]:
        """By split: captions that are empty or blank. They are allowed, and reported."""
        return _empty_by_split(self.counts())

    def _chosen(self, categories: Iterable[str] | None) -> tuple[str, ...]:
        if categories is None:
            return self.all_categories
        chosen = tuple(categories)
        unknown = [name for name in chosen if name not in self.all_categories]
        if unknown or not chosen:
            raise UserError(f"data.categories: unknown {unknown}; there is: {', '.join(self.all_categories) or 'none'}")
        return chosen


def query_table(images: list[str] | None = None, texts: list[str] | None = None) -> Dataset:
    """Queries of one modality without a reference, one row each."""
    count = len(images if images is not None else texts or [])
    columns = {
        "query_id": list(range(count)),
        "reference_id": [-1] * count,
        "image": images or [None] * count,
        "text": texts or [None] * count,
    }
    return Dataset.from_dict(columns, features=QUERY_FEATURES)


def gallery_table(names: list[str], images: list[str] | None = None, texts: list[str] | None = None) -> Dataset:
    """A gallery of one modality."""
    empty = [None] * len(names)
    columns = {"id": names, "image": images or empty, "text": texts or empty}
    return Dataset.from_dict(columns, features=GALLERY_FEATURES)


def _empty_by_split(counts: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for key, value in counts.items():
        if not isinstance(value, dict):
            continue
        nested = {key: value["empty_captions"]} if "empty_captions" in value else _empty_by_split(value)
        for split, number in nested.items():
            found[split] = found.get(split, 0) + number
    return found


def read_json(path: Path) -> Any:
    """Parse a .json or .json.gz file. Raises UserError naming the file and the place, or a key that is there twice."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        content = json.loads(raw, object_pairs_hook=_distinct)  # takes a tenth longer: 1.6 s for 38 MB
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (ValueError, OSError, EOFError, RecursionError, zlib.error) as error:
        raise UserError(f"can't read {path}: {error}") from error
    if b"\\ud" in raw.lower():  # escapes may be of half characters, which no text may hold
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            near = str(error.object)[max(error.start - 30, 0) : error.start]
            raise UserError(f"{path} holds half a character (an unpaired surrogate) behind {near!r}") from error
    return content


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file; by itself the parser keeps the last of equal keys in silence."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        within = ", ".join(f"{key!r}: {value!r}" for key, value in pairs[:3])[:100]
        raise UserError(f"the key '{twice}' is there more than once in the object {{{within}, ...}}")
    return content


def no_rows(where: Path | str, split: str, why: str = "the list is empty") -> UserError:
    """The error of a list of records or images that holds none for a split."""
    word = {"train": "training", "val": "validation"}.get(split, split)
    return UserError(f"{where} has no {word} rows: {why}")


def _missing_images_error(missing: list[str], folder: Path) -> UserError:
    """The error of the policy `error`: the first ten names and the count."""
    shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
    return UserError(
        f"{len(missing)} image(s) not found in {folder} (as .jpg, .jpeg or .png): {shown}. Add them, or set "
        "data.protocol.missing_images=report to leave them out and have the counts written into results.json"
    )
