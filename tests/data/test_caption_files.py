import gzip
from pathlib import Path
from typing import Any

import pytest

from cliplab.data.caption_files import (
    OFFICIAL,
    CaptionedImage,
    find_files,
    patterns_of,
    read_captions,
    require_distinct,
    split_of,
)
from cliplab.errors import UserError
from tests.data.conftest import write_json

KARPATHY = {
    "images": [
        {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a0"}, {"raw": "a1"}], "imgid": 0},
        {
            "filename": "b.jpg",
            "filepath": "val2014",
            "cocoid": 7,
            "imgid": 1,
            "split": "restval",
            "sentences": [{"raw": ""}],
        },
    ],
    "dataset": "tiny",
}
OFFICIAL_JSON = {
    "images": [{"id": 9, "file_name": "n.jpg"}, {"id": 3, "file_name": "m.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 3, "caption": "m0"},
        {"id": 2, "image_id": 9, "caption": "n0"},
        {"id": 3, "image_id": 3, "caption": "m1"},
    ],
    "type": "captions",
}


def write(root: Path, name: str, content: Any) -> Path:
    path = root / name
    write_json(path, content) if not isinstance(content, str) else path.write_text(content, encoding="utf-8")
    return path


# Each form


def test_karpathys_json(tmp_path: Path) -> None:
    expected = [
        CaptionedImage("a.jpg", "train", ("a0", "a1"), "0"),
        CaptionedImage("val2014/b.jpg", "restval", ("",), "7"),
    ]
    path = write(tmp_path, "dataset_tiny.json", KARPATHY)
    assert read_captions(path) == expected
    packed = tmp_path / "dataset_tiny.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_captions(packed) == expected
    assert [image.stem for image in expected] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "split"),
    [("captions_val2017.json", "val"), ("captions_train2014.json", "train"), ("coco_test_karpathy.json", "test")],
)
def test_official_coco_captions_in_the_order_of_the_images(tmp_path: Path, name: str, split: str) -> None:
    assert read_captions(write(tmp_path, name, OFFICIAL_JSON)) == [
        CaptionedImage("n.jpg", split, ("n0",), "9"),
        CaptionedImage("m.jpg", split, ("m0", "m1"), "3"),
    ]


def test_blips_lists_for_testing_and_for_training(tmp_path: Path) -> None:
    rows = [{"image": "val2014/x.jpg", "caption": ["x0", "x1"]}, {"image": "val2014/y.jpg", "caption": ["y0"]}]
    assert read_captions(write(tmp_path, "coco_karpathy_test.json", rows)) == [
        CaptionedImage("val2014/x.jpg", "test", ("x0", "x1")),
        CaptionedImage("val2014/y.jpg", "test", ("y0",)),
    ]
    rows = [
        {"image": name, "caption": text, "image_id": f"coco_{name}"}
        for name, text in (("x", "0"), ("y", "1"), ("x", "2"))
    ]
    assert read_captions(write(tmp_path, "coco_karpathy_train.json", rows)) == [
        CaptionedImage("x", "train", ("0", "2")),
        CaptionedImage("y", "train", ("1",)),
    ]


def test_clip_benchmarks_text_keeps_commas_quotes_and_empty_captions(tmp_path: Path) -> None:
    text = 'image,caption\nx.jpg,Two men, one "tall", wait .\nx.jpg,"Quoted, so."\n\ny.jpg,\nx.jpg,a b.jpg, c\u2028d\n'
    assert read_captions(write(tmp_path, "flickr30k_test_karpathy.txt", text)) == [
        CaptionedImage("x.jpg", "test", ('Two men, one "tall", wait .', '"Quoted, so."', "a b.jpg, c\u2028d")),
        CaptionedImage("y.jpg", "test", ("",)),
    ]


# Errors name file and record

OFFICIAL_IMAGE = {"id": 1, "file_name": "a.jpg"}
ANNOTATION = {"image_id": 1, "caption": "a"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions_val2017.json", {"images": [], "annotations": {}}, "'annotations' must be a list, found dict"),
        ("captions_val2017.json", {"images": [3], "annotations": []}, "image 0 must be an object, found int"),
        (
            "captions_val2017.json",
            {"images": [{"id": 1}], "annotations": []},
            r"image 0 has no 'file_name' \(it has: id\)",
        ),
        (
            "captions_val2017.json",
            {"images": [{**OFFICIAL_IMAGE, "id": [1]}], "annotations": []},
            "'id' must be a number",
        ),
        (
            "captions_val2017.json",
            {"images": [OFFICIAL_IMAGE] * 2, "annotations": []},
            "image 1 .* has the id 1 of an earlier",
        ),
        (
            "captions_val2017.json",
            {"images": [OFFICIAL_IMAGE], "annotations": [ANNOTATION, {**ANNOTATION, "image_id": 5}]},
            "annotation 1 names the image id 5, which no image of the file has",
        ),
        (
            "captions_val2017.json",
            {"images": [OFFICIAL_IMAGE], "annotations": [{**ANNOTATION, "caption": None}]},
            "annotation 0: 'caption' must be a string, found None",
        ),
        (
            "captions_val2017.json",
            {"images": [OFFICIAL_IMAGE], "annotations": []},
            r"image 0 \(a.jpg\) has no captions",
        ),
        ("captions_all.json", {"images": [OFFICIAL_IMAGE], "annotations": [ANNOTATION]}, "its split .* names no split"),
        ("train_val.json", {"images": [OFFICIAL_IMAGE], "annotations": [ANNOTATION]}, "it names both train and val"),
        ("x_test.json", [{"image": "a"}], r"record 0 has no 'caption' \(it has: image\)"),
        ("x_test.json", [{"image": "a", "caption": ["x", 3]}], r"record 0 \(a\): caption 1 must be a string, found 3"),
        ("x_test.json", [{"image": "a", "caption": []}], r"record 0 \(a\) has no captions"),
        ("x_test.json", [{"image": "a", "caption": {}}], r"record 0 \(a\): caption 0 must be a string"),
        ("x_test.json", [{"image": 3, "caption": []}], "record 0: 'image' must be a string, found 3"),
        ("x_test.json", [[]], "record 0 must be an object, found list"),
        ("x_test.json", "[1", "is not valid JSON: .* at line 1"),
        (
            "x_test.txt",
            "a.jpg,first\n",
            "line 1 must be a header such as 'image,caption', found the record 'a.jpg,first'",
        ),
        ("x_test.txt", "image,caption\na.jpg,x\nno picture\n", "line 3 must be NAME.jpg,CAPTION, found 'no picture'"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as error:
        read_captions(path)
    assert str(path) in str(error.value)


def test_bytes_that_are_no_text_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x_test.txt"
    path.write_bytes(b"image,caption\n\xff\xfe\n")
    with pytest.raises(UserError, match="can't read .*x_test.txt"):
        read_captions(path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("captions_val2017.json", "val"),
        ("flickr30k_train.json", "train"),
        ("Test-00000-of-00001.parquet", "test"),
        ("validation-00000-of-00001.parquet", "val"),
        ("x_dev.json", "val"),
    ],
)
def test_a_file_name_tells_the_split(name: str, split: str) -> None:
    assert split_of(Path(name)) == split


@pytest.mark.parametrize("name", ["trained.json", "latest.json", "valid.json", "train_test.json", "x.json"])
def test_other_names_tell_none(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: the name of the file must tell its split"):
        split_of(Path(name))


# Twice the same image


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            ("a.jpg", "val", "1"),
            ("a.jpg", "test", "2"),
            "two: 'a.jpg' is there in the splits 'val' and 'test' .before: one",
        ),
        (("a.jpg", "val", "1"), ("a.jpg", "val", "1"), "two: 'a.jpg' is there twice .before: one"),
        (("a.jpg", "val", "1"), ("b.jpg", "test", "1"), "two: the image id 1 is there in the splits 'val' and 'test'"),
        (("a.jpg", "val", "1"), ("b.jpg", "val", "1"), "two: the image id 1 is there twice"),
        (
            ("x/a.jpg", "val", None),
            ("y/a.jpg", "test", None),
            "two: 'y/a.jpg' and 'x/a.jpg' .one. would share one picture",
        ),
        (("a.jpg", "val", None), ("a.png", "val", None), "would share one picture"),
    ],
)
def test_an_image_occurs_once(first: tuple[str, str, str], second: tuple[str, str, str], message: str) -> None:
    images = [
        CaptionedImage(name, split, ("c",), identity, origin)
        for (name, split, identity), origin in ((first, "one"), (second, "two"))
    ]
    with pytest.raises(UserError, match=message):
        require_distinct(images)
    require_distinct(images[:1])
    require_distinct([CaptionedImage("a.jpg", "val", ("c",)), CaptionedImage("b.jpg", "test", ("c",))])


# Which files


def test_files_are_found_by_form_in_the_root_and_in_annotations(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "data").mkdir()
    names = {
        "Karpathy's JSON": ["dataset_coco.json.gz"],
        "BLIP's lists": ["annotations/coco_karpathy_test.json", "coco_karpathy_train.json"],
        "CLIP_benchmark's JSON": ["coco_test_karpathy.json"],
        "Parquet": ["data/test-0.parquet"],
        "official COCO captions of 2014": ["annotations/captions_train2014.json", "annotations/captions_val2014.json"],
        "official COCO captions of 2017": ["captions_val2017.json"],
    }
    others = [
        "dataset_flickr30k.json",
        "coco_karpathy_test_gt.json",
        "karpathy_test_5k_captions.json",
        "instances_val2017.json",
    ]
    for name in [*(name for group in names.values() for name in group), *others]:
        (tmp_path / name).write_text("")
    found = find_files(tmp_path, patterns_of("coco") | OFFICIAL)
    assert {form: [path.relative_to(tmp_path).as_posix() for path in files] for form, files in found.items()} == names
    both = find_files(tmp_path, patterns_of("*"))["Karpathy's JSON"]
    assert [path.name for path in both] == ["dataset_coco.json.gz", "dataset_flickr30k.json"]
    assert find_files(tmp_path / "nowhere", patterns_of("*")) == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "dataset_tiny.json",
            {"images": [{"filename": "", "split": "test", "sentences": [{"raw": "a"}]}]},
            "image 0: 'filename' must be the name of a file, found ''",
        ),
        (
            "captions_val2017.json",
            {"images": [{"id": 1, "file_name": "val2017/"}], "annotations": [{"image_id": 1, "caption": "a"}]},
            "image 0: 'file_name' must be the name of a file, found 'val2017/'",
        ),
        ("coco_karpathy_test.json", [{"image": "", "caption": ["a"]}], "record 0: 'image' must be the name of a file"),
    ],
)
def test_an_empty_file_name_is_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    write_json(tmp_path / name, content)
    with pytest.raises(UserError, match=f"^{tmp_path / name}: {message}"):
        read_captions(tmp_path / name)
