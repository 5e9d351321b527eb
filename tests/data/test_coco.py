from pathlib import Path
from typing import Any

import pytest

from cliplab.benchmark import make_protocol
from cliplab.data.coco import COCO
from cliplab.data.datamodule import COCODataModule
from cliplab.errors import UserError
from tests.data.conftest import picture, write_json


def row(number: int, split: str, captions: int, folder: str = "val2014") -> dict[str, Any]:
    """An image as Karpathy's dataset_coco.json has it."""
    sentences = [{"raw": f"{number}.{k}", "tokens": [], "sentid": 10 * number + k} for k in range(captions)]
    name = f"COCO_{folder}_{number:012}.jpg"
    return {
        "filepath": folder,
        "filename": name,
        "cocoid": number,
        "imgid": number,
        "split": split,
        "sentences": sentences,
    }


ROWS = [
    row(1, "train", 5, "train2014"),
    row(2, "restval", 6),
    row(3, "val", 5),
    row(4, "test", 5),
    row(5, "test", 7),
    row(6, "test", 6),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Karpathy's file and the folders train2014 and val2014."""
    write_json(tmp_path / "dataset_coco.json", {"images": ROWS, "dataset": "coco"})
    for number, image in enumerate(ROWS):
        folder = tmp_path / image["filepath"]
        folder.mkdir(exist_ok=True)
        picture(number).save(folder / image["filename"])
    return tmp_path


def test_restval_trains_and_all_captions_are_kept(root: Path) -> None:
    dataset = COCODataModule(root).dataset
    assert isinstance(dataset, COCO) and dataset.benchmark_name == "coco"
    assert {split: (of["images"], of["captions"]) for split, of in dataset.counts().items()} == {
        "train": (1, 5),
        "restval": (1, 6),
        "val": (1, 5),
        "test": (3, 18),
    }
    assert [image.filename for image in dataset.split("train")] == [
        "train2014/COCO_train2014_000000000001.jpg",
        "val2014/COCO_val2014_000000000002.jpg",
    ]
    assert dataset.images_by_captions()["test"] == {5: 1, 6: 1, 7: 1}


@pytest.mark.parametrize(("per_image", "captions"), [(None, 18), (5, 15)])
def test_all_captions_or_exactly_five(root: Path, per_image: int | None, captions: int) -> None:
    module = COCODataModule(root, protocol={"captions_per_image": per_image})
    (benchmark,) = module.benchmarks("test")
    assert len(benchmark.queries) == captions
    assert benchmark.transpose is not None and sum(map(len, benchmark.transpose.positives)) == captions
    name = "clip_benchmark" if per_image is None else "clip_benchmark (captions_per_image=5)"
    assert module.protocol.name == benchmark.protocol.name == name


def test_the_prompt_is_an_option(root: Path) -> None:
    module = COCODataModule(root, protocol={"prompt": "a photo of {}"})
    assert module.benchmarks("val")[0].queries["text"][0] == "a photo of 3.0"


def test_official_captions_are_measured_on_val(tmp_path: Path) -> None:
    for split, number in (("train", 1), ("val", 2)):
        name = f"{number:012}.jpg"
        content = {"images": [{"id": number, "file_name": name}], "annotations": [{"image_id": number, "caption": "c"}]}
        write_json(tmp_path / "annotations" / f"captions_{split}2017.json", content)
        (tmp_path / f"{split}2017").mkdir()
        picture(number).save(tmp_path / f"{split}2017" / name)
    dataset = COCO(tmp_path)
    assert dataset.test_split == "val"
    dataset.check(make_protocol({"name": "clip_benchmark"}), ["train", "val"])
    assert [len(dataset.split(split)) for split in ("train", "val", "test")] == [1, 1, 0]
    assert dataset.summary()["annotations"] == [
        "annotations/captions_train2017.json",
        "annotations/captions_val2017.json",
    ]


def test_captions_of_another_data_set_are_not_taken_for_cocos(tmp_path: Path) -> None:
    write_json(tmp_path / "dataset_flickr30k.json", {"images": ROWS})
    with pytest.raises(UserError, match="no captions for data.name=coco. .* dataset_coco.json .*captions_.2017.json"):
        COCO(tmp_path).check(make_protocol({"name": "clip_benchmark"}), ["test"])
    assert len(COCO(tmp_path, annotations="dataset_flickr30k.json").images) == 6
