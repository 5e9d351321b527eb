"""A list that is there and empty is told by its name, wherever it is first missed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cliplab.data import CIRCO, CIRR, COCO, FashionIQ, FashionIQDataModule, KarpathyDataModule
from cliplab.data.dataset import RetrievalDataset
from cliplab.errors import UserError
from tests.data.cir_files import make_circo, make_cirr
from tests.data.conftest import picture, write_json

WORDS = {"train": "training", "val": "validation", "test": "test"}


def make_blip(root: Path) -> Path:
    """COCO in BLIP's three lists: a file per split."""
    for number, split in enumerate(("train", "val", "test")):
        rows = [{"image": f"{split}.png", "caption": "one" if split == "train" else ["one", "two"]}]
        write_json(root / f"coco_karpathy_{split}.json", rows)
        (root / "images").mkdir(exist_ok=True)
        picture(number).save(root / "images" / f"{split}.png")
    return root


def make_official(root: Path) -> Path:
    for number, split in enumerate(("train", "val")):
        images = [{"id": number, "file_name": f"{split}.png"}]
        annotations = [{"image_id": number, "caption": "one"}]
        write_json(root / f"captions_{split}2014.json", {"images": images, "annotations": annotations})
        (root / "images").mkdir(exist_ok=True)
        picture(number).save(root / "images" / f"{split}.png")
    return root


CASES = [
    (FashionIQ, "captions/cap.shirt.train.json", "train", "[]"),
    (FashionIQ, "image_splits/split.shirt.train.json", "train", "[]"),
    (FashionIQ, "captions/cap.toptee.val.json", "val", "[]"),
    (CIRR, "cirr/captions/cap.rc2.train.json", "train", "[]"),
    (CIRR, "cirr/image_splits/split.rc2.val.json", "val", "{}"),
    (CIRR, "cirr/captions/cap.rc2.test1.json", "test", "[]"),
    (CIRCO, "annotations/val.json", "val", "[]"),
    (CIRCO, "annotations/test.json", "test", "[]"),
    (COCO, "coco_karpathy_train.json", "train", "[]"),
    (COCO, "coco_karpathy_test.json", "test", "[]"),
    (COCO, "captions_train2014.json", "train", '{"images": [], "annotations": []}'),
]


@pytest.fixture
def makers(fashioniq_root: Path, tmp_path: Path) -> dict[type, Callable[[str], Path]]:
    def coco(file: str) -> Path:
        return make_official(tmp_path) if file.startswith("captions_") else make_blip(tmp_path)

    return {
        FashionIQ: lambda file: fashioniq_root,
        CIRR: lambda file: make_cirr(tmp_path),
        CIRCO: lambda file: make_circo(tmp_path),
        COCO: coco,
    }


@pytest.mark.parametrize(("dataset_class", "file", "split", "empty"), CASES, ids=[file for _, file, _, _ in CASES])
def test_an_empty_list_is_named(
    dataset_class: type[RetrievalDataset], file: str, split: str, empty: str, makers: dict[type, Callable[[str], Path]]
) -> None:
    root = makers[dataset_class](file)
    protocol = dataset_class.make_protocol({})
    dataset_class(root).check(protocol, (split,))
    (root / file).write_text(empty)
    dataset = dataset_class(root)
    for read in (
        lambda: dataset.check(protocol, (split,)),
        lambda: dataset.train_table(protocol) if split == "train" else dataset.benchmarks(protocol, split),
    ):
        with pytest.raises(UserError, match=rf"^{root / file} has no {WORDS[split]} rows: "):
            read()


def test_the_data_modules_name_it_too(fashioniq_root: Path) -> None:
    (fashioniq_root / "captions/cap.dress.train.json").write_text("[]")
    with pytest.raises(UserError, match=r"cap\.dress\.train\.json has no training rows"):
        FashionIQDataModule(fashioniq_root).train_dataloader()


def test_captions_without_training_images(karpathy_root: Path) -> None:
    path = karpathy_root / "dataset_tiny.json"
    images = [row for row in json.loads(path.read_text())["images"] if row["split"] in ("val", "test")]
    write_json(path, {"images": images})
    with pytest.raises(UserError, match=r"dataset_tiny\.json has no training rows: .*'train' \(there is: test, val\)"):
        KarpathyDataModule(karpathy_root).train_dataloader()


def test_all_training_pictures_missing_is_no_matter_of_the_batch_size(karpathy_root: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (karpathy_root / "images" / name).unlink()
    module = KarpathyDataModule(karpathy_root, protocol={"missing_images": "report"})
    with pytest.raises(UserError, match="no training sample is left: 2 pictures are missing in .*images"):
        module.train_dataloader()
