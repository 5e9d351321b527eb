import json
import re
from pathlib import Path
from typing import Any

import pytest

from cliplab.benchmark import make_protocol
from cliplab.data import DATASETS
from cliplab.data.image_folder import ImageFolderDataset
from cliplab.data.templates import CIFAR, IMAGENET
from cliplab.errors import UserError
from tests.image_folders import CLASSES, make_image_folder

PLAIN = make_protocol({"name": "zero_shot_plain"})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "pictures")


def named(root: Path, names: Any) -> ImageFolderDataset:
    (root / "classes.json").write_text(names if isinstance(names, str) else json.dumps(names))
    return ImageFolderDataset(root)


# The benchmark


def test_it_is_a_data_set_by_name() -> None:
    assert DATASETS["image_folder"] is ImageFolderDataset
    assert ImageFolderDataset.protocols == ("zero_shot_imagenet", "zero_shot_cifar", "zero_shot_plain")


def test_pictures_ask_and_worded_classes_are_the_gallery(root: Path) -> None:
    protocol = make_protocol({"name": "zero_shot_cifar"})
    (benchmark,) = ImageFolderDataset(root).benchmarks(protocol, "test")
    names = [
        "dress/test0.png",
        *(f"polar_bear/test{n}.png" for n in range(3)),
        "t-shirt/test0.png",
        "t-shirt/test1.png",
    ]
    assert (benchmark.name, benchmark.protocol, benchmark.transpose) == ("zero_shot", protocol, None)
    assert benchmark.query_names == names
    assert benchmark.queries.to_dict() == {
        "query_id": list(range(6)),
        "reference_id": [-1] * 6,
        "image": [str(root / "test" / name) for name in names],
        "text": [None] * 6,
    }
    assert benchmark.positives == [[0], [1], [1], [1], [2], [2]]
    words = ("dress", "polar bear", "t-shirt")
    assert benchmark.gallery["text"][:] == [template.format(word) for word in words for template in CIFAR]
    assert benchmark.gallery["id"][:] == [folder for folder in CLASSES for _ in CIFAR]
    assert benchmark.wording_of == [label for label in range(3) for _ in CIFAR]


def test_template_sets_are_protocols(root: Path) -> None:
    dataset = ImageFolderDataset(root)
    default = make_protocol({"name": dataset.default_protocol})
    assert dataset.wordings(default)[2] == [template.format("t-shirt") for template in IMAGENET]
    assert dataset.wordings(PLAIN) == [["a photo of a dress."], ["a photo of a polar bear."], ["a photo of a t-shirt."]]
    own = make_protocol({"name": "zero_shot_plain", "prompt": "an icon: {}"})
    assert dataset.wordings(own)[0] == ["an icon: dress"]


def test_a_root_without_split_folders_is_all_test(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "flat", {"": (2, 1, 1)})
    dataset = ImageFolderDataset(root)
    dataset.check(PLAIN, ("test",))
    assert dataset.counts() == {"test": {"images": 4, "per_class": {"dress": 2, "polar_bear": 1, "t-shirt": 1}}}
    (benchmark,) = dataset.benchmarks(PLAIN, "test")
    assert benchmark.query_names[0] == "dress/all0.png"


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "flat", {"": (1, 1)})
    (root / "dress").rename(root / "train")
    assert ImageFolderDataset(root).categories == ("polar_bear", "train")


def test_counts_by_split_and_class(root: Path) -> None:
    dataset = ImageFolderDataset(root)
    assert dataset.counts() == {
        "train": {"images": 9, "per_class": {"dress": 3, "polar_bear": 2, "t-shirt": 4}},
        "val": {"images": 3, "per_class": {"dress": 2, "polar_bear": 0, "t-shirt": 1}},
        "test": {"images": 6, "per_class": {"dress": 1, "polar_bear": 3, "t-shirt": 2}},
    }
    summary = dataset.summary()
    assert summary["categories"] == list(CLASSES) and summary["empty_captions"] == {}


def test_both_names_of_the_validation_split(root: Path) -> None:
    before = ImageFolderDataset(root).counts()
    (root / "validation").rename(root / "val")
    assert ImageFolderDataset(root).counts() == before
    make_image_folder(root, {"validation": (1,)})
    with pytest.raises(UserError, match="both validation and val: keep one"):
        ImageFolderDataset(root)


def test_without_a_test_folder_the_validation_split_is_tested(root: Path) -> None:
    assert ImageFolderDataset(root).test_split == "test"
    (root / "test").rename(root / ".hidden")
    dataset = ImageFolderDataset(root)
    assert dataset.test_split == "val"
    dataset.check(PLAIN, ("val",))


def test_categories_are_class_folders(root: Path) -> None:
    dataset = ImageFolderDataset(root, categories=["t-shirt", "dress"])
    (benchmark,) = dataset.benchmarks(PLAIN, "test")
    assert benchmark.gallery["text"][:] == ["a photo of a t-shirt.", "a photo of a dress."]
    assert benchmark.positives == [[0], [0], [1]]
    with pytest.raises(UserError, match=r"data.categories: unknown \['hat'\]; there is: dress, polar_bear, t-shirt"):
        ImageFolderDataset(root, categories=["hat"])


def test_hidden_and_other_files_are_no_pictures(root: Path) -> None:
    (root / "test" / "dress" / "._test0.png").write_bytes(b"x")
    (root / "test" / "dress" / "notes.txt").write_text("x")
    (root / "test" / ".cache").mkdir()
    assert ImageFolderDataset(root).counts()["test"]["per_class"] == {"dress": 1, "polar_bear": 3, "t-shirt": 2}


def test_the_manifest_knows_names_and_every_picture(root: Path) -> None:
    def digest() -> str:
        return ImageFolderDataset(root).manifest_hash()

    first = digest()
    assert digest() == first
    (root / "train" / "dress" / "train0.png").rename(root / "train" / "dress" / "other.png")
    second = digest()
    (root / "classes.json").write_text('{"dress": "gown"}')
    assert len({first, second, digest()}) == 3


# Names


def test_names_come_from_folders_unless_the_file_says_otherwise(root: Path) -> None:
    assert ImageFolderDataset(root).class_names == ["dress", "polar bear", "t-shirt"]
    assert named(root, {"polar_bear": "white bear"}).class_names == ["dress", "white bear", "t-shirt"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"tshirt": "T-shirt"}, "there is no class folder 'tshirt': did you mean 't-shirt'?"),
        ({"dress": ""}, "the name of 'dress' must be a text, found ''"),
        ({"dress": 3}, "the name of 'dress' must be a text, found 3"),
        (["dress"], 'must be an object {"folder": "class name"}, found list'),
        ("{", "is not valid JSON"),
    ],
)
def test_a_bad_classes_file_is_named(root: Path, names: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        named(root, names).check(PLAIN, ())
    assert "classes.json" in str(caught.value)


def test_two_classes_of_one_name_are_refused(root: Path) -> None:
    with pytest.raises(UserError, match="dress and t-shirt would both be called 'Dress'.*classes.json"):
        named(root, {"t-shirt": "Dress"}).check(PLAIN, ())


# What is missing


def test_a_missing_root_and_one_without_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere \(data.root or zero_shot.root\).*CLASS/\*.jpg"):
        ImageFolderDataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no class folder"):
        ImageFolderDataset(tmp_path)


def test_a_class_folder_without_pictures_is_named_whatever_its_split(root: Path) -> None:
    (root / "train" / "hat").mkdir()
    with pytest.raises(UserError, match="the class folder .*hat holds no .jpg, .jpeg or .png"):
        ImageFolderDataset(root).check(PLAIN, ("test",))


def test_a_missing_split_is_named_with_those_that_are_there(root: Path, tmp_path: Path) -> None:
    (root / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="has no split 'train', it has validation, test"):
        ImageFolderDataset(root).check(PLAIN, ("train", "test"))
    flat = make_image_folder(tmp_path / "flat", {"": (1, 1)})
    with pytest.raises(UserError, match="has no split 'train', without split folders all of it is test"):
        ImageFolderDataset(flat).check(PLAIN, ("train",))


def test_the_chosen_classes_must_be_in_the_split(root: Path) -> None:
    with pytest.raises(UserError, match="validation holds none of the classes polar_bear"):
        ImageFolderDataset(root, categories=["polar_bear"]).check(PLAIN, ("val",))


def test_another_folder_of_pictures_makes_no_sense(root: Path) -> None:
    with pytest.raises(UserError, match="data.images=elsewhere"):
        ImageFolderDataset(root, "elsewhere")


def test_headers_tell_what_is_no_picture(root: Path) -> None:
    dataset = ImageFolderDataset(root)
    dataset.check_headers("test")
    (root / "test" / "dress" / "test0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="can't read the image .*test0.png.*Replace or remove it"):
        dataset.check_headers("test")
    dataset.check_headers("train")


# Training and probing


def test_training_pairs_pictures_with_a_prompt_of_their_class(root: Path) -> None:
    dataset = ImageFolderDataset(root)
    table = dataset.train_table(make_protocol({"name": "zero_shot_imagenet"}))
    assert len(table) == 9
    assert table["target_id"][:] == list(range(9)) and set(table["reference_id"]) == {-1}
    assert table[4] == {
        "reference": None,
        "target": str(root / "train" / "polar_bear" / "train1.png"),
        "reference_id": -1,
        "target_id": 4,
        "texts": [template.format("polar bear") for template in IMAGENET],
    }
    each = dataset.train_table(make_protocol({"name": "zero_shot_cifar", "train_join": "each_caption"}))
    assert len(each) == 9 * len(CIFAR) and each["target_id"][:] == [row for row in range(9) for _ in CIFAR]
    with pytest.raises(UserError, match="train_join=and_precaption joins pairs"):
        dataset.train_table(make_protocol({"name": "zero_shot_plain", "train_join": "and_precaption"}))


def test_a_probe_needs_three_splits_two_classes_and_something_to_learn_from(root: Path, tmp_path: Path) -> None:
    ImageFolderDataset(root).check_probe()  # a class without validation pictures is no mistake
    flat = make_image_folder(tmp_path / "flat", {"": (1, 1)})
    with pytest.raises(UserError, match="linear_probe=true needs .*flat has no train, validation/val folder"):
        ImageFolderDataset(flat).check_probe()
    lonely = make_image_folder(tmp_path / "lonely", {"train": (2,), "validation": (1, 1), "test": (1, 1)})
    with pytest.raises(UserError, match="two classes or more in .*train"):
        ImageFolderDataset(lonely).check_probe()
    unseen = make_image_folder(tmp_path / "unseen", {"train": (2, 1), "validation": (1,), "test": (1, 0, 1)})
    with pytest.raises(UserError, match="no picture to learn t-shirt from"):
        ImageFolderDataset(unseen).check_probe()
