"""Captions in a `datasets` source: Parquet files, or a data set on the hub, with or without the pictures inside.

A row is an image with all its captions, or with one of them. Columns, the first of each that is there:
captions   caption, captions, sentences, raw, text: a string or a list of strings
name       filename, file_name, image (as a string, or as a picture with a path); else the id and `.jpg`
id         cocoid, image_id, img_id, imgid; optional beside a name
split      split; else the name of the hub's split or of the Parquet file
Pictures in the column `image` are written, as they are, into the image folder before they are first needed.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, Features, Image, load_dataset
from datasets.exceptions import DatasetsError

from cliplab.data.caption_files import SPLIT_NAMES, CaptionedImage, require_texts, split_of
from cliplab.data.dataset import read_json
from cliplab.data.images import EXTENSIONS
from cliplab.errors import UserError

CAPTION_COLUMNS = ("caption", "captions", "sentences", "raw", "text")
NAME_COLUMNS = ("filename", "file_name")
ID_COLUMNS = ("cocoid", "image_id", "img_id", "imgid")
_FAILURES = (OSError, ValueError, ImportError, RuntimeError, DatasetsError)
_SIGNATURES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png"}
Picture = tuple[Dataset, int]  # a table and the row that holds the bytes


def open_hub(name: str) -> dict[str, Dataset]:
    """The splits of a data set on the hub (or of a folder in its layout), by origin. Raises UserError."""
    with _errors_kept() as logged:
        try:
            found = load_dataset(name)
        except _FAILURES as error:
            cause = error.__cause__ or error
            reason = _broken_json(name) or next(iter(logged), str(cause) or type(cause).__name__).splitlines()[0]
            raise UserError(f"data.annotations=hub:{name} can't be loaded: {reason}") from error
    assert isinstance(found, DatasetDict)
    return {f"hub:{name}: split {split}": table for split, table in found.items()}


def open_parquet(path: Path) -> Dataset:
    """The rows of a Parquet file. Raises UserError for a file that is none."""
    with _errors_kept():
        try:
            return Dataset.from_parquet(str(path))  # type: ignore[return-value]
        except _FAILURES as error:
            reason = error.__cause__ or error
            raise UserError(f"{path} is not a readable Parquet file: {reason}") from error


@contextmanager
def _errors_kept() -> Iterator[list[str]]:
    """What `datasets` logs as errors, kept from the screen: most loaders name a broken file there and nowhere else."""
    logged: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            logged.append(record.getMessage())
        return record.levelno < logging.ERROR

    handlers = logging.getLogger("datasets").handlers[:]
    for handler in handlers:
        handler.addFilter(keep)
    try:
        yield logged
    finally:
        for handler in handlers:
            handler.removeFilter(keep)


def _broken_json(folder: str) -> str | None:
    """What is wrong with the first JSON file of a folder that is neither one value nor a value per line."""
    for path in sorted(path for path in Path(folder).rglob("*.json*") if path.suffix in (".json", ".jsonl")):
        try:
            read_json(path)
        except UserError as error:
            number, reason = _broken_line(path)
            if number:
                return str(error) if number == 1 else f"{path}: line {number} is not valid JSON: {reason}"
    return None


def _broken_line(path: Path) -> tuple[int, str]:
    """The first line that is no JSON value and why; 0 where all are."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line.strip() or "null")
            except (ValueError, RecursionError) as error:
                place = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
                return number, f"{getattr(error, 'msg', error)}{place}"
    return 0, ""


def read_table(table: Dataset, origin: str) -> tuple[list[CaptionedImage], dict[str, Picture]]:
    """The images of a table in its order, and the pictures it holds by stem. Raises UserError naming the row."""
    columns = _Columns(table.features, origin)
    if columns.pictures:
        table = table.cast_column("image", Image(decode=False))
    split = None if "split" in table.features else _split(origin)
    shown = table.remove_columns([name for name in table.column_names if name not in columns.used])
    captions: dict[tuple[str, str], list[str]] = {}
    first: dict[tuple[str, str], int] = {}
    for row, record in enumerate(cast(Iterable[dict[str, Any]], shown)):
        place = f"{origin}: row {row}"
        key = (columns.name(record, place), _known_split(record["split"], place) if split is None else split)
        value = record[columns.captions]
        captions.setdefault(key, []).extend(require_texts(value if isinstance(value, list) else [value], place))
        first.setdefault(key, row)
    images = [
        CaptionedImage(name, part, tuple(texts), columns.identity(shown[row]), f"{origin}: row {row}")
        for ((name, part), texts), row in zip(captions.items(), first.values(), strict=True)
    ]
    held = {image.stem: (table, row) for image, row in zip(images, first.values(), strict=True)}
    return images, held if columns.pictures else {}


def write_pictures(pictures: Mapping[str, Picture], stems: Iterable[str], folder: Path) -> None:
    """Write those of `stems` that a table holds into the folder, byte for byte; several processes may do so at once."""
    for stem in stems:
        if stem not in pictures:
            continue
        table, row = pictures[stem]
        content = _bytes_of(table[row]["image"], stem)
        suffix = next((end for start, end in _SIGNATURES.items() if content.startswith(start)), None)
        if suffix is None:
            raise UserError(f"the picture '{stem}' (row {row} of its table) is neither JPEG nor PNG")
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".{stem}.{os.getpid()}.part"
        unfinished.write_bytes(content)
        unfinished.replace(folder / f"{stem}{suffix}")


class _Columns:
    """Which columns of a table tell what."""

    def __init__(self, features: Features, origin: str) -> None:
        image = features.get("image")
        self.pictures = isinstance(image, Image) or (isinstance(image, dict) and "bytes" in image)
        names = NAME_COLUMNS if image is None or self.pictures else (*NAME_COLUMNS, "image")
        self.file = next((name for name in names if name in features), None)
        self.id = next((name for name in ID_COLUMNS if name in features), None)
        captions = next((name for name in CAPTION_COLUMNS if name in features), None)
        missing = [] if captions else [f"captions ({', '.join(CAPTION_COLUMNS)})"]
        if not (self.file or self.pictures or self.id):
            missing.append(f"the name of the image ({', '.join((*NAME_COLUMNS, 'image', *ID_COLUMNS))})")
        if captions is None or missing:
            raise UserError(f"{origin} has no column of {' and none of '.join(missing)}; it has: {', '.join(features)}")
        self.captions = captions
        self.used = {captions, self.file, self.id, "split"} | ({"image"} if self.pictures and not self.file else set())

    def name(self, record: Mapping[str, Any], place: str) -> str:
        """The file name of a row's image."""
        found = record[self.file] if self.file else None
        if self.file is None and self.pictures:
            found = record["image"] and record["image"].get("path")
        if found is None and self.file is None and self.id is not None:
            found = f"{record[self.id]}.jpg"
        if not isinstance(found, str) or not Path(found).stem:
            raise UserError(f"{place}: the name of the image must be a string, found {found!r}")
        return found if found.lower().endswith(EXTENSIONS) else f"{found}.jpg"

    def identity(self, record: Mapping[str, Any]) -> str | None:
        """The id of a row's image, where there is one."""
        return None if self.id is None or record[self.id] is None else str(record[self.id])


def _split(origin: str) -> str:
    """Of `hub:NAME: split SPLIT` or the path of a Parquet file."""
    return _known_split(origin.rsplit(" ", 1)[1], origin) if origin.startswith("hub:") else split_of(Path(origin))


def _known_split(value: Any, place: str) -> str:
    if value != "restval" and value not in SPLIT_NAMES:
        raise UserError(f"{place}: unknown split {value!r}; there is: {', '.join((*SPLIT_NAMES, 'restval'))}")
    return SPLIT_NAMES.get(value, value)


def _bytes_of(image: Any, stem: str) -> bytes:
    """The file's bytes, from the table or from the path that it names."""
    if image and image.get("bytes"):
        return image["bytes"]
    try:
        return Path((image or {}).get("path") or "").read_bytes()
    except OSError as error:
        raise UserError(f"the table holds no picture of '{stem}': {error}") from error
