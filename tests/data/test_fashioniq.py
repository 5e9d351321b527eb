import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cliplab.benchmark import Benchmark, make_protocol
from cliplab.data.fashioniq import FashionIQ
from cliplab.errors import UserError

PROTOCOL = make_protocol({"name": "clip4cir"})
ALL_SPLITS = ["train", "val"]

# The val records of dress are D4 -> D5 (" is Blue.", "shorter?") and D6 -> D4 ("", "is red.").
ORIGINAL = ["D7", "D5", "D4", "D6"]  # order of the split file
NAMED = ["D4", "D5", "D6"]  # sorted references and targets
UNION = [*ORIGINAL, "X1", "S4", "S3", "T2", "T3"]  # X1 is in shirt and in toptee

ONE_EACH = {
    "gallery": ORIGINAL,
    "query_id": [0, 1],
    "reference": ["D4", "D6"],
    "positive": ["D5", "D4"],
    "names": ["D4->D5", "D6->D4"],
}
AND_CAP = ONE_EACH | {"texts": ["Is blue and shorter", " and is red"]}
PSEUDO_WORD = ONE_EACH | {
    "query_id": [0, 0, 1, 1],
    "texts": [
        "a photo of $ that is Blue and shorter",
        "a photo of $ that shorter and is Blue",
        "a photo of $ that  and is red",
        "a photo of $ that is red and ",
    ],
}
EXPECTED: dict[str, dict[str, Any]] = {
    "clip4cir": AND_CAP,
    "bi_blip4cir": AND_CAP,
    "candidate_reranking": AND_CAP,
    "sprc": AND_CAP,
    "searle": PSEUDO_WORD,
    "lincir": PSEUDO_WORD,
    "pic2word": ONE_EACH | {"texts": ["a photo of * , shorter? and  is Blue.", "a photo of * , is red. and "]},
    "bge_vl": ONE_EACH | {"texts": [" is Blue., and shorter?", ", and is red."]},
    "covr": ONE_EACH | {"texts": ["is blue and shorter?", "and is red"]},
    "artemis": {
        "gallery": ORIGINAL,
        "texts": [" is Blue. and shorter?", "shorter? and  is Blue.", " and is red.", "is red. and "],
        "query_id": [0, 1, 2, 3],
        "reference": ["D4", "D4", "D6", "D6"],
        "positive": ["D5", "D5", "D4", "D4"],
        "names": ["D4->D5#0", "D4->D5#1", "D6->D4#0", "D6->D4#1"],
    },
    "val": {
        "gallery": NAMED,
        "texts": [" is Blue.", "shorter?", "is red."],
        "query_id": [0, 1, 2],
        "reference": ["D4", "D4", "D6"],
        "positive": ["D5", "D5", "D4"],
        "names": ["D4->D5#0", "D4->D5#1", "D6->D4"],
    },
    "composeae": ONE_EACH | {"gallery": UNION, "texts": ["dress  is blue. and it shorter?", "dress  and it is red."]},
}


def dress(root: Path, name: str = "clip4cir", **changes: Any) -> Benchmark:
    protocol = make_protocol({"name": name, **changes})
    return FashionIQ(root).benchmarks(protocol, "val")[0]


def edit(path: Path, change: Callable[[Any], Any]) -> Path:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return path


def captions_of(root: Path, split: str = "val") -> Path:
    return root / "captions" / f"cap.dress.{split}.json"


# Benchmarks under each protocol


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() | set(FashionIQ.protocols)))
def test_each_protocol_as_worked_by_hand(fashioniq_root: Path, name: str) -> None:
    expected, benchmark = EXPECTED[name], dress(fashioniq_root, name)
    gallery = benchmark.gallery["id"][:]
    assert gallery == expected["gallery"]
    assert benchmark.queries["text"][:] == expected["texts"]
    assert benchmark.queries["query_id"][:] == expected["query_id"]
    assert [gallery[row] for row in benchmark.references()] == expected["reference"]
    assert [[gallery[row] for row in rows] for rows in benchmark.positives] == [[n] for n in expected["positive"]]
    assert benchmark.query_names == expected["names"]
    # Every row of a query shows its reference image.
    images = [Path(path).stem for path in benchmark.queries["image"]]
    assert images == [expected["reference"][query_id] for query_id in expected["query_id"]]
    empty = 1 if name == "val" else 0
    assert benchmark.excluded == {"gallery_rows": 0, "queries": 0, "empty_captions": empty}


def test_the_gallery_shows_images_and_no_text(fashioniq_root: Path) -> None:
    gallery = dress(fashioniq_root).gallery
    assert gallery["image"][:] == [str(fashioniq_root / "images" / f"{name}.png") for name in ORIGINAL]
    assert gallery["text"][:] == [None] * 4


def test_one_benchmark_per_category_in_the_chosen_order(fashioniq_root: Path) -> None:
    def names(**chosen: Any) -> list[str]:
        return [benchmark.name for benchmark in FashionIQ(fashioniq_root, **chosen).benchmarks(PROTOCOL, "val")]

    assert names() == ["dress", "shirt", "toptee"]
    assert names(categories=["toptee", "dress"]) == ["toptee", "dress"]


def test_the_union_of_galleries_is_of_all_categories_also_where_one_is_chosen(fashioniq_root: Path) -> None:
    dataset = FashionIQ(fashioniq_root, categories=["shirt"])
    protocol = make_protocol({"name": "composeae"})
    assert dataset.gallery("shirt", "val", protocol) == UNION
    (benchmark,) = dataset.benchmarks(protocol, "val")
    assert benchmark.gallery["id"][:] == UNION
    assert [UNION[rows[0]] for rows in benchmark.positives] == ["X1"]


@pytest.mark.parametrize(
    ("gallery", "sizes"), [("original_split", [4, 3, 3]), ("val_split", [3, 2, 2]), ("all", [9, 9, 9])]
)
def test_the_galleries_of_all_categories(fashioniq_root: Path, gallery: str, sizes: list[int]) -> None:
    protocol = make_protocol({"name": "clip4cir", "gallery": gallery})
    benchmarks = FashionIQ(fashioniq_root).benchmarks(protocol, "val")
    assert [len(benchmark.gallery) for benchmark in benchmarks] == sizes


def test_images_may_lie_in_a_folder_per_category(fashioniq_root: Path) -> None:
    before = dress(fashioniq_root)
    folder = fashioniq_root / "images"
    for path in list(folder.iterdir()):
        (folder / path.name[0]).mkdir(exist_ok=True)
        path.rename(folder / path.name[0] / path.name)
    after = dress(fashioniq_root)
    assert after.gallery["id"][:] == before.gallery["id"][:]
    assert after.gallery["image"][0] == str(folder / "D" / "D7.png")


# Training


def train_rows(root: Path, name: str, **chosen: Any) -> list[tuple[str, str, list[str]]]:
    table = FashionIQ(root, **chosen).train_table(make_protocol({"name": name}))
    references, targets = ([Path(path).stem for path in table[key]] for key in ("reference", "target"))
    return list(zip(references, targets, table["texts"][:], strict=True))


def test_training_is_on_all_categories_jointly(fashioniq_root: Path) -> None:
    assert train_rows(fashioniq_root, "clip4cir") == [
        ("D1", "D2", ["Is red and longer", "Longer and is Red", "Is red", "Longer"]),
        ("D2", "D3", [" and has sleeves", "Has sleeves and ", "", "Has sleeves"]),
        (
            "S1",
            "S2",
            ["Has a collar and is white", "Is white and has a collar", "Has a collar", "Is white"],
        ),
        ("T1", "S2", ["More white and has a print", "Has a print and more white", "More white", "Has a print"]),
    ]
    assert [row[:2] for row in train_rows(fashioniq_root, "clip4cir", categories=["toptee"])] == [("T1", "S2")]


def test_training_ids_are_one_per_image_across_categories(fashioniq_root: Path) -> None:
    table = FashionIQ(fashioniq_root).train_table(PROTOCOL)
    names: dict[str, int] = {}
    for kind in ("reference", "target"):
        for path, row in zip(table[kind], table[f"{kind}_id"], strict=True):
            assert names.setdefault(Path(path).stem, row) == row
    assert len(set(names.values())) == len(names) == 6  # S2 is the target of a shirt and of a toptee


def test_training_samples_of_the_other_joins(fashioniq_root: Path) -> None:
    assert [texts for _, _, texts in train_rows(fashioniq_root, "artemis", categories=["dress"])] == [
        ["is Red. and longer"],
        ["longer and is Red."],
        [" and has sleeves"],
        ["has sleeves and "],
    ]
    assert train_rows(fashioniq_root, "val", categories=["dress"]) == [
        ("D1", "D2", ["is Red."]),
        ("D1", "D2", ["longer"]),
        ("D2", "D3", ["has sleeves"]),
    ]
    assert train_rows(fashioniq_root, "composeae", categories=["dress"])[0][2] == ["dress is red. and it longer"]


def test_the_prompt_stands_around_training_texts(fashioniq_root: Path) -> None:
    texts = train_rows(fashioniq_root, "searle", categories=["dress"])[0][2]
    assert texts == [f"a photo of $ that {x}" for x in ("Is red and longer", "Longer and is Red", "Is red", "Longer")]


# Counts


def test_counts_of_a_category(fashioniq_root: Path) -> None:
    counts = FashionIQ(fashioniq_root).counts()
    assert list(counts) == ["dress", "shirt", "toptee"]
    assert counts["dress"] == {
        "train": {
            "records": 2,
            "split_images": 3,
            "references": 2,
            "references_and_targets": 3,
            "empty_captions": 1,
            "captions_with_outer_spaces": 0,
        },
        "val": {
            "records": 2,
            "split_images": 4,
            "references": 2,
            "references_and_targets": 3,
            "empty_captions": 1,
            "captions_with_outer_spaces": 1,
        },
        "test": {
            "records": 1,
            "split_images": 2,
            "references": 1,
            "empty_captions": 0,
            "captions_with_outer_spaces": 0,
        },
    }


def test_counts_need_no_images_and_leave_out_splits_that_are_not_there(fashioniq_root: Path) -> None:
    for path in fashioniq_root.glob("images/*"):
        path.unlink()
    captions_of(fashioniq_root, "test").unlink()
    dataset = FashionIQ(fashioniq_root, categories=["dress"])
    assert {split: found["records"] for split, found in dataset.counts()["dress"].items()} == {"train": 2, "val": 2}


def test_annotation_files_are_those_of_the_chosen_categories_that_exist(fashioniq_root: Path) -> None:
    assert len(FashionIQ(fashioniq_root).annotation_files()) == 18
    captions_of(fashioniq_root, "test").unlink()
    found = FashionIQ(fashioniq_root, categories=["dress"]).annotation_files()
    assert [path.name for path in found] == [
        "cap.dress.train.json",
        "cap.dress.val.json",
        "split.dress.train.json",
        "split.dress.val.json",
        "split.dress.test.json",
    ]


# Missing images


def remove(root: Path, *names: str) -> None:
    for name in names:
        (root / "images" / f"{name}.png").unlink()


def test_complete_data_pass_without_the_images_of_other_splits(fashioniq_root: Path) -> None:
    dataset = FashionIQ(fashioniq_root)
    dataset.check(PROTOCOL, ALL_SPLITS)
    assert dataset.missing == []


@pytest.mark.parametrize(
    ("name", "missing"),
    [("D1", "clip4cir"), ("D7", "clip4cir"), ("D5", "val"), ("T2", "composeae")],
    ids=["reference in train", "distractor", "target", "gallery of another category"],
)
def test_a_missing_image_is_an_error(fashioniq_root: Path, name: str, missing: str) -> None:
    remove(fashioniq_root, name)
    with pytest.raises(UserError, match=f"^1 image.*: {name}. .*missing_images=report"):
        FashionIQ(fashioniq_root, categories=["dress"]).check(make_protocol({"name": missing}), ALL_SPLITS)


def test_an_image_that_no_needed_split_and_gallery_holds_may_be_missing(fashioniq_root: Path) -> None:
    remove(fashioniq_root, "D7", "D1", "T2")
    FashionIQ(fashioniq_root, categories=["dress"]).check(make_protocol({"name": "val"}), ["val"])


@pytest.mark.parametrize(
    ("protocol", "removed", "excluded", "left"),
    [
        ("clip4cir", ["D7"], {"gallery_rows": 1, "queries": 0, "empty_captions": 0}, ["D4->D5", "D6->D4"]),
        ("clip4cir", ["D5"], {"gallery_rows": 1, "queries": 1, "empty_captions": 0}, ["D6->D4"]),
        ("searle", ["D5"], {"gallery_rows": 1, "queries": 1, "empty_captions": 0}, ["D6->D4"]),
        ("artemis", ["D6"], {"gallery_rows": 1, "queries": 2, "empty_captions": 0}, ["D4->D5#0", "D4->D5#1"]),
        ("val", ["D5"], {"gallery_rows": 1, "queries": 2, "empty_captions": 1}, ["D6->D4"]),
    ],
)
def test_reported_missing_images_are_left_out_and_counted(
    fashioniq_root: Path, protocol: str, removed: list[str], excluded: dict[str, int], left: list[str]
) -> None:
    before = dress(fashioniq_root, protocol)
    remove(fashioniq_root, *removed)
    after = dress(fashioniq_root, protocol, missing_images="report")
    assert after.excluded == excluded
    assert after.query_names == left
    assert after.gallery["id"][:] == [name for name in before.gallery["id"] if name not in removed]
    gallery = after.gallery["id"][:]
    assert [[gallery[row] for row in rows] for rows in after.positives] == [[n.split(">")[1][:2]] for n in left]
    assert [gallery[row] for row in after.references()] == [name[:2] for name in left]
    assert sorted(set(after.queries["query_id"])) == list(range(len(left)))


def test_a_benchmark_without_a_query_left_is_refused(fashioniq_root: Path) -> None:
    remove(fashioniq_root, "D4", "D7")
    with pytest.raises(UserError, match=r"cap\.dress\.val\.json: no query is left"):
        dress(fashioniq_root, "clip4cir", missing_images="report")


def test_reported_missing_images_leave_training_records_out_and_are_known(fashioniq_root: Path) -> None:
    remove(fashioniq_root, "D1", "S2")
    protocol = make_protocol({"name": "clip4cir", "missing_images": "report"})
    dataset = FashionIQ(fashioniq_root)
    dataset.check(protocol, ALL_SPLITS)
    assert dataset.missing == ["D1", "S2"]
    assert [Path(path).stem for path in dataset.train_table(protocol)["target"]] == ["D3"]


def test_the_policy_error_leaves_nothing_out_where_nobody_called_check(fashioniq_root: Path) -> None:
    remove(fashioniq_root, "D1", "D5")
    dataset = FashionIQ(fashioniq_root)
    with pytest.raises(UserError, match="D5"):
        dataset.benchmarks(PROTOCOL, "val")
    with pytest.raises(UserError, match="D1"):
        dataset.train_table(PROTOCOL)


# Missing files


def test_missing_files_are_named_with_the_folder_and_a_way_out(fashioniq_root: Path) -> None:
    captions_of(fashioniq_root).unlink()
    (fashioniq_root / "image_splits" / "split.shirt.train.json").unlink()
    with pytest.raises(UserError) as error:
        FashionIQ(fashioniq_root).check(PROTOCOL, ALL_SPLITS)
    text = str(error.value)
    assert f"FashionIQ is not complete in {fashioniq_root}." in text
    assert "Missing: captions/cap.dress.val.json, image_splits/split.shirt.train.json." in text
    assert "https://github.com/XiaoxiaoGuo/fashion-iq" in text
    assert "python train.py --config configs/quickstart.yaml" in text
    assert "folder of photographs" not in text


def test_only_files_of_the_chosen_categories_and_splits_are_needed(fashioniq_root: Path) -> None:
    captions_of(fashioniq_root, "test").unlink()
    (fashioniq_root / "image_splits" / "split.shirt.train.json").unlink()
    FashionIQ(fashioniq_root, categories=["dress"]).check(PROTOCOL, ALL_SPLITS)


def test_a_missing_folder_of_photographs_is_named(fashioniq_root: Path) -> None:
    with pytest.raises(UserError, match=f"photographs {fashioniq_root / 'photos'} .set data.images"):
        FashionIQ(fashioniq_root, fashioniq_root / "photos").check(PROTOCOL, ALL_SPLITS)


def test_nothing_at_all_names_every_file(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        FashionIQ(tmp_path / "nowhere").check(PROTOCOL, ALL_SPLITS)
    assert str(error.value).count(".json") == 12
    assert str(tmp_path / "nowhere") in str(error.value)


# Malformed annotations


def test_malformed_json_names_file_and_line(fashioniq_root: Path) -> None:
    path = captions_of(fashioniq_root)
    path.write_text('[\n{"candidate": "D4",}]')
    with pytest.raises(UserError, match=f"^{path} is not valid JSON: .* at line 2, column 20"):
        FashionIQ(fashioniq_root).check(PROTOCOL, ALL_SPLITS)


def changed(**fields: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """Change fields of record 1; a field set to `...` is removed."""

    def change(records: list[dict[str, Any]]) -> Any:
        merged = records[1] | fields
        return [records[0], {key: value for key, value in merged.items() if value is not ...}]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(target=...), r"record 1 has no 'target' \(it has: candidate, captions\)"),
        (changed(candidate=...), "record 1 has no 'candidate'"),
        (changed(captions=...), "record 1 has no 'captions'"),
        (changed(captions=["one"]), r"record 1 must have exactly two captions .* found \['one'\]"),
        (changed(captions=["1", "2", "3"]), "record 1 must have exactly two captions"),
        (changed(captions=["one", None]), "record 1 must have exactly two captions"),
        (changed(captions="ab"), "record 1 must have exactly two captions .* found 'ab'"),
        (changed(target=5), "record 1: 'target' must be an image id, found 5"),
        (changed(target=None), "record 1"),
        (changed(candidate=["D4"]), "record 1: 'candidate' must be an image id"),
        (changed(candidate=None), "record 1"),
        (changed(target="D99"), r"the target 'D99' of record 1 is not in .*split\.dress\.val\.json"),
        (changed(candidate="S3"), r"the candidate 'S3' of record 1 is not in .*split\.dress\.val\.json"),
        (lambda records: [records[0], "D4"], "record 1 must be an object, found str"),
        (lambda records: [records[0], {}], r"record 1 has no 'candidate' \(it has: nothing\)"),
        (lambda records: {"records": records}, "must hold a JSON list, found dict"),
    ],
)
def test_a_malformed_record_is_named(
    fashioniq_root: Path, change: Callable[[list[dict[str, Any]]], Any], message: str
) -> None:
    path = edit(captions_of(fashioniq_root), change)
    dataset = FashionIQ(fashioniq_root)
    for _ in range(2):  # what was read once is kept: it must not pass the second time
        with pytest.raises(UserError, match=message) as error:
            dataset.check(PROTOCOL, ["val"])
        assert str(error.value).startswith(str(path))


def test_a_training_record_without_target_is_named_and_not_dropped(fashioniq_root: Path) -> None:
    edit(captions_of(fashioniq_root, "train"), changed(target=None))
    with pytest.raises(UserError, match="record 1"):
        FashionIQ(fashioniq_root).check(PROTOCOL, ["train"])


@pytest.mark.parametrize("content", [{"D4": 1}, ["D4", 5], ["D4", None]])
def test_a_malformed_split_file_is_named(fashioniq_root: Path, content: Any) -> None:
    path = edit(fashioniq_root / "image_splits" / "split.dress.val.json", lambda _: content)
    with pytest.raises(UserError, match=f"^{path} must "):
        FashionIQ(fashioniq_root).check(PROTOCOL, ["val"])


def test_a_test_split_has_no_targets_and_cannot_be_measured(fashioniq_root: Path) -> None:
    path = captions_of(fashioniq_root, "test")
    for name in ("D8", "D9"):
        (fashioniq_root / "images" / f"{name}.png").write_bytes((fashioniq_root / "images" / "D1.png").read_bytes())
    dataset = FashionIQ(fashioniq_root)
    assert [(record.reference, record.target) for record in dataset.records("dress", "test")] == [("D8", None)]
    with pytest.raises(UserError, match=f"{path} has no targets"):
        dataset.benchmarks(PROTOCOL, "test")


def test_an_empty_caption_is_allowed(fashioniq_root: Path) -> None:
    dataset = FashionIQ(fashioniq_root)
    dataset.check(PROTOCOL, ALL_SPLITS)
    assert dataset.records("dress", "val")[1].captions == ("", "is red.")
    assert dataset.empty_captions() == {"train": 1, "val": 1, "test": 0}


def test_a_record_of_two_empty_captions_has_no_query_of_its_own_captions(fashioniq_root: Path) -> None:
    edit(captions_of(fashioniq_root), changed(captions=["", " "]))
    benchmark = dress(fashioniq_root, "val")
    assert benchmark.query_names == ["D4->D5#0", "D4->D5#1"]
    assert benchmark.excluded["empty_captions"] == 2
    assert len(benchmark.positives) == 2
    as_record = dress(fashioniq_root, "clip4cir")
    assert as_record.queries["text"][1] == " and "


def test_every_query_has_a_row_also_where_all_its_captions_are_empty(fashioniq_root: Path) -> None:
    edit(captions_of(fashioniq_root), changed(captions=["", " "]))
    benchmark = dress(fashioniq_root, "clip4cir", caption_join="each_caption")
    assert set(benchmark.queries["query_id"]) == set(range(len(benchmark.positives)))


def test_an_image_in_two_splits_of_a_category_is_named(fashioniq_root: Path) -> None:
    path = fashioniq_root / "image_splits/split.dress.test.json"
    path.write_text(json.dumps(["D8", "D1"]))
    message = f"^{path}: 'D1' is also an image of {path.parent / 'split.dress.train.json'}$"
    with pytest.raises(UserError, match=message):
        FashionIQ(fashioniq_root).check(PROTOCOL, ("val",))
    FashionIQ(fashioniq_root, categories=["shirt", "toptee"]).check(PROTOCOL, ("val",))
