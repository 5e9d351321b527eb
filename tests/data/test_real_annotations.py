"""Counts of the released annotations; skipped where they are not at hand (they are research-only and not shipped)."""

import os
from pathlib import Path

import pytest

from cliplab.benchmark import make_protocol
from cliplab.data import FashionIQDataModule
from cliplab.data.fashioniq import FashionIQ
from cliplab.data.image_folder import ImageFolderDataset
from cliplab.data.karpathy import Karpathy
from tests.conftest import ROOT

DATA = Path(os.environ.get("CLIPLAB_TEST_DATA", ROOT.parent / "shared" / "data"))

FASHIONIQ = {  # records, split images, captions with outer spaces: train, val, test
    "dress": ((5985, 2017, 2024), (11452, 3817, 3818), (518, 191, 188)),
    "shirt": ((5988, 2038, 2038), (19036, 6346, 6346), (169, 73, 55)),
    "toptee": ((6027, 1961, 2056), (16121, 5373, 5374), (279, 95, 111)),
}
REFERENCES_AND_TARGETS = {"dress": (1331, 2628), "shirt": (1541, 3089), "toptee": (1454, 2902)}


def needs(folder: str) -> Path:
    if not (DATA / folder).is_dir():
        pytest.skip(f"the annotations of {folder} are not at hand; CLIPLAB_TEST_DATA names their parent folder")
    return DATA / folder


def test_fashioniq_counts() -> None:
    counts = FashionIQDataModule(needs("fashioniq")).dataset.counts()
    for category, expected in FASHIONIQ.items():
        for key, numbers in zip(("records", "split_images", "captions_with_outer_spaces"), expected, strict=True):
            assert tuple(counts[category][split][key] for split in ("train", "val", "test")) == numbers, (category, key)
        val = counts[category]["val"]
        assert (val["references"], val["references_and_targets"]) == REFERENCES_AND_TARGETS[category]


def test_fashioniq_galleries_and_empty_captions() -> None:
    dataset = FashionIQ(needs("fashioniq"))
    assert dataset.empty_captions() == {"train": 12, "val": 3, "test": 1}
    original, val = make_protocol({"name": "clip4cir"}), make_protocol({"name": "val"})
    for category, (_, images, _) in FASHIONIQ.items():
        assert len(dataset.gallery(category, "val", original)) == images[1]
        assert len(dataset.gallery(category, "val", val)) == REFERENCES_AND_TARGETS[category][1]
    assert len(dataset.gallery("dress", "val", make_protocol({"name": "composeae"}))) == 15415


@pytest.mark.parametrize(
    ("folder", "images"),
    [("flickr8k", (3000, 1000, 1000)), ("flickr30k", (29000, 1014, 1000))],
)
def test_karpathy_counts(folder: str, images: tuple[int, int, int]) -> None:
    counts = Karpathy(needs(folder)).counts()
    assert tuple(counts[split]["images"] for split in ("train", "val", "test")) == images
    assert tuple(counts[split]["captions"] for split in ("train", "val", "test")) == tuple(5 * n for n in images)


def test_clothing_counts() -> None:
    dataset = ImageFolderDataset(needs("clothing"))
    protocol = make_protocol({"name": "zero_shot_imagenet"})
    dataset.check(protocol, ("train", "val", "test"))
    dataset.check_probe()
    dataset.check_headers("test")
    per_class = {
        "train": (31, 16, 59, 24, 61, 38, 26, 26, 15, 104),
        "val": (11, 5, 17, 9, 17, 10, 9, 9, 4, 29),
        "test": (5, 4, 23, 12, 14, 8, 23, 10, 4, 17),
    }
    assert {split: tuple(row["per_class"].values()) for split, row in dataset.counts().items()} == per_class
    assert [row["images"] for row in dataset.counts().values()] == [400, 120, 120]
    assert dataset.class_names[-1] == "t-shirt"
    (benchmark,) = dataset.benchmarks(protocol, "test")
    assert len(benchmark.positives) == 120 and len(set(benchmark.wording_of or ())) == 10
