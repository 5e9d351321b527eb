"""Every shipped row is well formed, and a row is offered for comparison only where its known conditions are ours."""

import dataclasses
import re
import subprocess
import sys

import pytest

from cliplab.benchmark import PROTOCOLS
from cliplab.published import FIELDS, PublishedRow, differing_fields, load_published, matching_rows

COUNTS = {"fashioniq": 99, "cirr": 89, "circo": 57, "coco": 79, "flickr30k": 72, "css": 36}
SPLITS = {
    "fashioniq": "val",
    "cirr": "test1",
    "circo": "test",
    "coco": "test",
    "flickr30k": "test",
    "css": "test",
}
METRICS = {
    "fashioniq": r"(dress|shirt|toptee)/R@(10|50)",
    "cirr": r"cirr/(R@(1|5|10|50)|Rsubset@(1|2|3))",
    "circo": r"circo/mAP@(5|10|25|50)",
    "coco": r"(i2t|t2i)/R@(1|5|10)|imagenet_top1",
    "flickr30k": r"(i2t|t2i)/R@(1|5|10)|imagenet_top1",
    "css": r"css/R@1",
}
LABELS = {
    "fashioniq": {
        "original_split": 72,
        "val_split": 11,
        "unverified_gallery": 12,
        "original_split_both_orders": 2,
        "original_split_reference_removed": 2,
    },
    "cirr": {"test_server": 85, "test_reference_unknown": 4},
    "circo": {"test_server": 54, "test_server_shared_concept": 3},
    "coco": {"clip_benchmark": 65, "dual_encoder_unspecified": 8, "itm_reranked": 4, "clip_paper": 1, "lavis": 1},
    "flickr30k": {"clip_benchmark": 65, "itm_reranked": 3, "dual_encoder_unspecified": 2, "clip_paper": 1, "lavis": 1},
    "css": {"3d_to_3d": 21, "2d_to_3d": 15},
}
CAPTION_JOINS = {
    "and_cap",
    "both_orders_mean",
    "star_reversed",
    "and_precaption",
    "comma_and",
    "both_orders_separate",
    "each_caption",
    "category_it",
}
ALLOWED = {
    "gallery": {None, "original_split", "val_split", "all"},
    "exclude_reference": {None, True, False},
    "caption_join": {None} | CAPTION_JOINS,
    "query_unit": {None, "record", "order", "caption"},
    "prompt": {None, "{}", "a photo of $ that {}"},
    "captions_per_image": {None, "all"},
    "ties": {None, "pessimistic", "optimistic", "mean"},
    "missing_images": {None},
}
CLIP4CIR = {
    "gallery": "original_split",
    "exclude_reference": False,
    "caption_join": "and_cap",
    "query_unit": "record",
    "prompt": "{}",
    "ties": "pessimistic",
    "missing_images": "error",
}
CIRR_SERVER = CLIP4CIR | {"exclude_reference": True, "caption_join": None, "prompt": None}
CAPTIONS = PROTOCOLS["clip_benchmark"].as_dict()
ROWS = [(benchmark, row) for benchmark in COUNTS for row in load_published(benchmark)]


def find(benchmark: str, method: str, backbone: str | None = None) -> PublishedRow:
    """Return the only row of a method (with a backbone, where one is given)."""
    (row,) = (r for r in load_published(benchmark) if r.method == method and backbone in (None, r.backbone))
    return row


def matches(benchmark: str, protocol: dict[str, object]) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return the unknown fields of each matching row, by method and label."""
    return {(r.method, str(r.protocol["label"])): unknown for r, unknown in matching_rows(benchmark, protocol)}


@pytest.mark.parametrize("benchmark", COUNTS)
def test_number_of_rows(benchmark: str) -> None:
    rows = load_published(benchmark)
    assert len(rows) == COUNTS[benchmark]
    labels = [row.protocol["label"] for row in rows]
    assert {label: labels.count(label) for label in labels} == LABELS[benchmark]


def test_types_and_allowed_values() -> None:
    for benchmark, row in ROWS:
        assert (row.benchmark, row.split) == (benchmark, SPLITS[benchmark]), row
        assert all(isinstance(text, str) and text for text in (row.method, row.backbone, row.source)), row
        assert row.confidence in {"document", "reprint", "recollection"}, row
        assert row.year is None or (isinstance(row.year, int) and 2015 <= row.year <= 2030), row
        assert row.note is None or (isinstance(row.note, str) and row.note), row


def test_protocols_hold_exactly_the_compared_fields_and_a_label() -> None:
    for benchmark, row in ROWS:
        assert set(row.protocol) == {*FIELDS, "label"}, row
        assert all(row.protocol[name] in ALLOWED[name] for name in FIELDS), row
        # True == 1 in Python: a YAML that says 1 would pass the line above.
        assert type(row.protocol["exclude_reference"]) in (bool, type(None)), row
        captions = benchmark in ("coco", "flickr30k")
        assert row.protocol["caption_join"] is None or benchmark == "fashioniq" or captions, row
        assert (row.protocol["captions_per_image"] is None) != (row.protocol["label"] == "clip_benchmark"), row


def test_metrics_are_named_percentages() -> None:
    for benchmark, row in ROWS:
        assert row.metrics or row.printed_average, row
        for name, value in row.metrics.items():
            assert re.fullmatch(METRICS[benchmark], name), (name, row)
            assert isinstance(value, float) and 0 <= value <= 100, (name, row)
        for value in (row.printed_average or {}).values():
            assert isinstance(value, float) and 0 <= value <= 100, row


def test_recall_never_falls_with_k() -> None:
    for _, row in ROWS:
        series: dict[str, list[tuple[int, float]]] = {}
        for name, value in row.metrics.items():
            prefix, _, k = name.partition("@")
            if k:
                series.setdefault(prefix, []).append((int(k), value))
        for points in series.values():
            # mAP@k is no recall, but every published row of it grows with k too.
            values = [value for _, value in sorted(points)]
            assert values == sorted(values), row


def test_known_cells() -> None:
    sprc = find("fashioniq", "SPRC")
    assert sprc.metrics["dress/R@10"] == 49.18
    assert sprc.printed_average == {"R@10": 54.92, "R@50": 74.97, "mean": 64.85}
    assert find("cirr", "random inside the subset").metrics == {f"cirr/Rsubset@{k}": 20.0 * k for k in (1, 2, 3)}
    openai = find("coco", "open_clip zero-shot", "RN50 openai")
    assert (openai.metrics["i2t/R@1"], openai.metrics["imagenet_top1"], openai.year) == (48.84, 59.82, None)


def test_fields_of_methods_whose_code_was_read() -> None:
    def known(benchmark: str, method: str, backbone: str | None = None) -> tuple[object, ...]:
        return tuple(find(benchmark, method, backbone).protocol[name] for name in FIELDS[:4])

    assert known("fashioniq", "VAL (GloVe)") == ("val_split", True, "each_caption", "caption")
    assert known("fashioniq", "ARTEMIS (LSTM)") == ("original_split", True, "both_orders_separate", "order")
    assert known("fashioniq", "ComposeAE") == ("all", False, "category_it", "record")
    assert known("fashioniq", "Pic2Word", "CLIP ViT-L/14") == ("original_split", False, "star_reversed", "record")
    assert known("fashioniq", "SEARLE-XL-OTI") == ("original_split", False, "both_orders_mean", "record")
    assert known("fashioniq", "BGE-VL-base") == ("original_split", False, "comma_and", "record")
    assert known("fashioniq", "MAAF") == ("original_split", None, None, None)
    assert known("fashioniq", "CASE") == (None, None, None, None)
    assert known("circo", "SEARLE-XL")[1] is False
    assert known("circo", "Paracosm", "CLIP ViT-L/14")[1] is None


def test_matching_names_what_stays_unknown() -> None:
    found = matches("fashioniq", CLIP4CIR)
    assert found["CLIP4Cir v3 (TOMM 2023)", "original_split"] == ("ties", "missing_images")
    assert found["TIRG", "original_split"] == tuple(name for name in FIELDS[1:] if name != "captions_per_image")


def test_other_conditions_do_not_match() -> None:
    found = matches("fashioniq", CLIP4CIR)
    assert {label for _, label in found} == {"original_split"}
    others = {"CoVR (BLIP)", "CoVR-2", "SEARLE", "LinCIR", "ComposeAE", "BGE-VL-base"}
    assert not others & {method for method, _ in found}
    val = CLIP4CIR | {"gallery": "val_split"}
    assert ("DQU-CIR", "val_split") in matches("fashioniq", val)
    assert ("DQU-CIR", "original_split") not in matches("fashioniq", val)
    assert ("VAL (GloVe)", "val_split") not in matches("fashioniq", val)


def test_a_row_without_a_known_field_never_matches() -> None:
    assert differing_fields(find("cirr", "VLM2Vec"), CIRR_SERVER) == ()
    assert {label for _, label in matches("cirr", CIRR_SERVER)} == {"test_server"}
    assert {label for _, label in matches("coco", CAPTIONS)} == {"clip_benchmark"}
    assert matches("coco", CLIP4CIR) == {}


def test_a_field_that_does_not_apply_to_us_is_not_unknown() -> None:
    assert matches("cirr", CIRR_SERVER)["SPRC", "test_server"] == ("ties", "missing_images")


def test_differing_fields_are_named() -> None:
    assert differing_fields(find("fashioniq", "CoVR (BLIP)"), CLIP4CIR) == ("exclude_reference", "caption_join")
    assert differing_fields(find("fashioniq", "CoSMo"), CLIP4CIR) == ("gallery",)
    assert differing_fields(find("fashioniq", "SPRC"), CLIP4CIR) == ()


def test_benchmark_without_a_file_has_no_rows() -> None:
    assert load_published("wardrobe") == []
    assert matching_rows("wardrobe", CLIP4CIR) == []


def test_callers_cannot_change_what_the_next_one_reads() -> None:
    load_published("css").clear()
    assert len(load_published("css")) == COUNTS["css"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        find("fashioniq", "SPRC").method = "ours"  # type: ignore[misc]


def test_import_reads_no_yaml() -> None:
    code = "import sys, cliplab.published; sys.exit('yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
