"""CIRR and CIRCO in small, in their released layouts, with pictures of noise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_picture(path: Path, seed: int, size: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def cirr_record(pairid: int, names: list[str], split: str) -> dict[str, Any]:
    """The reference is the first of six members, the target the second; the third is half as good."""
    record: dict[str, Any] = {"pairid": pairid, "reference": names[0], "caption": f" Change {pairid}. "}
    record["img_set"] = {"id": 7, "members": names[:6], "reference_rank": 3}
    if split != "test1":
        record["img_set"]["target_rank"] = 1
        record |= {"target_hard": names[1], "target_soft": {names[1]: 1.0, names[2]: 0.5, names[0]: 1.0}}
    return record


def make_cirr(root: Path, records: int = 4) -> Path:
    """train in a numbered folder, val below dev, test1; 8 pictures each."""
    places = {"train": "train/34", "val": "dev", "test1": "test1"}
    for start, (split, place) in enumerate(places.items()):
        prefix = "dev" if split == "val" else split
        names = [f"{prefix}-{number}-0-img{number % 2}" for number in range(8)]
        for number, name in enumerate(names):
            write_picture(root / place / f"{name}.png", seed=100 * start + number)
        write_json(root / f"cirr/image_splits/split.rc2.{split}.json", {n: f"./{place}/{n}.png" for n in names})
        rows = [cirr_record(10 * start + n, names[n:] + names[:n], split) for n in range(records)]
        write_json(root / f"cirr/captions/cap.rc2.{split}.json", rows)
    return root


def make_circo(root: Path, gallery: int = 9) -> Path:
    """Three queries of val, two of test."""
    ids = [5 * number + 2 for number in range(gallery)]
    unlabeled = root / "COCO2017_unlabeled"
    write_json(unlabeled / "annotations/image_info_unlabeled2017.json", {"images": [{"id": i} for i in ids]})
    for number in ids:
        write_picture(unlabeled / f"unlabeled2017/{number:012d}.jpg", seed=number)
    val = [
        {
            "id": n,
            "reference_img_id": ids[n],
            "target_img_id": ids[n + 1],
            "gt_img_ids": ids[n + 1 : n + 3 + n],
            "relative_caption": f"shows {n} more",
            "shared_concept": "a dog",
            "semantic_aspects": ["addition", "negation"][: 1 + n % 2],
        }
        for n in range(3)
    ]
    hidden = ("target_img_id", "gt_img_ids", "semantic_aspects")
    test = [{key: value for key, value in row.items() if key not in hidden} for row in val[:2]]
    write_json(root / "annotations/val.json", val)
    write_json(root / "annotations/test.json", test)
    return root
