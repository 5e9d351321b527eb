import io
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Image
from PIL import Image as Pillow

from cliplab.benchmark import make_protocol
from cliplab.data.caption_files import CaptionedImage
from cliplab.data.caption_tables import open_hub, open_parquet, read_table, write_pictures
from cliplab.data.karpathy import Karpathy
from cliplab.errors import UserError
from tests.data.conftest import picture

PROTOCOL = make_protocol({"name": "clip_benchmark"})


def bytes_of(number: int, form: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    picture(number).save(stream, form)
    return stream.getvalue()


def with_pictures(names: list[str | None], **columns: list[Any]) -> Dataset:
    images = [{"bytes": bytes_of(number), "path": name} for number, name in enumerate(names)]
    return Dataset.from_dict({"image": images, **columns}).cast_column("image", Image())


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


# Columns


@pytest.mark.parametrize("column", ["caption", "captions", "sentences", "raw", "text"])
def test_a_row_with_all_captions_of_an_image(column: str) -> None:
    table = Dataset.from_dict({"filename": ["x.jpg", "y.jpg"], column: [["x0", "x1"], ["y0"]], "cocoid": [5, 6]})
    images, pictures = read_table(table, "x_test.parquet")
    assert images == [
        CaptionedImage("x.jpg", "test", ("x0", "x1"), "5"),
        CaptionedImage("y.jpg", "test", ("y0",), "6"),
    ]
    assert pictures == {}


def test_a_row_with_one_caption_and_a_column_that_tells_the_split() -> None:
    rows = [("x", "a", "train"), ("y", "b", "validation"), ("x", "c", "train"), ("z", "d", "restval")]
    table = Dataset.from_dict(
        {key: list(of) for key, of in zip(("image", "caption", "split"), zip(*rows, strict=True), strict=True)}
    )
    assert read_table(table, "all.parquet")[0] == [
        CaptionedImage("x.jpg", "train", ("a", "c")),
        CaptionedImage("y.jpg", "val", ("b",)),
        CaptionedImage("z.jpg", "restval", ("d",)),
    ]


def test_a_picture_is_named_by_its_path_or_by_an_id() -> None:
    table = with_pictures(["p.jpg", "q.png"], caption=["a", "b"])
    images, pictures = read_table(table, "hub:org/name: split test")
    assert [(image.filename, image.split) for image in images] == [("p.jpg", "test"), ("q.png", "test")]
    assert set(pictures) == {"p", "q"}
    unnamed = with_pictures([None, None], caption=["a", "b"], image_id=[7, 8])
    assert [image.filename for image in read_table(unnamed, "test.parquet")[0]] == ["7.jpg", "8.jpg"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"filename": ["x"]}, "no column of captions .caption, captions, .*; it has: filename"),
        ({"caption": ["x"]}, "no column of the name of the image .filename, .*; it has: caption"),
        ({"url": ["x"]}, "no column of captions .* and none of the name of the image .*; it has: url"),
        ({"filename": ["x"], "caption": [3]}, "row 0: caption 0 must be a string, found 3"),
        ({"filename": ["x"], "caption": [None]}, "row 0: caption 0 must be a string, found None"),
        ({"filename": ["x", "y"], "caption": [["a"], []]}, "row 1 has no captions"),
        ({"filename": [None], "caption": ["a"]}, "row 0: the name of the image must be a string, found None"),
        ({"filename": ["x"], "caption": ["a"], "split": ["tst"]}, "row 0: unknown split 'tst'; there is: train"),
    ],
)
def test_bad_tables_name_column_or_row(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_table(Dataset.from_dict(columns), "x_test.parquet")
    assert str(error.value).startswith("x_test.parquet")


# Sources


def test_a_data_set_in_the_layout_of_the_hub_is_read_and_evaluated(tmp_path: Path) -> None:
    source, root = tmp_path / "hub", tmp_path / "root"
    for split, names in (("train", ["a.jpg"]), ("validation", ["b.jpg"]), ("test", ["c.jpg", "d.jpg"])):
        captions = [[f"{name} 0", f"{name} 1"] for name in names]
        (source / "data").mkdir(parents=True, exist_ok=True)
        with_pictures(names, caption=captions).to_parquet(str(source / "data" / f"{split}-00000-of-00001.parquet"))
    dataset = Karpathy(root, annotations=f"hub:{source}")
    assert {split: of["captions"] for split, of in dataset.counts().items()} == {"train": 2, "val": 2, "test": 4}
    assert not root.exists()
    dataset.check(PROTOCOL, ["test"])
    assert sorted(path.name for path in (root / "images").iterdir()) == ["c.jpg", "d.jpg"]
    assert (root / "images" / "d.jpg").read_bytes() == bytes_of(1)
    (benchmark,) = dataset.benchmarks(PROTOCOL, "test")
    assert benchmark.gallery["image"][:] == [str(root / "images" / name) for name in ("c.jpg", "d.jpg")]
    assert benchmark.positives == [[0], [0], [1], [1]]
    assert dataset.train_table(PROTOCOL)["texts"][:] == [["a.jpg 0", "a.jpg 1"]]
    assert dataset.summary()["annotations"] == f"hub:{source}"


def test_parquet_files_beside_a_folder_of_pictures(karpathy_root: Path) -> None:
    (karpathy_root / "dataset_tiny.json").unlink()
    Dataset.from_dict({"filename": ["c.jpg"], "caption": [["c0"]]}).to_parquet(str(karpathy_root / "test-0.parquet"))
    dataset = Karpathy(karpathy_root)
    assert dataset.annotation_files() == [karpathy_root / "test-0.parquet"]
    dataset.check(PROTOCOL, ["test"])
    assert dataset.benchmarks(PROTOCOL, "test")[0].queries["text"][:] == ["c0"]
    assert len(dataset.manifest_hash()) == 64


def test_one_image_in_two_splits_of_a_source(tmp_path: Path) -> None:
    for split in ("train", "test"):
        Dataset.from_dict({"filename": ["c.jpg"], "caption": ["c0"]}).to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(
        UserError, match="train.parquet: row 0: 'c.jpg' is there in the splits 'test' and 'train' .*test.parq"
    ):
        Karpathy(tmp_path).check(PROTOCOL, ["test"])


def test_a_broken_or_unknown_source_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x_test.parquet").write_text("nothing of the kind")
    with pytest.raises(UserError, match="x_test.parquet is not a readable Parquet file"):
        open_parquet(tmp_path / "x_test.parquet")
    with pytest.raises(UserError, match="^data.annotations=hub:.*nowhere can't be loaded: "):
        open_hub(str(tmp_path / "nowhere"))
    monkeypatch.setattr(
        "cliplab.data.caption_tables.load_dataset", lambda name: DatasetDict(test=Dataset.from_dict({}))
    )
    assert list(open_hub("org/name")) == ["hub:org/name: split test"]


BROKEN = {
    "test.json": ('[{"filename": "a.jpg", "caption": "x"},\n {"filename": ', "not valid JSON: .* at line 2, column"),
    "test.jsonl": (
        '{"filename": "a.jpg", "caption": "x"}\n{"filename": "b.j',
        ": line 2 is not valid JSON: Unterminated",
    ),
    "test.csv": ('filename,caption\na,b\nc,"d\n', ".*EOF inside string"),
    "test.parquet": ("PAR1", ".*Parquet file size is 4 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_of_a_source_is_named_once(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content, message = BROKEN[name]
    path, screen = tmp_path / "source" / name, io.StringIO()
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [logging.StreamHandler(screen)])
    path.parent.mkdir()
    path.write_text(content)
    if path.suffix == ".jsonl":  # a sound file beside it
        (path.parent / "train.jsonl").write_text('{"filename": "b.jpg", "caption": "x"}\n' * 2)
    with pytest.raises(UserError, match=f"^data.annotations=hub:{path.parent} can't be loaded: .*{name}.*{message}"):
        open_hub(str(path.parent))
    assert screen.getvalue() == ""


# Pictures


def test_pictures_are_written_byte_for_byte_with_the_ending_of_their_content(tmp_path: Path) -> None:
    content = [bytes_of(1), bytes_of(2, "PNG")]
    rows = [{"bytes": one, "path": f"{number}.jpg"} for number, one in enumerate(content)]
    images = Dataset.from_dict({"image": rows, "caption": ["a", "b"]})
    _, pictures = read_table(images, "x_test.parquet")
    write_pictures(pictures, ["0", "1", "of another source"], tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        "0.jpg": content[0],
        "1.png": content[1],
    }
    with Pillow.open(tmp_path / "out" / "1.png") as written:
        assert written.getpixel((0, 0)) == picture(2).getpixel((0, 0))


@pytest.mark.parametrize(
    ("content", "message"), [(b"GIF89a", "neither JPEG nor PNG"), (None, "holds no picture of 'x'")]
)
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    table = Dataset.from_dict({"image": [{"bytes": content, "path": "x.jpg"}], "caption": ["a"]})
    _, pictures = read_table(table.cast_column("image", Image(decode=False)), "x_test.parquet")
    with pytest.raises(UserError, match=message):
        write_pictures(pictures, ["x"], tmp_path)
