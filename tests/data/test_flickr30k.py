from pathlib import Path

import pytest

from cliplab.data.datamodule import Flickr30kDataModule
from cliplab.data.flickr30k import Flickr8k, Flickr30k
from cliplab.errors import UserError
from tests.data.conftest import write_json

IMAGE = {"filename": "1.jpg", "split": "test", "sentences": [{"raw": "a"}]}


@pytest.mark.parametrize(
    ("name", "expected"), [("flickr30k", Flickr30k), ("flickr8k", Flickr8k), ("both", Flickr30k), ("none", Flickr30k)]
)
def test_the_file_says_which_of_the_two_it_is(tmp_path: Path, name: str, expected: type) -> None:
    for written in {"both": ["flickr30k", "flickr8k"], "none": []}.get(name, [name]):
        write_json(tmp_path / f"dataset_{written}.json", {"images": [IMAGE]})
    dataset = Flickr30kDataModule(tmp_path).dataset
    assert type(dataset) is expected
    assert dataset.benchmark_name == ("flickr8k" if expected is Flickr8k else "flickr30k")
    if name == "none":
        with pytest.raises(UserError, match="no captions for data.name=flickr30k"):
            dataset.counts()
    else:
        assert dataset.counts() == {"test": {"images": 1, "captions": 1, "empty_captions": 0}}


def test_blips_lists_are_one_set_over_several_files(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        captions = "x" if split == "train" else ["x", "y"]
        write_json(
            tmp_path / f"flickr30k_{split}.json", [{"image": f"flickr30k-images/{number}.jpg", "caption": captions}]
        )
    dataset = Flickr30k(tmp_path)
    assert {split: of["captions"] for split, of in dataset.counts().items()} == {"train": 1, "val": 2, "test": 2}
    assert [path.name for path in dataset.annotation_files()] == [
        f"flickr30k_{s}.json" for s in ("test", "train", "val")
    ]


def test_clip_benchmarks_text_is_found(tmp_path: Path) -> None:
    (tmp_path / "flickr30k_test_karpathy.txt").write_text("image,caption\n1.jpg,one, two\n1.jpg,three\n")
    assert Flickr30k(tmp_path).images[0].captions == ("one, two", "three")
