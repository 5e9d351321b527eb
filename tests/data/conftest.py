"""A hand-made FashionIQ root and a Karpathy file, small enough to work every number out in the head."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

# (category, split) -> image ids of the split file, records (reference, target, captions)
FASHIONIQ: dict[tuple[str, str], tuple[list[str], list[tuple[str, str | None, list[str]]]]] = {
    ("dress", "train"): (
        ["D3", "D1", "D2"],
        [("D1", "D2", ["is Red.", "longer"]), ("D2", "D3", ["", "has sleeves"])],
    ),
    ("dress", "val"): (
        ["D7", "D5", "D4", "D6"],
        [("D4", "D5", [" is Blue.", "shorter?"]), ("D6", "D4", ["", "is red."])],
    ),
    ("dress", "test"): (["D8", "D9"], [("D8", None, ["is green", "is long"])]),
    ("shirt", "train"): (["S1", "S2"], [("S1", "S2", ["has a collar", "is white"])]),
    ("shirt", "val"): (["X1", "S4", "S3"], [("S3", "X1", ["is plain", "has buttons"])]),
    ("shirt", "test"): (["S5"], []),
    ("toptee", "train"): (["T1", "S2"], [("T1", "S2", ["more white", "has a print"])]),
    ("toptee", "val"): (["T2", "X1", "T3"], [("T2", "T3", ["is bolder", "is tighter"])]),
    ("toptee", "test"): (["T4"], []),
}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def picture(number: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """One colour per number, exactly kept by PNG."""
    return Image.new("RGB", size, (number * 10 % 256, number * 3 % 256, 255 - number))


@pytest.fixture
def fashioniq_root(tmp_path: Path) -> Path:
    """Its images are PNGs; those of test records are not needed and not there."""
    root = tmp_path / "fashioniq"
    names: dict[str, None] = {}
    for (category, split), (images, records) in FASHIONIQ.items():
        write_json(root / "image_splits" / f"split.{category}.{split}.json", images)
        rows = [
            {"candidate": reference, "captions": captions} | ({"target": target} if target else {})
            for reference, target, captions in records
        ]
        write_json(root / "captions" / f"cap.{category}.{split}.json", rows)
        names.update(dict.fromkeys(images if split != "test" else []))
    (root / "images").mkdir()
    for number, name in enumerate(names):
        picture(number).save(root / "images" / f"{name}.png")
    return root


@pytest.fixture
def karpathy_root(tmp_path: Path) -> Path:
    """Five images: one of train, one of restval, one of val, two of test."""
    root = tmp_path / "karpathy"
    images = [
        ("a.jpg", "train", ["a0", "a1"]),
        ("b.jpg", "restval", ["b0"]),
        ("c.jpg", "test", ["c0", "c1", ""]),
        ("d.jpg", "val", ["d0"]),
        ("e.jpg", "test", ["e0", "e1"]),
    ]
    rows = [
        {"filename": name, "split": split, "sentences": [{"raw": text} for text in texts]}
        for name, split, texts in images
    ]
    write_json(root / "dataset_tiny.json", {"images": rows, "dataset": "tiny"})
    (root / "images").mkdir()
    for number, (name, _, _) in enumerate(images):
        picture(number).save(root / "images" / name)
    return root
