import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cliplab.benchmark import make_protocol
from cliplab.data.karpathy import Karpathy
from cliplab.errors import UserError
from tests.data.conftest import write_json

PROTOCOL = make_protocol({"name": "clip_benchmark"})
REPORT = make_protocol({"name": "clip_benchmark", "missing_images": "report"})


OFFICIAL = {"images": [{"id": 1, "file_name": "v.jpg"}], "annotations": [{"image_id": 1, "caption": "v0"}]}


def path_of(root: Path, name: str) -> str:
    return str(root / "images" / name)


def rewrite(root: Path, content: Any) -> Path:
    path = root / "dataset_tiny.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# Benchmarks


def test_text_to_image(karpathy_root: Path) -> None:
    (benchmark,) = Karpathy(karpathy_root).benchmarks(PROTOCOL, "test")
    assert (benchmark.name, benchmark.protocol) == ("t2i", PROTOCOL)
    assert benchmark.queries.to_dict() == {
        "query_id": [0, 1, 2, 3, 4],
        "reference_id": [-1] * 5,
        "image": [None] * 5,
        "text": ["c0", "c1", "", "e0", "e1"],
    }
    assert benchmark.gallery.to_dict() == {
        "id": ["c.jpg", "e.jpg"],
        "image": [path_of(karpathy_root, "c.jpg"), path_of(karpathy_root, "e.jpg")],
        "text": [None, None],
    }
    assert benchmark.positives == [[0], [0], [0], [1], [1]]
    assert benchmark.query_names == ["c.jpg#0", "c.jpg#1", "c.jpg#2", "e.jpg#0", "e.jpg#1"]
    assert benchmark.references() == [-1] * 5
    assert benchmark.excluded == {"gallery_rows": 0, "queries": 0}


def test_its_transpose_is_image_to_text_with_all_captions_of_an_image(karpathy_root: Path) -> None:
    (benchmark,) = Karpathy(karpathy_root).benchmarks(PROTOCOL, "test")
    transpose = benchmark.transpose
    assert transpose is not None and transpose.transpose is None
    assert (transpose.name, transpose.protocol) == ("i2t", PROTOCOL)
    assert transpose.queries["query_id"][:] == [0, 1]
    assert transpose.queries["image"][:] == benchmark.gallery["image"][:]
    assert transpose.queries["text"][:] == [None, None]
    assert transpose.gallery["id"][:] == benchmark.query_names
    assert transpose.gallery["text"][:] == benchmark.queries["text"][:]
    assert transpose.positives == [[0, 1, 2], [3, 4]]
    assert transpose.query_names == ["c.jpg", "e.jpg"]
    # Both directions tell the same pairs.
    assert [(text, image) for text, images in enumerate(benchmark.positives) for image in images] == [
        (text, image) for image, texts in enumerate(transpose.positives) for text in texts
    ]


def test_each_split_is_its_own_and_restval_belongs_to_train(karpathy_root: Path) -> None:
    dataset = Karpathy(karpathy_root)
    assert [image.filename for image in dataset.split("train")] == ["a.jpg", "b.jpg"]
    assert [image.filename for image in dataset.split("restval")] == ["b.jpg"]
    assert [image.filename for image in dataset.split("val")] == ["d.jpg"]
    assert dataset.benchmarks(PROTOCOL, "val")[0].gallery["id"][:] == ["d.jpg"]


def test_the_prompt_stands_around_each_caption(karpathy_root: Path) -> None:
    protocol = make_protocol({"name": "clip_benchmark", "prompt": "a photo of {}."})
    (benchmark,) = Karpathy(karpathy_root).benchmarks(protocol, "val")
    assert benchmark.queries["text"][:] == ["a photo of d0."]
    assert Karpathy(karpathy_root).train_table(protocol)["texts"][1] == ["a photo of b0."]


def test_a_caption_with_braces_is_kept_as_it_is(karpathy_root: Path) -> None:
    content = {"images": [{"filename": "c.jpg", "split": "test", "sentences": [{"raw": "a {} and {x} 100%"}]}]}
    rewrite(karpathy_root, content)
    assert Karpathy(karpathy_root).benchmarks(PROTOCOL, "test")[0].queries["text"][:] == ["a {} and {x} 100%"]


# Training


def test_the_training_table_has_a_row_per_image_with_all_its_captions(karpathy_root: Path) -> None:
    assert Karpathy(karpathy_root).train_table(PROTOCOL).to_dict() == {
        "reference": [None, None],
        "target": [path_of(karpathy_root, "a.jpg"), path_of(karpathy_root, "b.jpg")],
        "reference_id": [-1, -1],
        "target_id": [0, 1],
        "texts": [["a0", "a1"], ["b0"]],
    }


def test_captions_as_samples_of_their_own_share_the_target(karpathy_root: Path) -> None:
    protocol = make_protocol({"name": "clip_benchmark", "train_join": "each_caption"})
    table = Karpathy(karpathy_root).train_table(protocol)
    assert table["texts"][:] == [["a0"], ["a1"], ["b0"]]
    assert table["target_id"][:] == [0, 0, 1]


# Counts and names


def test_counts_are_per_split_of_the_file(karpathy_root: Path) -> None:
    assert Karpathy(karpathy_root).counts() == {
        "train": {"images": 1, "captions": 2, "empty_captions": 0},
        "restval": {"images": 1, "captions": 1, "empty_captions": 0},
        "test": {"images": 2, "captions": 5, "empty_captions": 1},
        "val": {"images": 1, "captions": 1, "empty_captions": 0},
    }
    sizes = {"train": {2: 1}, "restval": {1: 1}, "test": {2: 1, 3: 1}, "val": {1: 1}}
    assert Karpathy(karpathy_root).images_by_captions() == sizes
    assert Karpathy(karpathy_root).empty_captions() == {"train": 0, "restval": 0, "test": 1, "val": 0}


def test_it_is_measured_on_test_under_clip_benchmark(karpathy_root: Path) -> None:
    assert (Karpathy.default_protocol, Karpathy.protocols) == ("clip_benchmark", ("clip_benchmark",))
    assert Karpathy(karpathy_root).test_split == "test"


def test_without_captions_of_test_images_it_is_measured_on_val(karpathy_root: Path) -> None:
    rows = [{**GOOD, "filename": f"{split}.jpg", "split": split} for split in ("train", "val")]
    rewrite(karpathy_root, {"images": rows})
    assert Karpathy(karpathy_root).test_split == "val"
    rewrite(karpathy_root, {"images": rows[:1]})
    assert Karpathy(karpathy_root).test_split == "test"  # and `check` says that it is not there


def test_there_are_no_categories(karpathy_root: Path) -> None:
    assert Karpathy(karpathy_root).categories == ()
    with pytest.raises(UserError, match="there is: none"):
        Karpathy(karpathy_root, categories=["dress"])


def test_a_compressed_file_is_the_same(karpathy_root: Path) -> None:
    before = Karpathy(karpathy_root).counts()
    path = karpathy_root / "dataset_tiny.json"
    (karpathy_root / "dataset_tiny.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert Karpathy(karpathy_root).counts() == before


# Errors


def test_one_annotation_file_is_needed(karpathy_root: Path) -> None:
    (karpathy_root / "dataset_other.json").write_text("{}")
    message = r"more than one set of captions: Karpathy's JSON: dataset_other.json, dataset_tiny.json. Say which"
    with pytest.raises(UserError, match=message) as error:
        Karpathy(karpathy_root).check(PROTOCOL, ["val"])
    assert str(error.value).endswith("data.annotations=dataset_other.json")
    Karpathy(karpathy_root, annotations="dataset_tiny.json").check(PROTOCOL, ["val"])
    for path in karpathy_root.glob("*.json"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds no captions .* dataset_\*.json \(Karpathy's JSON\)") as error:
        Karpathy(karpathy_root).check(PROTOCOL, ["val"])
    assert str(karpathy_root) in str(error.value) and "configs/quickstart.yaml" in str(error.value)


def test_forms_that_are_mixed_are_named_and_one_can_be_chosen(karpathy_root: Path, caplog: Any) -> None:
    write_json(karpathy_root / "annotations" / "captions_val2017.json", OFFICIAL)
    with pytest.raises(UserError, match="more than one set") as error:
        Karpathy(karpathy_root).check(PROTOCOL, ["val"])
    for part in ("Karpathy's JSON: dataset_tiny.json", "official COCO captions of 2017: captions_val2017.json"):
        assert part in str(error.value)
    assert Karpathy(karpathy_root).annotation_files() == []
    chosen = Karpathy(karpathy_root, annotations="annotations/captions_*2017.json")
    assert [image.captions for image in chosen.images] == [("v0",)]
    assert chosen.summary()["annotations"] == ["annotations/captions_val2017.json"]
    absolute = Karpathy(karpathy_root, annotations=str(karpathy_root / "dataset_tiny.json"))
    assert len(absolute.images) == 5
    with pytest.raises(UserError, match=r"^data.annotations=captions_\*.json: no such file in .*karpathy"):
        Karpathy(karpathy_root, annotations="captions_*.json").check(PROTOCOL, ["val"])
    (karpathy_root / "annotations" / "captions_val2017.json").unlink()
    with caplog.at_level("INFO"):
        assert Karpathy(karpathy_root).summary()["annotations"] == ["dataset_tiny.json"]
    assert "captions: Karpathy's JSON: dataset_tiny.json in" in caplog.text


GOOD = {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a0"}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (3, "must be an object with a list 'images'"),
        ([], "the name of the file must tell its split .*names no split"),
        ({"images": [GOOD, {**GOOD, "split": "test"}]}, "image 1: 'a.jpg' is there in the splits 'train' and 'test'"),
        ({"images": [GOOD, GOOD]}, "image 1: 'a.jpg' is there twice .before: .*image 0"),
        (
            {"images": [{**GOOD, "cocoid": 7}, {**GOOD, "filename": "b.jpg", "split": "val", "cocoid": 7}]},
            "image 1: the image id 7 is there in the splits 'train' and 'val' .before: .*image 0",
        ),
        (
            {"images": [{**GOOD, "filepath": "train2014"}, {**GOOD, "filepath": "val2014", "split": "test"}]},
            "image 1: 'val2014/a.jpg' and 'train2014/a.jpg' .*image 0.* would share one picture",
        ),
        ({"images": [{**GOOD, "filepath": 3}]}, "'filepath' must be a string, found 3"),
        ({"images": [{**GOOD, "split": 3}]}, "image 0: 'split' must be a string, found 3"),
        ({"images": {}}, "must be an object with a list 'images'"),
        ({"dataset": "x"}, "must be an object with a list 'images'"),
        ({"images": [GOOD, 3]}, "image 1 must be an object, found int"),
        ({"images": [GOOD, {"filename": "b.jpg"}]}, r"image 1 has no 'split' \(it has: filename\)"),
        ({"images": [GOOD, {}]}, r"image 1 has no 'filename' \(it has: nothing\)"),
        ({"images": [{**GOOD, "filename": 7}]}, "image 0: 'filename' must be a string, found 7"),
        ({"images": [{**GOOD, "sentences": []}]}, r"image 0 \(a.jpg\) has no sentences"),
        ({"images": [{**GOOD, "sentences": "a0"}]}, r"image 0 \(a.jpg\) has no sentences"),
        (
            {"images": [{**GOOD, "sentences": [{"raw": "x"}, {"tokens": []}]}]},
            r"image 0 \(a.jpg\): sentence 1 has no 'raw' text",
        ),
        ({"images": [{**GOOD, "sentences": ["a0"]}]}, "sentence 0 has no 'raw' text"),
        ({"images": [{**GOOD, "sentences": [{"raw": None}]}]}, "sentence 0 has no 'raw' text"),
        ('{"images": [\n{"filename" "a"}]}', "not valid JSON: .* at line 2, column 13"),
    ],
)
def test_a_malformed_file_is_named_with_the_place(karpathy_root: Path, content: Any, message: str) -> None:
    path = rewrite(karpathy_root, content)
    with pytest.raises(UserError, match=message) as error:
        Karpathy(karpathy_root).check(PROTOCOL, ["train"])
    assert str(error.value).startswith(str(path))


def test_a_split_without_images_is_named(karpathy_root: Path) -> None:
    with pytest.raises(UserError, match=r"dataset_tiny\.json has no dev rows: no image of the split 'dev'"):
        Karpathy(karpathy_root).check(PROTOCOL, ["val", "dev"])


def test_an_empty_split_is_told_from_those_there_are(karpathy_root: Path) -> None:
    rewrite(karpathy_root, {"images": []})
    with pytest.raises(UserError, match=r"tiny\.json has no validation rows: .* 'val' \(there is: no image at all\)"):
        Karpathy(karpathy_root).check(PROTOCOL, ["val"])


# All captions, or a number of them


def test_the_first_captions_of_each_image_are_ranked(karpathy_root: Path) -> None:
    protocol = make_protocol({"name": "clip_benchmark", "captions_per_image": 2})
    dataset = Karpathy(karpathy_root)
    dataset.check(protocol, ["test"])
    (benchmark,) = dataset.benchmarks(protocol, "test")
    assert benchmark.queries["text"][:] == ["c0", "c1", "e0", "e1"]
    assert benchmark.transpose is not None and benchmark.transpose.positives == [[0, 1], [2, 3]]
    assert benchmark.excluded == {"gallery_rows": 0, "queries": 0}
    assert dataset.train_table(protocol)["texts"][:] == [["a0", "a1"], ["b0"]]  # all captions train
    with pytest.raises(UserError, match=r"image 3 \(d.jpg\) has 1 caption\(s\), fewer than .*captions_per_image=2"):
        dataset.check(protocol, ["val"])


def test_what_is_missing_is_counted_in_captions_that_would_be_ranked(karpathy_root: Path) -> None:
    (karpathy_root / "images" / "c.jpg").unlink()
    protocol = make_protocol({"name": "clip_benchmark", "captions_per_image": 2, "missing_images": "report"})
    assert Karpathy(karpathy_root).benchmarks(protocol, "test")[0].excluded == {"gallery_rows": 1, "queries": 2}


# Folders of pictures


def test_pictures_are_found_in_the_folders_that_karpathys_coco_names(karpathy_root: Path) -> None:
    rows = [{**GOOD, "filepath": "train2014"}, {**GOOD, "filename": "b.jpg", "filepath": "val2014", "split": "test"}]
    rewrite(karpathy_root, {"images": rows})
    for folder, name in (("train2014", "a.jpg"), ("val2014", "b.jpg")):
        (karpathy_root / "images" / folder).mkdir()
        (karpathy_root / "images" / name).rename(karpathy_root / "images" / folder / name)
    dataset = Karpathy(karpathy_root)
    dataset.check(PROTOCOL, ["train", "test"])
    (benchmark,) = dataset.benchmarks(PROTOCOL, "test")
    assert benchmark.gallery["image"][:] == [path_of(karpathy_root, "val2014/b.jpg")]
    assert benchmark.query_names == ["val2014/b.jpg#0"]


def test_without_a_folder_images_the_pictures_are_below_the_root(karpathy_root: Path) -> None:
    (karpathy_root / "images").rename(karpathy_root / "val2017")
    dataset = Karpathy(karpathy_root)
    dataset.check(PROTOCOL, ["test"])
    assert dataset.image_root == karpathy_root
    assert dataset.folder.path("c") == str(karpathy_root / "val2017" / "c.jpg")
    with pytest.raises(UserError, match="not found in .*pictures"):
        Karpathy(karpathy_root, karpathy_root / "pictures").check(PROTOCOL, ["test"])


def test_two_pictures_of_one_name_are_named(karpathy_root: Path) -> None:
    (karpathy_root / "images" / "more").mkdir()
    shutil.copy(karpathy_root / "images" / "c.jpg", karpathy_root / "images" / "more" / "c.jpg")
    with pytest.raises(UserError, match=r"images/c.jpg and .*images/more/c.jpg share a name"):
        Karpathy(karpathy_root).check(PROTOCOL, ["val"])


# Missing images


def test_complete_images_pass(karpathy_root: Path) -> None:
    dataset = Karpathy(karpathy_root)
    dataset.check(PROTOCOL, ["train", "val", "test"])
    assert dataset.missing == []


def test_a_missing_image_is_an_error_only_where_its_split_is_needed(karpathy_root: Path) -> None:
    (karpathy_root / "images" / "c.jpg").unlink()
    Karpathy(karpathy_root).check(PROTOCOL, ["train", "val"])
    with pytest.raises(UserError, match="^1 image.* not found .*: c. "):
        Karpathy(karpathy_root).check(PROTOCOL, ["train", "test"])


def test_reported_missing_images_leave_image_and_captions_out_and_are_counted(karpathy_root: Path) -> None:
    for name in ("a.jpg", "c.jpg"):
        (karpathy_root / "images" / name).unlink()
    dataset = Karpathy(karpathy_root)
    dataset.check(REPORT, ["train", "test"])
    assert dataset.missing == ["a", "c"]
    (benchmark,) = dataset.benchmarks(REPORT, "test")
    assert benchmark.queries["text"][:] == ["e0", "e1"]
    assert benchmark.gallery["id"][:] == ["e.jpg"]
    assert benchmark.positives == [[0], [0]]
    assert benchmark.excluded == {"gallery_rows": 1, "queries": 3}
    transpose = benchmark.transpose
    assert transpose is not None and transpose.positives == [[0, 1]]
    # Images are the queries of this direction, captions its gallery.
    assert transpose.excluded == {"gallery_rows": 3, "queries": 1}
    assert dataset.train_table(REPORT)["texts"][:] == [["b0"]]


def test_the_policy_error_leaves_nothing_out_where_nobody_called_check(karpathy_root: Path) -> None:
    for name in ("a.jpg", "c.jpg"):
        (karpathy_root / "images" / name).unlink()
    dataset = Karpathy(karpathy_root)
    with pytest.raises(UserError, match="c"):
        dataset.benchmarks(PROTOCOL, "test")
    with pytest.raises(UserError, match="a"):
        dataset.train_table(PROTOCOL)
