import json
import random
import subprocess
import sys

import pytest

from cliplab.errors import UserError
from cliplab.evaluation import submissions
from cliplab.evaluation.submissions import CIRR_KINDS, average_precision, check_circo, check_cirr, main, score_circo
from tests.data.cir_files import cirr_record, write_json

IMAGES = [f"test1-{n}-0-img{n % 2}" for n in range(60)]


@pytest.fixture
def cirr_files(tmp_path, monkeypatch):
    """Two files for sixty queries, and the annotations that belong to them."""
    monkeypatch.setattr(submissions, "CIRR_QUERIES", 60)
    rows = [cirr_record(n, (IMAGES + IMAGES)[n : n + 6], "test1") for n in range(60)]
    recall = {str(n): [name for name in IMAGES if name != IMAGES[n]][:50] for n in range(60)}
    subset = {str(n): (IMAGES + IMAGES)[n + 1 : n + 4] for n in range(60)}
    files = submissions.write_cirr(tmp_path, recall, subset)
    return files, write_json(tmp_path / "cap.rc2.test1.json", rows)


def test_cirr_files_are_accepted(cirr_files):
    (recall, subset), annotations = cirr_files
    content = json.loads(subset.read_text())
    assert len(content) == 62 and content["version"] == "rc2"
    for known in (None, annotations):
        assert check_cirr(recall, known) == "recall" and check_cirr(subset, known) == "recall_subset"


CIRR_BAD = [
    (0, lambda c: c.pop("1"), "a pairid is missing"),
    (0, lambda c: c["1"].__setitem__(3, c["1"][4]), "pairid 1 predicts .* more than once"),
    (0, lambda c: c["1"].__setitem__(3, "dev/test1-1.png"), "'dev/test1-1.png' is no image name"),
    (0, lambda c: c["1"].pop(), "pairid 1 has 49 predictions, 50"),
    (0, lambda c: c["1"].__setitem__(0, 5), "pairid 1 must be a list of image names"),
    (0, lambda c: c.update(metric="map"), "'metric' must be recall or recall_subset, found 'map'"),
    (0, lambda c: c.pop("version"), "'version' must be rc2"),
    (1, lambda c: c["2"].append(IMAGES[9]), "pairid 2 has 4 predictions, 3"),
]
CIRR_BAD_BY_ANNOTATIONS = [
    (0, lambda c: c.update({"7": c.pop("1")}), "lacks the pairid 1"),
    (0, lambda c: c["1"].__setitem__(0, IMAGES[1]), "pairid 1: the reference"),
    (0, lambda c: c["1"].__setitem__(0, "test1-999-0-img0"), "'test1-999-0-img0' is no image of test1"),
    (1, lambda c: c["1"].__setitem__(0, IMAGES[30]), "'test1-30-0-img0' is no member"),
]


@pytest.mark.parametrize(("file", "change", "message"), CIRR_BAD + CIRR_BAD_BY_ANNOTATIONS)
def test_what_the_cirr_server_refuses_is_named(cirr_files, file, change, message):
    path, annotations = cirr_files[0][file], cirr_files[1]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    known = annotations if (file, change, message) in CIRR_BAD_BY_ANNOTATIONS else None
    with pytest.raises(UserError, match=f"{path.name}.*{message}"):
        check_cirr(path, known)


def test_annotations_with_a_pairid_twice(cirr_files):
    (recall, _), annotations = cirr_files
    rows = json.loads(annotations.read_text())
    annotations.write_text(json.dumps([*rows, rows[0]]))
    with pytest.raises(UserError, match=r"cap\.rc2\.test1\.json: records 0 and 60 share the pairid 0"):
        check_cirr(recall, annotations)


def test_a_key_that_is_there_twice(cirr_files):
    path = cirr_files[0][0]
    path.write_text(path.read_text().replace('"2":', '"1":'))
    with pytest.raises(UserError, match="the key '1' is there more than once"):
        check_cirr(path)


def test_too_large_a_file(cirr_files, monkeypatch):
    monkeypatch.setattr(submissions, "CIRR_BYTES", 100)
    with pytest.raises(UserError, match="bytes, more than 100"):
        check_cirr(cirr_files[0][0])


@pytest.fixture
def circo_file(tmp_path):
    rankings = {str(n): random.Random(n).sample(range(200), 50) for n in range(220)}
    return submissions.write_circo(tmp_path, rankings)[0]


CIRCO_BAD = [
    (lambda c: c.pop("17"), "lacks the query 17"),
    (lambda c: c.update({"900": c.pop("17")}), "lacks the query 17"),
    (lambda c: c["17"].__setitem__(0, c["17"][1]), "query 17 predicts .* more than once"),
    (lambda c: c["17"].pop(), "query 17 has 49 predictions, 50"),
    (lambda c: c["17"].__setitem__(0, "42"), "query 17 must be a list of image ids"),
    (lambda c: c["17"].__setitem__(0, True), "query 17 must be a list of image ids"),
    (lambda c: c["17"].__setitem__(0, -3), "query 17: .* is no image of the gallery"),
]


def test_circo_file_is_accepted(circo_file, tmp_path):
    assert check_circo(circo_file) == "val"
    gallery = write_json(tmp_path / "info.json", {"images": [{"id": n} for n in range(150)]})
    with pytest.raises(UserError, match="is no image of the gallery"):
        check_circo(circo_file, gallery)


@pytest.mark.parametrize("images", [[], [{"id": "7"}], [{"id": [7]}], "7"])
def test_a_malformed_gallery_is_not_the_submissions_fault(circo_file, tmp_path, images):
    gallery = write_json(tmp_path / "info.json", {"images": images})
    with pytest.raises(UserError, match=f"^{gallery} must hold a list 'images' of objects with a number 'id'"):
        check_circo(circo_file, gallery)


@pytest.mark.parametrize(("change", "message"), CIRCO_BAD)
def test_what_the_circo_server_refuses_is_named(circo_file, change, message):
    content = json.loads(circo_file.read_text())
    change(content)
    circo_file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        check_circo(circo_file)


def test_average_precision_by_hand():
    assert average_precision([7, 1, 2, 9], [1, 9], 5) == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert average_precision([1, 2, 3], [1, 2, 3, 4], 2) == pytest.approx(1.0)  # divided by min(|GT|, K)
    assert average_precision([5], [1], 5) == 0.0


def circo_query(number, relevant, *aspects):
    """A query of the validation file."""
    texts = {"relative_caption": "is red", "shared_concept": "a dog"}
    ids = {"id": number, "reference_img_id": 999, "target_img_id": relevant[0], "gt_img_ids": relevant}
    return texts | ids | {"semantic_aspects": list(aspects)}


def test_scores_by_hand(tmp_path):
    val = [circo_query(0, [1, 2], "negation"), circo_query(1, [9], "negation", "addition")]
    ranking = {"0": [3, 2, 4, 5, 6, 1, *range(100, 144)], "1": [9, 8, *range(100, 148)]}
    scores = score_circo(write_json(tmp_path / "r.json", ranking), write_json(tmp_path / "val.json", val))
    assert scores["mAP@5"] == pytest.approx(100 * ((1 / 2) / 2 + 1) / 2)
    assert scores["mAP@10"] == pytest.approx(100 * ((1 / 2 + 2 / 6) / 2 + 1) / 2)
    assert scores["R@5"] == 50.0 and scores["R@10"] == 100.0
    assert scores["mAP@10/addition"] == 100.0


ANNOTATIONS_BAD = [
    (lambda c: c[1].update(gt_img_ids=[]), "query 1: gt_img_ids must be different ids"),
    (lambda c: c[1].update(gt_img_ids=["9"], target_img_id="9"), "query 1: 'target_img_id' must be int, found '9'"),
    (lambda c: c[1].update(gt_img_ids=["9"]), "query 1: gt_img_ids must be image ids"),
    (lambda c: c[1].update(gt_img_ids={"9": 1}), "query 1: 'gt_img_ids' must be list"),
    (lambda c: c[1].update(gt_img_ids=[9, 9]), "query 1: gt_img_ids must be different ids"),
    (lambda c: c[1].update(target_img_id="9"), "query 1: 'target_img_id' must be int, found '9'"),
    (lambda c: c[1].pop("target_img_id"), "query 1 has no 'target_img_id'"),
    (lambda c: c[1].update(semantic_aspects="negation"), "query 1: 'semantic_aspects' must be list"),
    (lambda c: c[1].update(semantic_aspects=[[1]]), "query 1: .*semantic_aspects names"),
    (lambda c: c.append(c[1]), "query 2 has the id 1"),
    (lambda c: c.clear(), " holds no queries"),
]


@pytest.mark.parametrize(("change", "message"), ANNOTATIONS_BAD)
def test_malformed_annotations_score_nothing(tmp_path, change, message):
    val = [circo_query(0, [1, 2], "negation"), circo_query(1, [9], "addition")]
    ranking = write_json(tmp_path / "r.json", {str(n): list(range(50)) for n in range(2)})
    score_circo(ranking, write_json(tmp_path / "val.json", val))
    change(val)
    with pytest.raises(UserError, match=rf"^{tmp_path / 'val.json'}.*{message}"):
        score_circo(ranking, write_json(tmp_path / "val.json", val))


def test_only_what_the_server_would_take_is_scored(tmp_path):
    val = write_json(tmp_path / "val.json", [circo_query(0, [1])])
    for ranking, message in (
        (list(range(49)), "r.json: query 0 has 49 predictions, 50 are expected"),
        ([], "query 0 has 0 predictions"),
        ([*range(49), -7], "query 0: -7 is no image of the gallery"),
        ([*range(49), 48], "query 0 predicts 48 more than once"),
    ):
        with pytest.raises(UserError, match=message):
            score_circo(write_json(tmp_path / "r.json", {"0": ranking}), val)


def test_the_commands(tmp_path, circo_file):
    annotations = write_json(tmp_path / "val.json", [circo_query(n, [1]) for n in range(220)])
    command = [sys.executable, "-m", "cliplab.evaluation.submissions"]
    given = ["score", "--benchmark", "circo", "--annotations", str(annotations), str(circo_file)]
    scored = subprocess.run([*command, *given], capture_output=True, text=True, check=True)
    assert {"mAP@5", "mAP@50", "R@5", "R@50"} <= json.loads(scored.stdout).keys()
    short = {key: ids[:10] for key, ids in json.loads(circo_file.read_text()).items()}
    circo_file.write_text(json.dumps(short))
    refused = subprocess.run([*command, *given], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "") and "has 10 predictions, 50 are expected" in refused.stderr
    circo_file.write_text("{}")
    checked = subprocess.run(
        [*command, "check", "--benchmark", "circo", str(circo_file)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 2 and checked.stderr.startswith("error: ") and "Traceback" not in checked.stderr


def test_the_ok_says_what_was_not_compared(cirr_files, circo_file, capsys):
    (recall, subset), annotations = cirr_files
    given = ["check", "--benchmark", "cirr", str(recall), str(subset)]
    main(given)
    for line, path, kind in zip(capsys.readouterr().out.splitlines(), cirr_files[0], CIRR_KINDS, strict=True):
        assert line.startswith(f"{path}: ok, {kind} (pairids and names were not compared; --annotations cap.rc2.test1")
    main([*given, "--annotations", str(annotations)])
    assert capsys.readouterr().out == f"{recall}: ok, recall\n{subset}: ok, recall_subset\n"
    main(["check", "--benchmark", "circo", str(circo_file)])
    assert "ok, val (ids were not compared; --annotations image_info_unlabeled2017" in capsys.readouterr().out


def test_two_files_of_one_kind(cirr_files, tmp_path, capsys):
    recall = cirr_files[0][0]
    other = tmp_path / "other.json"
    other.write_text(recall.read_text())
    for second in (other, recall):
        with pytest.raises(UserError, match=f"^{recall} and {second} are both the file of the metric recall"):
            main(["check", "--benchmark", "cirr", str(recall), str(second)])
    assert capsys.readouterr().out == ""
