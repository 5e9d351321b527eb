import json
import shutil

import pytest

from cliplab.benchmark import CIRR_PROTOCOLS, make_protocol
from cliplab.data.cirr import CIRR
from cliplab.errors import UserError
from cliplab.evaluation.evaluator import Evaluator
from tests.data.cir_files import make_cirr


def protocol(name: str = "clip4cir", **changes):
    return make_protocol({"name": name, **changes}, CIRR_PROTOCOLS)


@pytest.fixture
def root(tmp_path):
    return make_cirr(tmp_path)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_counts(root):
    counts = CIRR(root).counts()
    assert counts["train"] == {
        "images": 8,
        "records": 4,
        "references": 4,
        "empty_captions": 0,
        "records_with_one_soft_target": 0,
    }
    assert counts["test"] == {"images": 8, "records": 4, "references": 4, "empty_captions": 0}


def test_annotations_may_lie_in_the_root_itself(root, tmp_path):
    dataset = CIRR(root / "cirr", images=root)
    dataset.check(protocol(), ("train", "val", "test"))
    assert dataset.counts() == CIRR(root).counts()


def test_the_benchmark_as_worked_by_hand(root):
    (benchmark,) = CIRR(root).benchmarks(protocol(), "val")
    names = benchmark.gallery["id"]
    assert names == [f"dev-{n}-0-img{n % 2}" for n in range(8)]
    assert all(path.endswith(f"dev/{name}.png") for path, name in zip(benchmark.gallery["image"], names, strict=True))
    assert benchmark.positives == [[1], [2], [3], [4]] and benchmark.references() == [0, 1, 2, 3]
    assert benchmark.queries["text"] == [f" Change {10 + n}. " for n in range(4)]  # as it is
    assert benchmark.query_names == ["10", "11", "12", "13"]
    assert benchmark.subsets[2] == [3, 4, 5, 6, 7]  # six members without the reference
    assert benchmark.protocol.exclude_reference and benchmark.gains is None


def test_soft_targets_without_the_reference(root):
    (benchmark,) = CIRR(root).benchmarks(protocol("cirplant"), "val")
    assert benchmark.gains[0] == {1: 1.0, 2: 0.5}


@pytest.mark.parametrize(
    ("name", "text"),
    [("searle", "a photo of $ that  Change 10. "), ("pic2word", "a photo of * ,  Change 10. "), ("covr", "change 10")],
)
def test_query_texts(root, name, text):
    (benchmark,) = CIRR(root).benchmarks(protocol(name), "val")
    assert benchmark.queries["text"][0] == text
    assert benchmark.protocol.exclude_reference == (name != "pic2word")


def test_test1_has_no_targets(root):
    (benchmark,) = CIRR(root).benchmarks(protocol(), "test")
    assert benchmark.positives == [[]] * 4 and len(benchmark.subsets[0]) == 5


def test_training_samples(root):
    table = CIRR(root).train_table(protocol())
    assert len(table) == 4 and table["texts"][1] == [" Change 1. "]
    assert table["reference"][1].endswith("train/34/train-1-0-img1.png")
    assert table["target_id"] == [1, 2, 3, 4] and table["reference_id"] == [0, 1, 2, 3]


def test_missing_pictures_are_named_or_reported(root):
    (root / "dev" / "dev-1-0-img1.png").unlink()
    with pytest.raises(UserError, match="dev-1-0-img1"):
        CIRR(root).check(protocol(), ("val",))
    dataset = CIRR(root)
    (benchmark,) = dataset.benchmarks(protocol(missing_images="report"), "val")
    assert benchmark.query_names == ["12", "13"] and benchmark.excluded == {"gallery_rows": 1, "queries": 2}
    assert dataset.missing == ["dev-1-0-img1"]


@pytest.mark.parametrize("soft", [{}, {"dev-1-0-img1": 1.0}])
def test_grades_of_nothing_but_the_reference(root, soft):
    edit(root / "cirr/captions/cap.rc2.val.json", lambda c: c[1].update(target_soft=soft))
    CIRR(root).check(protocol(), ("val",))
    for read in (CIRR(root).check, lambda asked, splits: CIRR(root).benchmarks(asked, *splits)):
        with pytest.raises(UserError, match=r"cap\.rc2\.val\.json: record 1 \(pairid 11\) grades no image besides"):
            read(protocol("artemis"), ("val",))


def test_a_query_whose_graded_pictures_are_missing_is_left_out_and_counted(root):
    edit(root / "cirr/captions/cap.rc2.val.json", lambda c: c[1].update(target_soft={"dev-7-0-img1": 1.0}))
    (root / "dev/dev-7-0-img1.png").unlink()
    (benchmark,) = CIRR(root).benchmarks(protocol("artemis", missing_images="report"), "val")
    assert benchmark.query_names == ["10", "12", "13"] and benchmark.excluded == {"gallery_rows": 1, "queries": 1}
    Evaluator(benchmark)
    (hard,) = CIRR(root).benchmarks(protocol(missing_images="report"), "val")
    assert hard.query_names == ["10", "11", "12", "13"]


@pytest.mark.parametrize(("missing", "left"), [((1, 2, 3, 4, 5), 0), ((4, 5, 6), 2)])
def test_too_few_look_alikes_for_a_submission_are_named_before_anything_is_embedded(root, missing, left):
    for number in missing:
        (root / f"test1/test1-{number}-0-img{number % 2}.png").unlink()
    dataset = CIRR(root)
    (benchmark,) = dataset.benchmarks(protocol(missing_images="report"), "test")
    assert len(benchmark.subsets[0]) == 5 - len({*missing} & {1, 2, 3, 4, 5})
    message = rf"the subset of query '2\d'.* are {left} images, a submission names 3 of them: add the missing pictures"
    with pytest.raises(UserError, match=message):
        Evaluator(benchmark)


BAD = [
    ("captions/cap.rc2.val.json", lambda c: c[1].pop("caption"), "record 1 has no 'caption'"),
    ("captions/cap.rc2.val.json", lambda c: c[1].update(caption=3), "record 1: image names and the caption"),
    ("captions/cap.rc2.val.json", lambda c: c[1].update(target_hard="nobody"), "record 1 names 'nobody'"),
    ("captions/cap.rc2.val.json", lambda c: c[1].update(pairid=10), "records 0 and 1 share the pairid 10"),
    ("captions/cap.rc2.val.json", lambda c: c[1]["img_set"]["members"].pop(), "record 1: img_set.members must be 6"),
    ("captions/cap.rc2.val.json", lambda c: c[1].update(target_soft=[1]), "record 1: target_soft"),
    (
        "captions/cap.rc2.val.json",
        lambda c: c[1]["target_soft"].update({"dev-2-0-img0": float("inf")}),
        "record 1: target_soft must map image names to finite grades",
    ),
    ("captions/cap.rc2.val.json", lambda c: c[1].update(pairid=True), "record 1: pairid must be a number"),
    ("captions/cap.rc2.val.json", lambda c: c[1].update(reference="dev-0-0-img0"), "the reference one of"),
    (
        "image_splits/split.rc2.val.json",
        lambda c: c.update({"train-1-0-img1": "./dev/train-1-0-img1.png"}),
        "'train-1-0-img1' is also an image of the split 'train'",
    ),
    ("image_splits/split.rc2.val.json", lambda c: c.update({"dev-0-0-img0": "../x/dev-0-0-img0.png"}), "dev-0-0-img0"),
    ("image_splits/split.rc2.val.json", lambda c: c.update({"dev-0-0-img0": 4}), "must map image names to paths"),
]


@pytest.mark.parametrize(("file", "change", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_annotations_are_named(root, file, change, message):
    edit(root / "cirr" / file, change)
    with pytest.raises(UserError, match=message):
        CIRR(root).check(protocol(), ("val",))


def test_bad_json_and_absent_files_are_named(root):
    (root / "cirr/captions/cap.rc2.val.json").write_text("[{")
    with pytest.raises(UserError, match=r"cap\.rc2\.val\.json is not valid JSON"):
        CIRR(root).check(protocol(), ("val",))
    shutil.rmtree(root / "cirr/captions")
    with pytest.raises(UserError, match=r"CIRR is not complete.*cap\.rc2\.train\.json"):
        CIRR(root).check(protocol(), ("train",))
    with pytest.raises(UserError, match="CIRR has train, val, test"):
        CIRR(root).records("test1")
