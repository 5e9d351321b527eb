"""The released forms of image captions: which files hold them, and each form -> list[CaptionedImage].

Karpathy's JSON     {"images": [{"filename", "split", "sentences": [{"raw"}], "filepath"?, "cocoid"?, "imgid"?}]}
official COCO       {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}; so is CLIP_benchmark's
                    coco_test_karpathy.json
BLIP's lists        [{"image": "val2014/NAME.jpg", "caption": [...]}], for training [{"image", "caption": "..."}]
CLIP_benchmark      a text file: a header line, then NAME.jpg,CAPTION where captions hold commas

The content tells the form. All but Karpathy's tell the split by the name of their file: captions_val2017.json.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cliplab.data.dataset import read_json
from cliplab.errors import UserError

SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "dev": "val", "test": "test"}
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_NAMES)})(?![a-z])")
_TEXT_LINE = re.compile(r"(.+?\.(?:jpe?g|png)),(.*)", re.IGNORECASE)  # as CLIP_benchmark cuts it: captions hold commas
Patterns = dict[str, tuple[str, ...]]  # form -> names of files that hold it


@dataclass(frozen=True)
class CaptionedImage:
    """One image and all its captions."""

    filename: str  # as the annotations name it, with its folder where they give one
    split: str
    captions: tuple[str, ...]
    image_id: str | None = None  # of the annotations, where they have one
    origin: str = field(default="", compare=False)  # file and record, for messages

    @property
    def stem(self) -> str:
        """The name under which the image folder knows it."""
        return os.path.splitext(os.path.basename(self.filename))[0]


OFFICIAL: Patterns = {
    "official COCO captions of 2014": ("captions_*2014.json",),
    "official COCO captions of 2017": ("captions_*2017.json",),
}


def patterns_of(name: str) -> Patterns:
    """The files in which the captions of a data set are released; `*` = of any."""
    return {
        "Karpathy's JSON": (f"dataset_{name}.json",),
        "BLIP's lists": tuple(f"{name}_karpathy_{split}.json" for split in ("train", "val", "test")),
        "CLIP_benchmark's JSON": (f"{name}_*_karpathy.json",),
        "CLIP_benchmark's text": (f"{name}_*_karpathy.txt",),
        "Parquet": ("*.parquet", "data/*.parquet"),
    }


def find_files(root: Path, patterns: Patterns) -> dict[str, list[Path]]:
    """Form -> files in root and root/annotations, also compressed; forms without a file are left out."""
    found: dict[str, list[Path]] = {}
    for form, names in patterns.items():
        ends = ("", ".gz") if names[0].endswith(".json") else ("",)
        globs = [f"{folder}{name}{end}" for name in names for folder in ("", "annotations/") for end in ends]
        files = sorted({path for pattern in globs for path in root.glob(pattern)})
        if files:
            found[form] = files
    return found


def named_splits(path: Path) -> set[str]:
    """Those of train, val and test that the name of a file tells."""
    return {SPLIT_NAMES[word] for word in _SPLIT_WORD.findall(path.name.lower())}


def split_of(path: Path) -> str:
    """train, val or test from the name of a file. Raises UserError where it names none or several."""
    words = named_splits(path)
    if len(words) != 1:
        named = f"both {' and '.join(sorted(words))}" if words else "no split"
        raise UserError(f"{path}: the name of the file must tell its split (train, val or test), it names {named}")
    return words.pop()


def read_captions(path: Path) -> list[CaptionedImage]:
    """All images of a file, in its order, of whatever form it is. Raises UserError naming file and record."""
    if path.suffix == ".txt":
        return list(_text_images(path))
    content = read_json(path)
    if isinstance(content, list):
        return list(_blip_images(path, content))
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(
            f"{path} must be an object with a list 'images' (Karpathy's or COCO's layout) or a list of images (BLIP's)"
        )
    if "annotations" in content:
        return list(_official_images(path, content["images"], content["annotations"]))
    return [_karpathy_image(path, number, row) for number, row in enumerate(content["images"])]


def require_distinct(images: Iterable[CaptionedImage]) -> None:
    """Raise UserError for an image, or an id of an image, that occurs twice: in two splits, folders or records."""
    by_stem: dict[str, CaptionedImage] = {}
    by_id: dict[str, CaptionedImage] = {}
    for image in images:
        other = by_stem.setdefault(image.stem, image)
        if other.filename != image.filename:
            raise UserError(
                f"{image.origin}: '{image.filename}' and '{other.filename}' ({other.origin}) would share one picture: "
                "pictures are found by name, whatever their folder"
            )
        if image.image_id is not None and other is image:
            other = by_id.setdefault(image.image_id, image)
        if other is not image:
            what = f"'{image.filename}'" if other.filename == image.filename else f"the image id {image.image_id}"
            where = f"in the splits '{other.split}' and '{image.split}'" if other.split != image.split else "twice"
            raise UserError(f"{image.origin}: {what} is there {where} (before: {other.origin})")


def required(row: Any, keys: dict[str, type], origin: str) -> None:
    """Raise UserError unless `row` is an object that has `keys` with these types."""
    if not isinstance(row, dict):
        raise UserError(f"{origin} must be an object, found {type(row).__name__}")
    for key, kind in keys.items():
        if key not in row:
            raise UserError(f"{origin} has no '{key}' (it has: {', '.join(row) or 'nothing'})")
        if not isinstance(row[key], kind):
            noun = {str: "a string", list: "a list"}[kind]
            raise UserError(f"{origin}: '{key}' must be {noun}, found {row[key]!r}")


def require_texts(captions: Iterable[Any], origin: str) -> tuple[str, ...]:
    """The captions of an image. Raises UserError unless there is one and all are strings."""
    captions = tuple(captions)
    for position, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise UserError(f"{origin}: caption {position} must be a string, found {caption!r}")
    if not captions:
        raise UserError(f"{origin} has no captions")
    return captions


def _karpathy_image(path: Path, number: int, row: Any) -> CaptionedImage:
    origin = f"{path}: image {number}"
    required(row, {"filename": str, "split": str, "sentences": object}, origin)
    name, sentences = row["filename"], row["sentences"]
    _require_name(name, f"{origin}: 'filename'")
    if not isinstance(sentences, list) or not sentences:
        raise UserError(f"{origin} ({name}) has no sentences")
    for position, sentence in enumerate(sentences):
        if not isinstance(sentence, dict) or not isinstance(sentence.get("raw"), str):
            raise UserError(f"{origin} ({name}): sentence {position} has no 'raw' text")
    folder = row.get("filepath", "")
    if not isinstance(folder, str):
        raise UserError(f"{origin} ({name}): 'filepath' must be a string, found {folder!r}")
    identity = row.get("cocoid", row.get("imgid"))
    return CaptionedImage(
        f"{folder}/{name}" if folder else name,
        row["split"],
        tuple(sentence["raw"] for sentence in sentences),
        None if identity is None else str(identity),
        origin,
    )


def _official_images(path: Path, images: list[Any], annotations: Any) -> Iterator[CaptionedImage]:
    split = split_of(path)
    if not isinstance(annotations, list):
        raise UserError(f"{path}: 'annotations' must be a list, found {type(annotations).__name__}")
    captions: dict[Any, list[str]] = {}
    for number, row in enumerate(images):
        required(row, {"id": object, "file_name": str}, f"{path}: image {number}")
        _require_name(row["file_name"], f"{path}: image {number}: 'file_name'")
        if _identity(row["id"], f"{path}: image {number}: 'id'") in captions:
            raise UserError(f"{path}: image {number} ({row['file_name']}) has the id {row['id']} of an earlier image")
        captions[row["id"]] = []
    for number, row in enumerate(annotations):
        origin = f"{path}: annotation {number}"
        required(row, {"image_id": object, "caption": str}, origin)
        if _identity(row["image_id"], f"{origin}: 'image_id'") not in captions:
            raise UserError(f"{origin} names the image id {row['image_id']}, which no image of the file has")
        captions[row["image_id"]].append(row["caption"])
    for number, row in enumerate(images):
        origin = f"{path}: image {number}"
        texts = require_texts(captions[row["id"]], f"{origin} ({row['file_name']})")
        yield CaptionedImage(row["file_name"], split, texts, str(row["id"]), origin)


def _require_name(name: str, origin: str) -> None:
    if not os.path.basename(name):
        raise UserError(f"{origin} must be the name of a file, found {name!r}")


def _identity(value: Any, origin: str) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(f"{origin} must be a number or a string, found {value!r}")
    return value


def _blip_images(path: Path, rows: list[Any]) -> Iterator[CaptionedImage]:
    split = split_of(path)
    singles: dict[str, list[str]] = {}  # training lists have one caption per record
    for number, row in enumerate(rows):
        origin = f"{path}: record {number}"
        required(row, {"image": str, "caption": object}, origin)
        _require_name(row["image"], f"{origin}: 'image'")
        if isinstance(row["caption"], list):
            texts = require_texts(row["caption"], f"{origin} ({row['image']})")
            yield CaptionedImage(row["image"], split, texts, None, origin)
        else:
            singles.setdefault(row["image"], []).extend(require_texts([row["caption"]], f"{origin} ({row['image']})"))
    for name, texts in singles.items():
        yield CaptionedImage(name, split, tuple(texts), None, str(path))


def _text_images(path: Path) -> Iterator[CaptionedImage]:
    split = split_of(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {path}: {error}") from error
    captions: dict[str, list[str]] = {}
    first: dict[str, int] = {}
    for number, line in enumerate((line.strip() for line in lines), start=1):
        record = _TEXT_LINE.fullmatch(line)
        if number == 1 and record:
            raise UserError(f"{path}: line 1 must be a header such as 'image,caption', found the record {line!r}")
        if number == 1 or not line:
            continue
        if record is None:
            raise UserError(f"{path}: line {number} must be NAME.jpg,CAPTION, found {line!r}")
        captions.setdefault(record[1], []).append(record[2])
        first.setdefault(record[1], number)
    for name, texts in captions.items():
        yield CaptionedImage(name, split, tuple(texts), None, f"{path}: line {first[name]}")
