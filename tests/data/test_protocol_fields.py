"""A data set takes the protocol fields that change something on it, and no others."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cliplab.benchmark import FIELDS, Benchmark, Protocol
from cliplab.config import load_config
from cliplab.data import CIRCO, CIRR, DATASETS, COCODataModule, FashionIQ, FashionIQDataModule, Karpathy
from cliplab.data.dataset import SHARED_FIELDS, RetrievalDataset
from cliplab.data.image_folder import ImageFolderDataset
from cliplab.errors import UserError
from cliplab.evaluation.evaluator import rank_benchmark
from cliplab.evaluation.scoring import CosineScorer
from tests.data.cir_files import make_circo, make_cirr
from tests.image_folders import make_image_folder

OTHER: dict[str, Any] = {
    "gallery": "val_split",
    "caption_join": "precaption",
    "train_join": "each_caption",
    "query_unit": "caption",
    "prompt": "a {}",
    "ties": "optimistic",
    "missing_images": "report",
    "recall_at": (1, 2),
    "map_at": (2, 3),
    "subset_at": (1, 4),
    "target": "soft",
    "captions_per_image": 1,
}
CASES: dict[str, tuple[type[RetrievalDataset], str, dict[str, Any]]] = {
    "fashioniq": (FashionIQ, "searle", {"caption_join": "comma_and"}),
    "karpathy": (Karpathy, "clip_benchmark", {"query_unit": "order"}),
    "cirr": (CIRR, "clip4cir", {"train_join": "precaption"}),
    "circo": (CIRCO, "searle", {"caption_join": "shared_concept"}),
    "image_folder": (ImageFolderDataset, "zero_shot_imagenet", {"caption_join": "cifar_templates"}),
}


@pytest.fixture
def roots(fashioniq_root: Path, karpathy_root: Path, tmp_path: Path) -> dict[str, Callable[[], Path]]:
    return {
        "fashioniq": lambda: fashioniq_root,
        "karpathy": lambda: karpathy_root,
        "cirr": lambda: make_cirr(tmp_path / "cirr"),
        "circo": lambda: make_circo(tmp_path / "circo"),
        "image_folder": lambda: make_image_folder(tmp_path / "pictures"),
    }


def told(benchmark: Benchmark) -> dict[str, Any]:
    """All that a benchmark says, and its metrics where everything ties."""
    found = {f.name: getattr(benchmark, f.name) for f in fields(benchmark) if f.name not in ("protocol", "transpose")}
    found |= {"queries": benchmark.queries.to_dict(), "gallery": benchmark.gallery.to_dict()}
    rows = len(set(benchmark.wording_of or range(len(benchmark.gallery))))
    queries, gallery = torch.ones(len(benchmark.positives), 1), torch.ones(rows, 1)
    ranked = rank_benchmark(benchmark, queries, gallery, CosineScorer())
    return found | {name: each.metrics for name, each in ranked.items()}


def outcome(dataset_class: type[RetrievalDataset], root: Path, protocol: Protocol) -> object:
    """What a run measures and trains on, or that it stops."""
    dataset = dataset_class(root)
    try:
        trained = dataset.train_table(protocol).to_dict() if dataset_class is not CIRCO else None
        return trained, [told(benchmark) for benchmark in dataset.benchmarks(protocol, dataset.test_split)]
    except UserError:
        return "stopped"


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", CASES)
def test_the_fields_that_are_taken_are_those_that_change_something(name: str, field: str, roots) -> None:
    dataset_class, protocol_name, own = CASES[name]
    root = roots[name]()
    protocol = dataset_class.make_protocol({"name": protocol_name})
    value = (own | {"exclude_reference": not protocol.exclude_reference}).get(field, OTHER.get(field))
    if field == "missing_images":
        sorted(path for path in root.rglob("*") if path.suffix in (".png", ".jpg"))[0].unlink()
    changes = replace(protocol, **{field: value})
    same = outcome(dataset_class, root, changes) == outcome(dataset_class, root, protocol)
    part = {"name": protocol_name, field: list(value) if isinstance(value, tuple) else value}
    if field in (*dataset_class.protocol_fields, *SHARED_FIELDS):
        assert not same and dataset_class.make_protocol(part).name.startswith(f"{protocol_name} ({field}=")
        return
    assert same
    message = f"{field}=.* changes nothing on the data set {name}; fields that do: {dataset_class.protocol_fields[0]}"
    with pytest.raises(UserError, match=message):
        dataset_class.make_protocol(part)


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_says_which_fields_count(name: str) -> None:
    assert set(DATASETS[name].protocol_fields) <= set(FIELDS) - set(SHARED_FIELDS)
    assert DATASETS[name].benchmark_name == name  # as messages say it
    assert DATASETS[name].make_protocol({}).name == DATASETS[name].default_protocol


def test_the_data_modules_and_the_config_refuse_the_same(tmp_path: Path, tiny_config: Path) -> None:
    from cliplab import build

    with pytest.raises(UserError, match="exclude_reference=True changes nothing on the data set coco"):
        COCODataModule(tmp_path, protocol={"exclude_reference": True})
    with pytest.raises(UserError, match="captions_per_image=5 changes nothing on the data set fashioniq"):
        FashionIQDataModule(tmp_path, protocol={"name": "clip4cir", "captions_per_image": 5})
    with pytest.raises(UserError, match="subset_at=.* changes nothing on the data set wardrobe"):
        build.check_parts(load_config(tiny_config, ["data.protocol={name: clip4cir, subset_at: [1]}"]))
    with pytest.raises(UserError, match="gallery=all changes nothing on the data set image_folder"):
        build.check_parts(load_config(tiny_config, ["zero_shot.protocol={name: zero_shot_cifar, gallery: all}"]))
