"""What people hand to an encoder: one picture or many, one text or many, or pairs of both."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cliplab.data.images import EXTENSIONS
from cliplab.errors import UserError

Picture = str | Path | Image.Image
Pictures = Picture | Sequence[Picture]
Texts = str | Sequence[str]


def paired(images: Any, text: Any) -> tuple[list[Picture] | None, list[str] | None, str]:
    """Lists of pictures and texts of equal length, and what they are together. Raises UserError."""
    pictures = _listed(images, str | Path | Image.Image, "images must be a path, a picture or a list of them")
    texts = _listed(text, str, "text must be a str or a list of str")
    if pictures is None and texts is None:
        raise UserError("nothing to encode: give images, text or both")
    if pictures is None or texts is None:
        return pictures, texts, "text" if pictures is None else "images"
    if isinstance(text, str) != isinstance(images, str | Path | Image.Image):
        raise UserError("images and text must both be one or both be lists: each picture goes with its text")
    if len(pictures) != len(texts):
        raise UserError(f"{len(pictures)} images and {len(texts)} texts: each picture goes with its text")
    return pictures, texts, "multimodal"


def _listed(given: Any, kind: Any, message: str) -> list[Any] | None:
    if given is None:
        return None
    if isinstance(given, kind):
        return [given]
    if not isinstance(given, list | tuple) or not all(isinstance(item, kind) for item in given):
        items = given if isinstance(given, list | tuple) else [given]
        wrong = next(item for item in items if not isinstance(item, kind))
        raise UserError(f"{message}, got {type(wrong).__name__}")
    if not given:
        raise UserError("nothing to encode: the list is empty")
    return list(given)


def pictures_below(folder: str | Path) -> list[str]:
    """The paths of all pictures in a folder and below, sorted; hidden files are none. Raises UserError without any."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder} to index")
    files = (path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    paths = sorted(str(path) for path in files if not path.name.startswith("."))
    if not paths:
        raise UserError(f"{folder} holds no pictures ({', '.join(EXTENSIONS)})")
    return paths
