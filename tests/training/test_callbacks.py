from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from cliplab.benchmark import PROTOCOLS, Benchmark
from cliplab.config import OptimConfig
from cliplab.data.dataset import GALLERY_FEATURES, QUERY_FEATURES
from cliplab.evaluation.evaluator import Evaluator, RankedBenchmark
from cliplab.losses.info_nce import info_nce
from cliplab.models.clip import CLIP
from cliplab.models.composed import ComposedRetriever
from cliplab.training.callbacks import (
    BORDER,
    CELL,
    HIT,
    LINE,
    MISS,
    TARGET,
    TEXT_WIDTH,
    ProgressBar,
    RetrievalPictures,
    draw_grid,
)
from cliplab.training.module import RetrievalModule

G = 6
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10), (250, 10, 250), (10, 250, 250)]
NEAREST = [[2, 0, 4, 1], [5, 3, 1, 0], [1, 2, 3, 4], [0, 1, 2, 3]]  # what the embeddings below give
POSITIVES = [[0], [3, 5], [5], [4]]  # first hit at 2, at 1; none among four


def make_ranked(folder: Path, with_reference: bool = True) -> RankedBenchmark:
    """Six pictures of one colour each, four queries; query 1 is asked in two wordings, of which the first is shown."""
    paths = [str(folder / f"{row}.png") for row in range(G)]
    for path, colour in zip(paths, COLOURS, strict=True):
        Image.new("RGB", (20, 10), colour).save(path)
    query_ids = [0, 1, 1, 2, 3]
    queries = {
        "query_id": query_ids,
        "reference_id": [-1] * 5,
        "image": [paths[row] for row in (1, 2, 0, 3, 4)] if with_reference else [None] * 5,
        "text": ["is redder", "is wider", "and wider", None, "word " * 60],
    }
    gallery = {"id": [str(row) for row in range(G)], "image": paths, "text": [None] * G}
    benchmark = Benchmark(
        "toy",
        PROTOCOLS["searle"],
        Dataset.from_dict(queries, features=QUERY_FEATURES),
        Dataset.from_dict(gallery, features=GALLERY_FEATURES),
        POSITIVES,
        [f"query {query_id}" for query_id in range(4)],
    )
    embeddings = torch.zeros(5, G)
    for row, query_id in enumerate(query_ids):
        for place, hit in enumerate(NEAREST[query_id]):
            embeddings[row, hit] = 4.0 - place
    evaluator = Evaluator(benchmark)
    evaluator.add_queries(torch.arange(5), {"": F.normalize(embeddings, dim=-1)})
    evaluator.add_gallery(torch.arange(G), torch.eye(G))
    return evaluator.finish()[""]["toy"]


def cell(grid: Image.Image, x: int, line: int) -> tuple[Any, Any, Any]:
    """Frame, centre and the background left of it, of the picture whose left edge is at x."""
    y = 2 * LINE + line * (CELL + 2 * BORDER)
    frames = {grid.getpixel((x + dx, y + dy)) for dx in (0, CELL - 1) for dy in (0, CELL // 2, CELL - 1)}
    assert len(frames) == 1, "a frame has one colour"
    return frames.pop(), grid.getpixel((x + CELL // 2, y + CELL // 2)), grid.getpixel((x - 1, y))


def test_the_grid(tmp_path: Path) -> None:
    ranked, k = make_ranked(tmp_path), 3
    assert ranked.ranks_under_protocol().tolist() == [2, 1, 6, 6]
    grid = draw_grid(ranked, rows=4, k=k)
    assert grid.size == (TEXT_WIDTH + 5 * (CELL + BORDER) + 3 * BORDER, 2 * LINE + 4 * (CELL + 2 * BORDER))
    white = (255, 255, 255)
    target_x = CELL + TEXT_WIDTH + 3 * BORDER
    for line, query_id in enumerate([0, 1, 2, 3]):  # hits first, then failures
        assert cell(grid, BORDER, line) == (MISS, COLOURS[query_id + 1], white)
        assert cell(grid, target_x, line) == (TARGET, COLOURS[POSITIVES[query_id][0]], white)
        for place, hit in enumerate(NEAREST[query_id][:k]):
            frame = HIT if hit in POSITIVES[query_id] else MISS
            x = target_x + (1 + place) * (CELL + BORDER) + BORDER
            assert cell(grid, x, line) == (frame, COLOURS[hit], white), (line, place)
    assert grid.getpixel((grid.width - 1, grid.height // 2)) == white, "the last picture has room"


def test_each_row_says_its_text(tmp_path: Path) -> None:
    grid = draw_grid(make_ranked(tmp_path), rows=4, k=3)
    left = CELL + 2 * BORDER

    def ink(line: int) -> int:
        y = 2 * LINE + line * (CELL + 2 * BORDER)
        return int((np.asarray(grid.crop((left, y, left + TEXT_WIDTH, y + CELL)).convert("L")) < 128).sum())

    assert ink(2) > 0, "the rank, though the query has no text"
    assert ink(0) > ink(2) and ink(3) > 3 * ink(0)
    below = [grid.getpixel((x, grid.height - 1)) for x in range(left, left + TEXT_WIDTH)]
    assert set(below) == {(255, 255, 255)}, "long texts end within their row"


@pytest.mark.parametrize(
    ("rows", "k", "shown"),
    [(2, 3, [0, 2]), (3, 3, [0, 1, 2]), (2, 1, [1, 0]), (4, 1, [1, 0, 2, 3]), (4, 6, [0, 1, 2, 3])],
)
def test_failures_are_shown_beside_hits(tmp_path: Path, rows: int, k: int, shown: list[int]) -> None:
    grid = draw_grid(make_ranked(tmp_path), rows, k)
    assert grid.height == 2 * LINE + len(shown) * (CELL + 2 * BORDER)
    assert [cell(grid, BORDER, line)[1] for line in range(len(shown))] == [COLOURS[q + 1] for q in shown]


def test_a_query_without_a_picture_leaves_its_place_empty(tmp_path: Path) -> None:
    grid = draw_grid(make_ranked(tmp_path, with_reference=False), rows=4, k=3)
    assert (np.asarray(grid.crop((0, 2 * LINE, CELL + BORDER, grid.height))) == 255).all()


class TestRetrievalPictures:
    @pytest.fixture
    def module(self, tmp_path: Path) -> RetrievalModule:
        vision = {"image_size": 8, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8}
        text = {"context_length": 4, "vocab_size": 5, "width": 8, "heads": 1, "layers": 1}
        model = ComposedRetriever(CLIP(4, vision, text), None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        module = RetrievalModule(model, partial(info_nce), OptimConfig())
        ranked = make_ranked(tmp_path)
        gallery = {"id": ["a"] * G, "image": [None] * G, "text": ["a text"] * G}
        texts = replace(ranked.benchmark, gallery=Dataset.from_dict(gallery, features=GALLERY_FEATURES))
        module.outcome = {"": {"toy": ranked, "i2t": replace(ranked, benchmark=texts)}, "image_only": {"toy": ranked}}
        return module

    def trainer(self, **changes: Any) -> Any:
        told = {"is_global_zero": True, "sanity_checking": False, "current_epoch": 7, "global_step": 90, "loggers": []}
        return SimpleNamespace(**told | changes)

    def test_one_file_per_benchmark_of_pictures(self, module: RetrievalModule, tmp_path: Path) -> None:
        callback = RetrievalPictures(tmp_path / "deep" / "pictures", rows=2, k=3)
        callback.on_validation_end(self.trainer(), module)
        callback.on_test_end(self.trainer(), module)
        files = sorted((tmp_path / "deep" / "pictures").iterdir())
        assert [file.name for file in files] == ["toy-epoch-007.png", "toy-test.png"]
        expected = draw_grid(module.outcome[""]["toy"], 2, 3)
        assert all(np.array_equal(np.asarray(Image.open(file)), np.asarray(expected)) for file in files)

    def test_only_the_first_process_draws_and_not_before_training(
        self, module: RetrievalModule, tmp_path: Path
    ) -> None:
        callback = RetrievalPictures(tmp_path / "pictures")
        callback.on_validation_end(self.trainer(is_global_zero=False), module)
        callback.on_validation_end(self.trainer(sanity_checking=True), module)
        assert not (tmp_path / "pictures").exists()

    def test_tensorboard_gets_the_picture(self, module: RetrievalModule, tmp_path: Path) -> None:
        given: dict[str, Any] = {}
        logger = TensorBoardLogger(str(tmp_path), name="", version="tensorboard")
        logger._experiment = SimpleNamespace(  # type: ignore[assignment]
            add_image=lambda tag, array, step, dataformats: given.update(
                tag=tag, array=array, step=step, dataformats=dataformats
            )
        )
        RetrievalPictures(tmp_path / "pictures", 2, 3).on_test_end(self.trainer(loggers=[logger]), module)
        assert (given["tag"], given["step"], given["dataformats"]) == ("pictures/toy", 90, "HWC")
        assert np.array_equal(given["array"], np.asarray(draw_grid(module.outcome[""]["toy"], 2, 3)))


def test_the_progress_bar_shows_no_version_number() -> None:
    trainer = SimpleNamespace(loggers=[SimpleNamespace(version=3)], progress_bar_metrics={"train/loss": 0.5})
    assert ProgressBar().get_metrics(trainer, SimpleNamespace()) == {"train/loss": 0.5}  # type: ignore[arg-type]
