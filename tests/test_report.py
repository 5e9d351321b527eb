import copy
import io
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from cliplab.benchmark import make_protocol
from cliplab.evaluation.audit import SHARES
from cliplab.published import PublishedRow, load_published
from cliplab.report import (
    STAND_IN_NOTICE,
    audit_table,
    console,
    parts_table,
    published_metrics,
    results_table,
    title_of,
)
from cliplab.training.optim import ParameterGroup

CATEGORIES = ("dress", "shirt", "toptee")
# All that is known of the first is the gallery; the second is known to keep the reference and join with and_cap.
TIRG = (
    "TIRG [ResNet-18]\n  (published, 2019, reprint; unknown: exclude_reference, caption_join, query_unit, prompt, ties"
)
TIRG_CELLS = {"dress/R@10": 14.87, "dress/R@50": 34.66, "shirt/R@10": 18.26, "shirt/R@50": 37.89}


def results(
    name: str = "fashioniq", protocol: str = "clip4cir", categories: tuple[str, ...] = CATEGORIES, **changes: Any
) -> dict[str, Any]:
    own = make_protocol({"name": protocol, **changes}).as_dict() | {"split": "val"}
    metrics = {f"test/{c}/R@{k}": 10.0 * n + k / 10 for n, c in enumerate(categories) for k in own["recall_at"]}
    metrics |= {f"test/{c}/MedR": 3.0 for c in categories}
    metrics |= {f"test/mean/R@{k}": 20.0 + k / 10 for k in own["recall_at"]} | {"test/mean/Avg": 23.0}
    return {
        "metrics": metrics,
        "baselines": {"image only": {"test/dress/R@10": 0.125}, "sum": dict(metrics)},
        "intervals": {"test/dress/R@10": [0.04, 2.26]},
        "protocol": own,
        "data": {
            "name": name,
            "stand_in_images": False,
            "empty_captions": {"train": 9, "val": 0},
            "benchmarks": {
                c: {"queries": 7, "gallery": 9, "excluded": {"queries": 0, "gallery_rows": 0}} for c in categories
            },
        },
    }


def cells(table: Table) -> dict[str, dict[str, str]]:
    """Row label -> column header -> cell."""
    columns = {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}
    labels = [label.replace("\\[", "[") for label in columns.pop("")]
    assert len(set(labels)) == len(labels)
    return {label: {header: column[row] for header, column in columns.items()} for row, label in enumerate(labels)}


def published(table: Table) -> list[str]:
    return [label for label in cells(table) if "published" in label]


def text_of(table: Table) -> str:
    """As a reader sees it, without the folding of lines."""
    shown = Console(file=io.StringIO(), width=2000)
    shown.print(table)
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def test_one_row_per_way_of_composing_and_one_column_per_cell() -> None:
    table = cells(results_table(results("wardrobe"), "combiner"))
    assert list(table) == ["combiner", "image only", "sum"]
    columns = [f"{c}\nR@{k}" for c in CATEGORIES for k in (10, 50)] + ["mean\nR@10", "mean\nR@50", "mean\nAvg"]
    assert list(table["combiner"]) == columns
    assert list(table["combiner"].values()) == [
        "1.00\n0.0-2.3",
        "5.00",
        "11.00",
        "15.00",
        "21.00",
        "25.00",
        "21.00",
        "25.00",
        "23.00",
    ]
    assert list(table["image only"].values()) == ["0.12"] + [""] * 8
    assert table["sum"]["dress\nR@10"] == "1.00"  # intervals are those of the run's own row


def test_a_mean_over_one_benchmark_is_not_shown() -> None:
    table = cells(results_table(results("wardrobe", categories=("dress",)), "sum "))
    assert list(table["sum "]) == ["dress\nR@10", "dress\nR@50"]


def test_title_and_caption_say_what_was_measured() -> None:
    content = results("wardrobe", "val", ties="mean")
    content["data"]["benchmarks"]["shirt"]["excluded"]["queries"] = 3
    content["data"]["empty_captions"] = {"train": 9, "val": 4}
    table = results_table(content, "combiner")
    assert table.title == "wardrobe, split val, protocol val (ties=mean) (recall in %)"
    caption = str(table.caption)
    assert "gallery val_split, reference excluded, captions each_caption (caption), ties mean" in caption
    assert "dress 7/9, shirt 7/9, toptee 7/9" in caption
    assert "left out: {'shirt': {'queries': 3, 'gallery_rows': 0}}" in caption
    assert "empty captions in this split: 4" in caption
    assert STAND_IN_NOTICE not in caption
    plain = str(results_table(results(), "combiner").caption)
    assert "left out" not in plain and "empty captions" not in plain
    assert "reference kept" in plain


def test_a_classification_shows_its_accuracies_and_how_it_was_measured() -> None:
    content = results("image_folder", "zero_shot_cifar", categories=("zero_shot",))
    del content["metrics"]["test/mean/Avg"]
    content["metrics"] |= {"test/zero_shot/mean_per_class": 12.5, "test/linear_probe/top1": 75.0}
    content["linear_probe"] = {"strength": 0.01, "validation_top1": 50.0}
    table = results_table(content, "ViT-B-32")
    columns = ["zero_shot\nR@1", "zero_shot\nR@5", "zero_shot\nmean_per_class", "linear_probe\ntop1"]
    assert list(cells(table)["ViT-B-32"]) == columns
    assert list(cells(table)["ViT-B-32"].values())[2:] == ["12.50", "75.00"]
    caption = str(table.caption)
    assert "R@k is top-k accuracy; prompts cifar_templates, ties pessimistic; queries/gallery: zero_shot 7/9" in caption
    assert "linear probe: strength 0.01 chosen with 50.00 on validation" in caption
    assert "reference" not in caption
    del content["linear_probe"]
    assert "linear probe" not in str(results_table(content, "ViT-B-32").caption)


# Published rows


def test_published_rows_stand_in_the_same_columns() -> None:
    table = cells(results_table(results(), "combiner"))
    label = next(label for label in table if label.startswith(TIRG))
    row = {header.replace("\n", "/"): cell for header, cell in table[label].items()}
    assert {key: float(row[key]) for key in TIRG_CELLS} == TIRG_CELLS
    # 14.87 + 18.26 + 19.08 = 52.21, 34.66 + 37.89 + 39.62 = 112.17
    assert (row["mean/R@10"], row["mean/R@50"], row["mean/Avg"]) == ("17.40", "37.39", "27.40")


def test_unknown_fields_are_named_and_known_ones_are_not() -> None:
    labels = published(results_table(results(), "combiner"))
    assert any(label.startswith(TIRG) for label in labels)
    clip4cir = [label for label in labels if label.startswith("CLIP4Cir")]
    assert clip4cir
    assert any("gallery" not in label and "unknown: " in label for label in clip4cir)
    assert all(label.endswith(")") for label in labels)


def test_published_rows_of_another_gallery_are_not_shown() -> None:
    original, narrow = (published(results_table(results(protocol=name), "x")) for name in ("clip4cir", "val"))
    assert any(label.startswith("VAL (GloVe)") for label in narrow)
    assert not any(label.startswith("VAL (GloVe)") for label in original)
    assert any(label.startswith(TIRG) for label in original)
    assert not any(label.startswith(TIRG) for label in narrow)


def test_published_rows_that_treat_the_reference_otherwise_are_not_shown() -> None:
    def artemis(**changes: object) -> list[str]:
        labels = published(results_table(results(protocol="artemis", **changes), "x"))
        return [label for label in labels if label.startswith("ARTEMIS (LSTM)")]

    assert len(artemis()) == 1
    assert artemis(exclude_reference=False) == []
    assert artemis(query_unit="record") == []


def test_published_rows_of_another_split_are_not_shown() -> None:
    content = results()
    content["protocol"]["split"] = "test"
    assert published(results_table(content, "x")) == []


def test_published_rows_of_another_benchmark_are_not_shown() -> None:
    assert published(results_table(results("wardrobe"), "x")) == []


def test_a_published_mean_is_over_the_categories_of_our_mean() -> None:
    table = cells(results_table(results(categories=("dress", "shirt")), "combiner"))
    row = next(row for label, row in table.items() if label.startswith(TIRG))
    assert row["mean\nR@10"] in ("", "16.57", "16.56")  # (14.87 + 18.26) / 2, not the mean of three categories


def test_nothing_published_beside_stand_ins_and_the_notice_is_there() -> None:
    content = copy.deepcopy(results())
    content["data"]["stand_in_images"] = True
    table = results_table(content, "combiner")
    assert list(cells(table)) == ["combiner", "image only", "sum"]
    assert "STAND-IN PICTURES" in str(table.title)
    assert STAND_IN_NOTICE in str(table.caption)


def test_brackets_of_a_published_row_are_text_and_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    row = PublishedRow("fashioniq", "val", "Mine [bold]", "vit-b", {"dress/R@10": 1.0}, {}, "a paper", "document")
    monkeypatch.setattr("cliplab.report.matching_rows", lambda benchmark, protocol: [(row, ())])
    text = text_of(results_table(results(), "combiner"))
    assert "Mine [bold] [vit-b]" in text and "(published, document)" in text


def test_brackets_of_our_own_name_are_text_too() -> None:
    """A model without a composer goes by its architecture, which may be a path."""
    assert "towers/[small].json" in text_of(results_table(results("wardrobe"), "towers/[small].json"))


def test_averages_of_published_rows_are_computed_from_their_cells() -> None:
    (cirr,) = (row for row in load_published("cirr") if row.method == "Slerp")
    found = published_metrics(cirr, ["test/cirr/R@5", "test/cirr/Avg"])
    assert found["test/cirr/Avg"] == (found["test/cirr/R@5"] + found["test/cirr/Rsubset@1"]) / 2
    (fashion,) = (row for row in load_published("fashioniq") if row.method == "sum")
    columns = [f"test/{name}/R@{k}" for name in (*CATEGORIES, "mean") for k in (10, 50)]
    means = {k: sum(fashion.metrics[f"{name}/R@{k}"] for name in CATEGORIES) / 3 for k in (10, 50)}
    found = published_metrics(fashion, columns)
    assert found["test/mean/R@10"] == pytest.approx(means[10])
    assert found["test/mean/Avg"] == pytest.approx((means[10] + means[50]) / 2)


# audit_table


def test_the_audit_has_a_row_per_benchmark_and_k() -> None:
    shares = dict(zip(SHARES, (10.0, 20.0, 25.0, 50.125, 5.0, 24.875), strict=True))
    other = {share: value / 2 for share, value in shares.items()}
    audit = {name: {"R@10": shares, "R@50": other} for name in ("dress", "shirt", "mean")}
    table = audit_table(audit, "audit")
    assert list(cells(table)) == [f"{name} {kind}" for name in audit for kind in ("R@10", "R@50")]
    assert list(cells(table)["dress R@10"]) == [share.replace("_", " ") for share in SHARES]
    assert list(cells(table)["dress R@10"].values()) == ["10.00", "20.00", "25.00", "50.12", "5.00", "24.88"]
    del audit["shirt"]
    assert list(cells(audit_table(audit, "audit"))) == ["dress R@10", "dress R@50"]


def test_titles_name_data_split_protocol_and_stand_ins() -> None:
    content = results("wardrobe", "val")
    assert title_of(content, "queries") == "wardrobe, split val, protocol val (queries in %)"
    content["data"]["stand_in_images"] = True
    assert title_of(content, "queries").endswith("(queries in %) | STAND-IN PICTURES")


# parts_table


def test_parts_table_counts() -> None:
    tower, head = nn.Linear(10, 20), nn.Linear(3, 1, bias=False)
    scale = nn.Parameter(torch.zeros(()))
    parts = {
        "image_encoder": list(tower.parameters()),
        "text_encoder": [nn.Parameter(torch.zeros(1000, 2))],
        "composer": list(head.parameters()),
        "temperature": [scale],
        "nothing": [],
    }
    groups = [
        ParameterGroup("image_encoder", 1e-5, 0.1, [tower.weight]),
        ParameterGroup("image_encoder", 1e-5, 0.0, [tower.bias]),
        ParameterGroup("composer", 1e-3, 0.1, [head.weight]),
        ParameterGroup("temperature", 1e-4, 0.0, [scale]),
    ]
    table = parts_table(parts, groups)
    rows = list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))
    assert [str(column.header) for column in table.columns] == ["part", "parameters", "trainable", "lr", "decayed"]
    assert rows == [
        ("image_encoder", "220", "220", "1e-05", "200"),
        ("text_encoder", "2,000", "0", "frozen", "0"),
        ("composer", "3", "3", "0.001", "3"),
        ("temperature", "1", "1", "0.0001", "0"),
    ]


def test_console_is_wide_enough_where_there_is_no_terminal() -> None:
    assert console().width >= 80
    assert console().is_terminal or console().width == 160
