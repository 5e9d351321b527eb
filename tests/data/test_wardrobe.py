import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cliplab.data import wardrobe
from cliplab.data.garments import ATTRIBUTES, CATEGORIES, Garment, all_garments
from cliplab.data.wardrobe import WardrobeSpec, render_wardrobe, sample_pairs
from cliplab.errors import UserError

SPEC = WardrobeSpec(
    train_images=40, val_images=60, test_images=30, train_triplets=60, val_triplets=40, test_triplets=15
)
TINY = WardrobeSpec(
    image_size=16, train_images=12, val_images=12, test_images=4, train_triplets=3, val_triplets=2, test_triplets=0
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "wardrobe"
    render_wardrobe(folder, SPEC)
    return folder


@pytest.fixture(scope="module")
def garments(root: Path) -> dict[str, Garment]:
    return {name: Garment(**values) for name, values in read(root / "attributes.json").items()}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(root: Path, split: str) -> list[tuple[str, dict[str, Any]]]:
    return [(c, record) for c in CATEGORIES for record in read(root / f"captions/cap.{c}.{split}.json")]


def test_layout_and_counts(root: Path, garments: dict[str, Garment]) -> None:
    names = []
    for category in CATEGORIES:
        for split in ("train", "val", "test"):
            ids = read(root / f"image_splits/split.{category}.{split}.json")
            assert len(ids) == SPEC.images(split)
            assert len(read(root / f"captions/cap.{category}.{split}.json")) == SPEC.triplets(split)
            assert {garments[name].category for name in ids} == {category}
            names += ids
    assert len(set(names)) == len(names) == 3 * 130
    assert set(names) == garments.keys() == {path.stem for path in (root / "images").iterdir()}
    assert all(len(name) == 10 and name.startswith("WD0") for name in names)
    assert Image.open(root / f"images/{names[0]}.png").size == (64, 64)
    assert read(root / "wardrobe.json")["train_images"] == 40
    assert list(root.parent.iterdir()) == [root], "the scratch folder must go"


def test_every_val_garment_is_unique_in_its_gallery(root: Path, garments: dict[str, Garment]) -> None:
    for category in CATEGORIES:
        for split in ("val", "test"):
            ids = read(root / f"image_splits/split.{category}.{split}.json")
            assert len({garments[name] for name in ids}) == len(ids)


@pytest.mark.parametrize("split", ["train", "val"])
def test_triplets_change_one_or_two_attributes(root: Path, garments: dict[str, Garment], split: str) -> None:
    sizes: Counter[int] = Counter()
    for category, record in records(root, split):
        assert list(record) == ["target", "candidate", "captions"]
        gallery = read(root / f"image_splits/split.{category}.{split}.json")
        assert record["target"] in gallery and record["candidate"] in gallery
        sizes[len(garments[record["candidate"]].changes(garments[record["target"]]))] += 1
        assert len(set(record["captions"])) == 2
    assert sizes.keys() == {1, 2}
    assert sizes[1] == pytest.approx(0.25 * sizes.total(), abs=3)
    pairs = [(record["candidate"], record["target"]) for _, record in records(root, split)]
    assert len(set(pairs)) == len(pairs)
    if split == "val":
        assert len({target for _, target in pairs}) == len(pairs)


def test_the_test_split_hides_its_targets(root: Path) -> None:
    assert all(list(record) == ["candidate", "captions"] for _, record in records(root, "test"))


def test_karpathy_layout(root: Path) -> None:
    content = read(root / "dataset_wardrobe.json")
    images = content["images"]
    assert content["dataset"] == "wardrobe"
    assert Counter(image["split"] for image in images) == {"train": 120, "val": 90, "test": 90}
    assert [image["imgid"] for image in images] == list(range(300))
    assert [sentid for image in images for sentid in image["sentids"]] == list(range(1500))
    for image in images:
        assert (root / "images" / image["filename"]).is_file()
        assert len({sentence["raw"] for sentence in image["sentences"]}) == 5
        assert [sentence["sentid"] for sentence in image["sentences"]] == image["sentids"]
        assert all(sentence["imgid"] == image["imgid"] for sentence in image["sentences"])
        assert all(s["tokens"] == s["raw"].replace("-", " ").split() for s in image["sentences"])


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    np.random.seed(0)  # the global state must not matter
    render_wardrobe(tmp_path / "first", TINY)
    np.random.seed(1)
    render_wardrobe(tmp_path / "second", TINY)
    render_wardrobe(tmp_path / "third", replace(TINY, seed=1))
    first, second, third = (contents(tmp_path / name) for name in ("first", "second", "third"))
    assert first == second
    assert first.keys() == third.keys()
    assert all(first[name] != third[name] for name in first if "test" not in name and "split" not in name)


def test_a_rendered_root_is_left_alone(tmp_path: Path) -> None:
    render_wardrobe(tmp_path / "data", TINY)
    (tmp_path / "data/attributes.json").write_text("kept")
    render_wardrobe(tmp_path / "data", TINY)
    assert (tmp_path / "data/attributes.json").read_text() == "kept"
    with pytest.raises(UserError, match=r"'seed': 5.*but holds the wardrobe .*'seed': 0.*name another folder"):
        render_wardrobe(tmp_path / "data", replace(TINY, seed=5))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UserError, match="something else"):
        render_wardrobe(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_who_comes_second_keeps_the_first_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, write = tmp_path / "data", wardrobe._write

    def write_after_another(folder: Path, spec: WardrobeSpec) -> None:
        write(root, spec)
        (root / "images/marker").touch()
        write(folder, spec)

    monkeypatch.setattr(wardrobe, "_write", write_after_another)
    render_wardrobe(root, TINY)
    assert (root / "images/marker").is_file()
    assert list(tmp_path.iterdir()) == [root]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"only \d+ of 200 triplets .* among 4 images"):
        render_wardrobe(tmp_path / "data", replace(TINY, train_images=4, train_triplets=200))
    assert list(tmp_path.iterdir()) == []


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="val_images=1297"):
        WardrobeSpec(val_images=1297)
    with pytest.raises(UserError, match="test_triplets=121"):
        WardrobeSpec(test_triplets=121)


def test_the_default_sizes_change_attributes_equally_often() -> None:
    rng = np.random.default_rng(0)
    world = all_garments("dress")
    gallery = {str(k): world[row] for k, row in enumerate(rng.choice(len(world), 480, replace=False))}
    pairs = sample_pairs(gallery, 400, rng, unique_targets=True)
    changes = [gallery[reference].changes(gallery[target]) for reference, target in pairs]
    assert Counter(map(len, changes)) == {1: 100, 2: 300}
    assert Counter(name for changed in changes for name in changed) == pytest.approx(
        dict.fromkeys(ATTRIBUTES, 140), abs=5
    )


@pytest.mark.parametrize("dataset", [wardrobe.Wardrobe, wardrobe.WardrobeCaptions])
def test_data_sets_render_once_and_accept_any_specification(
    dataset: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wardrobe, "render_wardrobe", lambda root: render_wardrobe(root, TINY))
    dataset(tmp_path / "data").prepare()
    monkeypatch.setattr(wardrobe, "render_wardrobe", lambda root: pytest.fail("rendered twice"))
    dataset(tmp_path / "data").prepare()
    assert read(tmp_path / "data/wardrobe.json")["train_images"] == 12


def test_the_readers_of_real_data_read_it(root: Path) -> None:
    composed, captions = wardrobe.Wardrobe(root), wardrobe.WardrobeCaptions(root)
    assert {name: counts["val"]["records"] for name, counts in composed.counts().items()} == dict.fromkeys(
        CATEGORIES, 40
    )
    assert captions.counts()["test"] == {"images": 90, "captions": 450, "empty_captions": 0}
