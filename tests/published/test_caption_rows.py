"""Published caption retrieval stands beside ours where the conditions are the same, in both directions."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cliplab import execute
from cliplab.config import merge_config
from cliplab.data import COCO, Flickr30k
from cliplab.data.karpathy import Karpathy
from cliplab.evaluation.evaluator import rank_benchmark
from cliplab.evaluation.scoring import CosineScorer
from cliplab.published import load_published
from cliplab.report import results_table
from tests.data.conftest import picture, write_json
from tests.test_report import cells, published

RN50 = "open_clip zero-shot [RN50 openai]\n  (published, document; unknown: ties, missing_images)"


def make_karpathy(root: Path, name: str) -> Path:
    """Two images per split, five captions each (six for one of COCO's), as dataset_coco.json has them."""
    rows = []
    (root / "images").mkdir(parents=True)
    for number, split in enumerate(("train", "train", "val", "val", "test", "test")):
        captions = 6 if name == "coco" and number == 4 else 5
        sentences = [{"raw": f"caption {number} {n}"} for n in range(captions)]
        rows.append({"filename": f"{number}.png", "split": split, "sentences": sentences, "imgid": number})
        picture(number).save(root / "images" / f"{number}.png")
    write_json(root / f"dataset_{name}.json", {"images": rows, "dataset": name})
    return root


def table(dataset_class: type[Karpathy], root: Path, split: str | None = None, **changes: Any) -> Any:
    """What eval.py prints for embeddings of noise."""
    dataset = dataset_class(make_karpathy(root, dataset_class.benchmark_name))
    dataset.asked_split = split
    protocol = dataset_class.make_protocol(changes)
    (benchmark,) = dataset.benchmarks(protocol, dataset.test_split)
    torch.manual_seed(0)
    queries, gallery = (F.normalize(torch.randn(len(t), 8), dim=1) for t in (benchmark.queries, benchmark.gallery))
    module: Any = SimpleNamespace(outcome={"": rank_benchmark(benchmark, queries, gallery, CosineScorer())}, probe=None)
    config = merge_config([("test", {"data": {"name": dataset_class.benchmark_name, "root": str(root)}})])
    return results_table(execute.results_of(config, module, dataset), "mine")


@pytest.mark.parametrize("dataset_class", [COCO, Flickr30k])
def test_both_directions_stand_beside_ours(dataset_class: type[Karpathy], tmp_path: Path) -> None:
    found = table(dataset_class, tmp_path)
    rows = [row for row in load_published(dataset_class.benchmark_name) if row.protocol["label"] == "clip_benchmark"]
    assert len(published(found)) == len(rows) == 65
    assert all("unknown: ties, missing_images)" in label for label in published(found))
    known = next(row for row in rows if row.backbone == "RN50 openai").metrics
    shown = cells(found)[RN50]
    for direction in ("i2t", "t2i"):
        for kind in ("R@1", "R@5", "R@10"):
            assert shown[f"{direction}\n{kind}"] == f"{known[f'{direction}/{kind}']:.2f}"
    assert shown["mean\nR@1"] == f"{(known['i2t/R@1'] + known['t2i/R@1']) / 2:.2f}"
    assert cells(found)["mine"].keys() == shown.keys()


@pytest.mark.parametrize("dataset_class", [COCO, Flickr30k])
@pytest.mark.parametrize(
    "changes",
    [{"prompt": "a photo of {}"}, {"captions_per_image": 5}, {"captions_per_image": 1}, {"split": "val"}],
    ids=str,
)
def test_not_where_a_known_condition_differs(
    dataset_class: type[Karpathy], changes: dict[str, Any], tmp_path: Path
) -> None:
    assert published(table(dataset_class, tmp_path, **changes)) == []


def test_what_is_unknown_may_differ(tmp_path: Path) -> None:
    assert len(published(table(COCO, tmp_path, ties="optimistic", missing_images="report"))) == 65
