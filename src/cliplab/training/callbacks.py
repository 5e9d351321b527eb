"""What is shown while a run goes on: the progress bar, and pictures of retrievals after each validation."""

import textwrap
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageOps

from cliplab.evaluation.evaluator import RankedBenchmark
from cliplab.training.module import RetrievalModule

CELL, BORDER, TEXT_WIDTH, LINE = 96, 4, 200, 12
HIT, MISS, TARGET = (30, 160, 60), (225, 225, 225), (40, 90, 200)


class ProgressBar(RichProgressBar):
    """Lightning's, without the version number of a logger."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Loss and what else is logged for the bar."""
        return {key: value for key, value in super().get_metrics(trainer, pl_module).items() if key != "v_num"}


class RetrievalPictures(L.Callback):
    """Per benchmark a grid: reference | text | target | top 10, hits framed; failures as well as hits."""

    def __init__(self, folder: Path, rows: int = 8, k: int = 10) -> None:
        self.folder, self.rows, self.k = folder, rows, k

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the ranks are known."""
        if not trainer.sanity_checking:
            self.save(trainer, pl_module, f"epoch-{trainer.current_epoch:03d}")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The final picture."""
        self.save(trainer, pl_module, "test")

    def save(self, trainer: L.Trainer, pl_module: L.LightningModule, stem: str) -> None:
        """One PNG per benchmark, also to TensorBoard."""
        assert isinstance(pl_module, RetrievalModule)
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, ranked in pl_module.outcome.get("", {}).items():
            if ranked.benchmark.gallery[0]["image"] is None or ranked.benchmark.blind:
                continue  # a gallery of texts has no pictures, a blind test no hits
            grid = draw_grid(ranked, self.rows, self.k)
            grid.save(self.folder / f"{name}-{stem}.png")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    array = np.asarray(grid)
                    logger.experiment.add_image(f"pictures/{name}", array, trainer.global_step, dataformats="HWC")


def draw_grid(ranked: RankedBenchmark, rows: int, k: int) -> Image.Image:
    """Half of the rows are hits within k, half failures, evenly spaced over the queries; fewer if there are fewer."""
    chosen = _choose(ranked.ranks_under_protocol(), rows, k)
    nearest = ranked.nearest(chosen, k).tolist()
    first_row = {query_id: row for row, query_id in reversed(list(enumerate(ranked.benchmark.queries["query_id"])))}
    width = TEXT_WIDTH + (2 + k) * (CELL + BORDER) + 3 * BORDER
    header = 2 * LINE
    grid = Image.new("RGB", (width, header + len(chosen) * (CELL + 2 * BORDER)), "white")
    _draw_header(grid, k)
    for line, (query_id, hits) in enumerate(zip(chosen, nearest, strict=True)):
        _draw_row(grid, header + line * (CELL + 2 * BORDER), ranked, query_id, first_row[query_id], hits)
    return grid


def _choose(ranks: torch.Tensor, rows: int, k: int) -> list[int]:
    hits, failures = (ranks <= k).nonzero()[:, 0].tolist(), (ranks > k).nonzero()[:, 0].tolist()
    half = min(rows // 2, len(failures))
    return _spread(hits, rows - half) + _spread(failures, max(half, rows - len(hits)))


def _spread(items: list[int], count: int) -> list[int]:
    count = min(count, len(items))
    return [items[position * len(items) // count] for position in range(count)]


def _columns(k: int) -> tuple[int, int, list[int]]:
    """x of reference, target and of the k retrieved pictures."""
    target = CELL + TEXT_WIDTH + 3 * BORDER
    return BORDER, target, [target + (1 + place) * (CELL + BORDER) + BORDER for place in range(k)]


def _draw_header(grid: Image.Image, k: int) -> None:
    pen = ImageDraw.Draw(grid)
    reference, target, places = _columns(k)
    pen.text((reference, LINE // 2), "reference", fill="black")
    pen.text((CELL + 2 * BORDER, LINE // 2), "text and rank of the target", fill="black")
    pen.text((target, LINE // 2), "target", fill="black")
    pen.text((places[0], LINE // 2), f"top {k}, best first; green frame = hit", fill="black")


def _draw_row(grid: Image.Image, y: int, ranked: RankedBenchmark, query_id: int, row: int, hits: list[int]) -> None:
    benchmark = ranked.benchmark
    query, positives = benchmark.queries[row], benchmark.positives[query_id]
    reference, target, places = _columns(len(hits))
    if query["image"] is not None:
        _paste(grid, query["image"], reference, y, MISS)
    _paste(grid, benchmark.gallery[positives[0]]["image"], target, y, TARGET)
    text = textwrap.wrap(query["text"] or "", width=TEXT_WIDTH // 6)[: CELL // LINE - 1]
    rank = ranked.ranks_under_protocol()[query_id].item()
    lines = [*text, f"rank {rank:g} of {len(benchmark.gallery)}"]
    ImageDraw.Draw(grid).multiline_text((CELL + 2 * BORDER, y), "\n".join(lines), fill="black", spacing=2)
    for x, hit in zip(places, hits, strict=True):
        _paste(grid, benchmark.gallery[hit]["image"], x, y, HIT if hit in positives else MISS)


def _paste(grid: Image.Image, path: str, x: int, y: int, frame: tuple[int, int, int]) -> None:
    with Image.open(path) as image:
        picture = ImageOps.pad(image.convert("RGB"), (CELL - 2 * BORDER, CELL - 2 * BORDER), color="white")
    grid.paste(ImageOps.expand(picture, border=BORDER, fill=frame), (x, y))
