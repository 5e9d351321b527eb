from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor

from cliplab.data.dataset import GALLERY_FEATURES, QUERY_FEATURES, TRAIN_FEATURES
from cliplab.data.images import ImageTransform, Preprocess
from cliplab.data.rows import LESSONS, EvalRows, TrainRows, cached_rows, evaluation_columns, training_columns

TABLE = Dataset.from_dict(
    {
        "reference": ["r0", "r1", "r2"],
        "target": ["t0", "t1", "t0"],
        "reference_id": [10, 11, 12],
        "target_id": [20, 21, 20],
        "texts": [["a", "bb"], ["ccc"], ["dddd", "eeeee", "ffffff"]],
    },
    features=TRAIN_FEATURES,
)
QUERIES = Dataset.from_dict(
    {"query_id": [0, 0], "reference_id": [1, 1], "image": ["x", "y"], "text": ["p", "q"]}, features=QUERY_FEATURES
)
GALLERY = Dataset.from_dict({"id": ["g"], "image": ["y"], "text": [None]}, features=GALLERY_FEATURES)


class Transform(ImageTransform):
    """A picture is the bytes of its name."""

    def __call__(self, image: Any, generator: np.random.Generator | None = None) -> Tensor:
        return torch.tensor(list(image.encode()))


def tokenize(text: str) -> Tensor:
    return torch.tensor([[len(text)]])


class Source:
    """Rows are the order in which items were first asked for."""

    def __init__(self, modalities: tuple[str, ...], roles: tuple[str, ...] = ("query", "target")) -> None:
        self.modalities, self.roles, self.asked = modalities, roles, []
        self.known: dict[str, list[str]] = {"image": [], "text": []}

    def covers(self, modality: str, role: str, training: bool) -> bool:
        return modality in self.modalities and role in self.roles

    def rows(self, modality: str, items: Sequence[str], load: Callable[[str], Tensor], trainer: Any) -> np.ndarray:
        self.asked.append(modality)
        known = self.known[modality]
        known += [item for item in dict.fromkeys(items) if item not in known]
        return np.asarray([known.index(item) for item in items])

    def look_up(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


LOADS: dict[str, Callable[[str], Tensor]] = {"image": lambda _: torch.empty(0), "text": lambda _: torch.empty(0)}


def rows_of(source: Source | None, seed: int = 0) -> TrainRows:
    cached = cached_rows(source, training_columns(TABLE), LOADS, None, training=True)
    return TrainRows(TABLE, Transform(Preprocess()), tokenize, seed, cached)


@pytest.mark.parametrize("modalities", [(), ("image",), ("text",), ("image", "text")])
def test_cached_rows_name_what_the_uncached_batch_holds(modalities):
    source = Source(modalities)
    cached, plain = rows_of(source), rows_of(None)
    assert source.asked == list(modalities), "once a modality"
    seen = set()
    for epoch in range(20):
        keys = [(2, epoch), (0, epoch), (1, epoch)]
        ours, given = cached.__getitems__(keys), plain.__getitems__(keys)
        for role, modality in (("query", "image"), ("query", "text"), ("target", "image")):
            values = given[role][modality].tolist()
            if modality in modalities:
                items = [source.known[modality][row] for row in ours[role][f"{modality}_row"].tolist()]
                expected = [[len(item)] if modality == "text" else list(item.encode()) for item in items]
                assert expected == [value if isinstance(value, list) else [value] for value in values]
                assert modality not in ours[role]
            else:
                assert torch.equal(ours[role][modality], given[role][modality])
        for name in ("row_id", "query_id", "target_id", "reference_id"):
            assert torch.equal(ours[name], given[name])
        assert given["target_id"].tolist() == [20, 20, 21] and given["reference_id"].tolist() == [12, 10, 11]
        seen.update(given["query"]["text"].flatten().tolist())
    assert seen == {1, 2, 3, 4, 5, 6}


def test_a_choice_depends_on_seed_epoch_and_row_alone():
    rows = rows_of(None)
    alone = [rows[2, epoch]["query"]["text"].item() for epoch in range(30)]
    together = [rows.__getitems__([(0, e), (2, e)])["query"]["text"][1].item() for e in range(30)]
    assert alone == together and set(alone) == {4, 5, 6}
    assert alone != [rows_of(None, seed=1)[2, epoch]["query"]["text"].item() for epoch in range(30)]


def test_queries_that_need_inputs_keep_them():
    source = Source(("image", "text"), roles=("target",))
    assert set(cached_rows(source, training_columns(TABLE), LOADS, None, training=True)) == {"target"}


def test_tables_of_an_evaluation_share_one_question():
    source = Source(("image", "text"))
    cached = cached_rows(source, evaluation_columns([("query", QUERIES), ("target", GALLERY)]), LOADS, None)
    assert source.asked == ["image", "text"] and set(cached) == {(0, "image"), (0, "text"), (1, "image")}
    assert cached[1, "image"].tolist() == [1], "y is y, as query and in the gallery"
    rows = EvalRows(GALLERY, "target", Transform(Preprocess()), tokenize, {"image": cached[1, "image"]})
    batch = rows.__getitems__([0])
    assert set(batch["target"]) == {"image_row"} and batch["target_id"].tolist() == [0] == batch["row_id"].tolist()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("lesson", "inputs"), [("images", {("target", "image")}), ("texts", {("query", "text")})])
def test_images_or_texts_alone_read_nothing_else(lesson, inputs, cached, monkeypatch):
    source = Source(("image", "text")) if cached else None
    columns = LESSONS[lesson]
    plain = rows_of(source).__getitems__([(2, 1), (0, 1)])
    forbidden = (lambda *_: pytest.fail("a text was read")) if lesson == "images" else tokenize
    if lesson == "texts":
        monkeypatch.setattr(Transform, "__call__", lambda *_: pytest.fail("a picture was read"))
    known = cached_rows(source, training_columns(TABLE, columns), LOADS, None, training=True)
    rows = TrainRows(TABLE, Transform(Preprocess()), forbidden, 0, known, columns)
    batch = rows.__getitems__([(2, 1), (0, 1)])
    suffix = "_row" if cached else ""
    found = {(role, name) for role in ("query", "target") for name in batch[role]}
    assert found == {(role, name + suffix) for role, name in inputs}
    for role, name in found:
        assert torch.equal(batch[role][name], plain[role][name]), "the same as where all is read"
    assert batch["target_id"].tolist() == [20, 20]
    if source is not None:
        assert set(known) == set(columns)
