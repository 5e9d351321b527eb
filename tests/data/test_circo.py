import json

import pytest

from cliplab.benchmark import CIRCO_PROTOCOLS, make_protocol
from cliplab.data.circo import CIRCO
from cliplab.errors import UserError
from tests.data.cir_files import make_circo


def protocol(name: str = "searle", **changes):
    return make_protocol({"name": name, **changes}, CIRCO_PROTOCOLS)


@pytest.fixture
def root(tmp_path):
    return make_circo(tmp_path)


def test_counts(root):
    assert CIRCO(root).counts() == {
        "val": {"records": 3, "empty_captions": 0, "ground_truths": 9, "aspects": {"addition": 3, "negation": 1}},
        "test": {"records": 2, "empty_captions": 0},
        "gallery": 9,
    }


def test_the_benchmark_as_worked_by_hand(root):
    (benchmark,) = CIRCO(root).benchmarks(protocol(), "val")
    assert benchmark.gallery["id"] == [str(5 * n + 2) for n in range(9)]
    assert benchmark.gallery["image"][1].endswith("000000000007.jpg")
    assert benchmark.positives == [[1], [2], [3]]
    assert benchmark.relevant == [[1, 2], [2, 3, 4], [3, 4, 5, 6]]
    assert benchmark.groups == {"addition": [0, 1, 2], "negation": [1]}
    assert benchmark.references() == [0, 1, 2] and not benchmark.protocol.exclude_reference
    assert benchmark.queries["text"][1] == "a photo of $ that shows 1 more"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bge_vl", "Find a picture that also a dog, but shows 1 more."),
        ("covr", "shows 1 more"),
        ("plain", "shows 1 more"),
    ],
)
def test_query_texts(root, name, text):
    (benchmark,) = CIRCO(root).benchmarks(protocol(name), "val")
    assert benchmark.queries["text"][1] == text
    assert benchmark.protocol.exclude_reference == (name == "covr")


def test_test_has_no_targets_and_nothing_trains(root):
    (benchmark,) = CIRCO(root).benchmarks(protocol(), "test")
    assert benchmark.positives == [[], []] and benchmark.relevant is None and benchmark.groups is None
    with pytest.raises(UserError, match="no training split"):
        CIRCO(root).train_table(protocol())
    with pytest.raises(UserError, match="CIRCO has no split 'train'"):
        CIRCO(root).check(protocol(), ("train",))


BAD = [
    (lambda c: c[1].pop("shared_concept"), "query 1 has no 'shared_concept'"),
    (lambda c: c[1].update(relative_caption=4), "query 1: 'relative_caption' must be str"),
    (lambda c: c[1].update(id=5), "query 1 has the id 5"),
    (lambda c: c[1].update(gt_img_ids=[]), "query 1: gt_img_ids must be different ids and begin with"),
    (lambda c: c[1].update(gt_img_ids=[12, 12]), "query 1: gt_img_ids"),
    (lambda c: c[1].update(gt_img_ids=[12, {"a": 1}]), "query 1: gt_img_ids must be image ids"),
    (lambda c: c[1].update(gt_img_ids=[12, True]), "query 1: gt_img_ids must be image ids"),
    (
        lambda c: c[1].update(semantic_aspects=[["a"]]),
        "query 1: gt_img_ids must be image ids and semantic_aspects names",
    ),
    (lambda c: c[1].update(semantic_aspects=["a", "a"]), "query 1: semantic_aspects names one twice"),
    (lambda c: c[1].update(id=True), "query 1: 'id' must be int, found True"),
    (lambda c: c[1].update(reference_img_id=1), "query 1 names the image 1"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_annotations_are_named(root, change, message):
    path = root / "annotations/val.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        CIRCO(root).check(protocol(), ("val",))


def test_missing_pictures_and_files_are_named(root):
    (root / "COCO2017_unlabeled/unlabeled2017/000000000007.jpg").unlink()
    with pytest.raises(UserError, match="1 image.s. not found.*: 7"):
        CIRCO(root).check(protocol(), ("val",))
    (benchmark,) = CIRCO(root).benchmarks(protocol(missing_images="report"), "val")
    assert benchmark.query_names == ["2"] and benchmark.excluded == {"gallery_rows": 1, "queries": 2}
    (root / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json").unlink()
    with pytest.raises(UserError, match="CIRCO is not complete"):
        CIRCO(root).check(protocol(), ("val",))
