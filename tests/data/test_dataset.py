import gzip
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from cliplab.benchmark import Benchmark, Protocol
from cliplab.data.dataset import STAND_IN_MARKER, RetrievalDataset, read_json
from cliplab.errors import UserError


class Letters(RetrievalDataset):
    """The least that a data set can be: annotations in a.json and b.json."""

    benchmark_name = "letters"
    default_protocol = "clip4cir"
    protocols = ("clip4cir",)

    @property
    def all_categories(self) -> tuple[str, ...]:
        return ("vowels", "consonants")

    def check(self, protocol: Protocol, splits: Iterable[str]) -> None:
        self.check_images(["a", "b"], protocol.missing_images)

    def train_table(self, protocol: Protocol) -> Dataset:
        raise NotImplementedError

    def benchmarks(self, protocol: Protocol, split: str) -> list[Benchmark]:
        raise NotImplementedError

    def counts(self) -> dict[str, Any]:
        return {
            "vowels": {"train": {"empty_captions": 2}, "val": {"empty_captions": 1}},
            "consonants": {"train": {"empty_captions": 3}},
        }

    def annotation_files(self) -> list[Path]:
        return [path for path in (self.root / "a.json", self.root / "b.json") if path.is_file()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a.json").write_text("[1]")
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "images" / "x.png").write_bytes(b"123")
    (tmp_path / "images" / "sub" / "y.jpg").write_bytes(b"45")
    return tmp_path


# read_json


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_read_json_plain_and_compressed(tmp_path: Path, name: str) -> None:
    raw = json.dumps({"names": ["Größe", 1]}, ensure_ascii=False).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert read_json(tmp_path / name) == {"names": ["Größe", 1]}


def test_read_json_names_the_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n  "one",\n  two\n]')
    with pytest.raises(UserError, match=f"^{path} is not valid JSON: .* at line 3, column 3$"):
        read_json(path)


def test_read_json_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^no file {tmp_path / 'a.json'}$"):
        read_json(tmp_path / "a.json")


def damaged_files() -> dict[str, tuple[str, bytes]]:
    packed = gzip.compress(json.dumps(list(range(500))).encode(), mtime=0)
    return {
        "empty": ("a.json", b""),
        "no text": ("a.json", b'["\xff\xfe"]'),
        "not compressed": ("a.json.gz", b"[1]"),
        "cut": ("a.json.gz", packed[: len(packed) // 2]),
        "one byte wrong": ("a.json.gz", packed[:40] + bytes([packed[40] ^ 0xFF]) + packed[41:]),
        "all bytes wrong": ("a.json.gz", packed[:10] + b"\xff" * (len(packed) - 10)),
    }


@pytest.mark.parametrize("damage", damaged_files())
def test_read_json_names_a_damaged_file(tmp_path: Path, damage: str) -> None:
    name, content = damaged_files()[damage]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("content", ['{"a": 1, "b": 2, "a": 1}', '[{"c": {"b": 1}}, {"a": 1, "a": 2}]'])
def test_read_json_names_a_key_that_is_there_twice(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=rf"^{tmp_path / 'a.json'}: the key 'a' is there more than once in .*'a': 1, "):
        read_json(tmp_path / "a.json")


def test_read_json_of_a_folder_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        read_json(tmp_path)


# What every data set has


def test_images_are_below_the_root_unless_told(tmp_path: Path) -> None:
    assert Letters(tmp_path).image_root == tmp_path / "images"
    assert Letters(str(tmp_path), str(tmp_path / "other")).image_root == tmp_path / "other"


def test_categories_are_all_or_the_chosen_in_their_order(tmp_path: Path) -> None:
    assert Letters(tmp_path).categories == ("vowels", "consonants")
    assert Letters(tmp_path, categories=["consonants"]).categories == ("consonants",)
    assert Letters(tmp_path, categories=["consonants", "vowels"]).categories == ("consonants", "vowels")


@pytest.mark.parametrize("chosen", [["vowels", "digits"], []])
def test_unknown_categories_list_what_there_is(tmp_path: Path, chosen: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.categories: .*there is: vowels, consonants"):
        Letters(tmp_path, categories=chosen)


def test_stand_ins_are_marked_by_a_file(root: Path) -> None:
    assert not Letters(root).stand_ins
    (root / "images" / STAND_IN_MARKER).touch()
    assert Letters(root).stand_ins
    assert not Letters(root, root / "images" / "sub").stand_ins


def test_summary_says_what_was_measured_on(root: Path) -> None:
    dataset = Letters(root, categories=["vowels"])
    summary = dataset.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["name"], summary["categories"]) == ("letters", ["vowels"])
    assert summary["counts"] == dataset.counts()
    assert summary["empty_captions"] == {"train": 5, "val": 1}
    assert summary["manifest_hash"] == dataset.manifest_hash() and len(dataset.manifest_hash()) == 64
    assert summary["stand_in_images"] is False


# The manifest


def test_the_manifest_hash_is_that_of_equal_files_anywhere(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_file():
            (other / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            (other / path.relative_to(root)).write_bytes(path.read_bytes())
    assert Letters(other).manifest_hash() == Letters(root).manifest_hash() == Letters(root).manifest_hash()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[2]"),
        ("b.json", b""),
        ("images/x.png", b"1234"),
        ("images/sub/y.jpg", b""),
        ("images/z.jpeg", b"1"),
    ],
)
def test_the_manifest_hash_changes_with_annotations_and_image_sizes(root: Path, name: str, content: bytes) -> None:
    before = Letters(root).manifest_hash()
    (root / name).write_bytes(content)
    assert Letters(root).manifest_hash() != before


def test_the_manifest_hash_changes_with_an_image_name_and_not_with_other_files(root: Path) -> None:
    before = Letters(root).manifest_hash()
    (root / "images" / "notes.txt").write_text("not an image")
    assert Letters(root).manifest_hash() == before
    (root / "images" / "x.png").rename(root / "images" / "w.png")
    assert Letters(root).manifest_hash() != before


# Missing images


def test_missing_images_are_an_error_with_ten_names_and_the_count(root: Path) -> None:
    names = [f"n{number:02d}" for number in range(12)]
    with pytest.raises(UserError) as error:
        Letters(root).check_images([*names, "x", "y", "n00"], "error")
    text = str(error.value)
    assert text.startswith(f"12 image(s) not found in {root / 'images'} (as .jpg, .jpeg or .png): n00, n01, ")
    assert "n09, ..." in text and "n10" not in text
    assert "data.protocol.missing_images=report" in text


def test_ten_missing_images_are_listed_without_dots(root: Path) -> None:
    with pytest.raises(UserError, match=r"^10 image.*: n0, n1, n2, n3, n4, n5, n6, n7, n8, n9\. "):
        Letters(root).check_images([f"n{number}" for number in range(10)], "error")


def test_reported_missing_images_are_counted_and_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = Letters(root)
    with caplog.at_level(logging.WARNING, "cliplab"):
        dataset.check_images(["x", "b", "a", "b"], "report")
    assert dataset.missing == ["a", "b"]
    assert dataset.summary()["missing_images"] == {"count": 2, "first": ["a", "b"]}
    assert "2 image(s) are missing" in caplog.text


@pytest.mark.parametrize("policy", ["error", "report"])
def test_a_folder_without_images_is_an_error_under_any_policy(tmp_path: Path, policy: str) -> None:
    with pytest.raises(UserError, match=f"not found in {tmp_path / 'images'}"):
        Letters(tmp_path).check_images(["a"], policy)


@pytest.mark.parametrize("policy", ["error", "report"])
def test_complete_images_pass(root: Path, policy: str) -> None:
    dataset = Letters(root)
    dataset.check_images(["y", "x"], policy)
    assert dataset.missing == []
