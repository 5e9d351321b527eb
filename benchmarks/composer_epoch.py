"""A Combiner on frozen towers: an epoch over cached features beside one that encodes at every step.

python -m benchmarks.composer_epoch [TRIPLETS BATCH]: 18,000 triplets in batches of 4,096 unless given.
ViT-B-32 with random weights, projection 2,048, hidden 4,096. Ours is an epoch of a run: Trainer, loader over a feature
store on disk, clipping, fused AdamW. The other side is stage 2 as CLIP4Cir does it, rewritten:
open_clip's towers without gradient, then our step; the towers are timed on a few triplets and projected, and decoding
pictures is left out of it.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import open_clip
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.measure import Row, Timings, gemm_seconds, interleave, show
from cliplab.cli import keep_freed_memory
from cliplab.config import OptimConfig
from cliplab.data.dataset import TRAIN_FEATURES
from cliplab.data.images import ImageTransform, Preprocess
from cliplab.data.rows import TrainRows
from cliplab.data.samplers import EpochSampler
from cliplab.losses.info_nce import info_nce
from cliplab.models.composed import ComposedRetriever
from cliplab.models.composers import Combiner
from cliplab.pretrained import load
from cliplab.training.feature_cache import FeatureCache
from cliplab.training.feature_store import FeatureStore
from cliplab.training.module import RetrievalModule

WIDTH, PROJECTION, HIDDEN, PART = 512, 2048, 4096, 16
ROUNDS = 3
FLOORS = {"32-true": 80.0, "bf16-mixed": 150.0}


class Triplets(L.LightningDataModule):
    """As many pictures as triplets, four texts each; features are random, as the weights are."""

    def __init__(self, count: int, batch_size: int, folder: Path, model: ComposedRetriever) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.features = FeatureCache(folder, model, ImageTransform(Preprocess()), (), ("image", "text"))
        for kind, rows in (("image", count), ("text", 4 * count)):
            store, ids = FeatureStore(folder, kind, {}), [n.to_bytes(16) for n in range(rows)]
            store.write(ids, torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)))
            store.find(ids)
            self.features._stores[kind] = None, store
        numbers = np.random.default_rng(0).permutation(count)
        table = {"reference": ["r"] * count, "target": ["t"] * count, "texts": [["a", "b", "c", "d"]] * count}
        table |= {"reference_id": numbers.tolist(), "target_id": list(range(count))}
        cached = {"reference": numbers, "target": np.arange(count), "texts": np.arange(4 * count)}
        rows = Dataset.from_dict(table, features=TRAIN_FEATURES)
        self.rows = TrainRows(rows, ImageTransform(Preprocess()), lambda _: torch.empty(0), 0, cached)

    def train_dataloader(self) -> DataLoader:
        """As RetrievalDataModule's."""
        sampler = EpochSampler(self.rows, 1, 0, shuffle=True, seed=0, drop_last=True)
        return DataLoader(self.rows, self.batch_size, sampler=sampler, drop_last=True, collate_fn=lambda batch: batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Features in place of rows."""
        return self.features.look_up(batch)


def make_module(dropout: float) -> RetrievalModule:
    """ViT-B-32 with random weights, frozen, and a Combiner."""
    clip = load("ViT-B-32").model
    model = ComposedRetriever(clip, Combiner(WIDTH, PROJECTION, HIDDEN, dropout), (0.5,) * 3, (0.5,) * 3, 100.0)
    model.freeze(["image_encoder", "text_encoder"])
    return RetrievalModule(model, partial(info_nce, symmetric=False), OptimConfig(lr=2e-5, schedule="constant"))


def epoch(module: RetrievalModule, data: Triplets, precision: str) -> None:
    """One of a run."""
    trainer = L.Trainer(
        max_epochs=1,
        precision=precision,  # type: ignore[arg-type]
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)


def products(batch: int, steps: int, precision: str) -> Callable[[], None]:
    """The matrix products of an epoch: forward, gradients of weights and, where one is needed, of inputs; the scores.

    Scores are multiplied in fp32 under either precision.
    """
    layers = [(WIDTH, PROJECTION)] * 2 + [(2 * PROJECTION, HIDDEN)] * 2 + [(HIDDEN, WIDTH), (HIDDEN, 1)]
    forward = [(batch, k, n) for k, n in layers]
    weights = [(n, batch, k) for k, n in layers]
    inputs = [(batch, n, k) for k, n in layers[2:]]
    dtype, device = (torch.bfloat16 if precision.startswith("bf16") else torch.float32), _device()
    scores = [(batch, WIDTH, batch), (batch, batch, WIDTH)]
    calls = gemm_seconds(forward + weights + inputs, dtype, device), gemm_seconds(scores, torch.float32, device)

    def run() -> None:
        for _ in range(steps):
            for call in calls:
                call()

    return run


def encoding(count: int, precision: str) -> Callable[[], None]:
    """What a step without a cache adds for `count` triplets: two pictures and a text of each through open_clip."""
    towers = open_clip.create_model("ViT-B-32").eval().to(_device())
    pictures, texts = torch.randn(2 * count, 3, 224, 224, device=_device()), _texts(count)
    bf16 = precision.startswith("bf16")

    def run() -> None:
        with torch.no_grad(), torch.autocast(_device(), torch.bfloat16) if bf16 else nullcontext():
            towers.encode_image(pictures)
            towers.encode_text(texts)

    return run


def _texts(count: int) -> Tensor:
    ids = torch.randint(1, 49_000, (count, 77), device=_device())
    ids[:, 12], ids[:, 13:] = 49_407, 0
    return ids


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def rows_of(timings: Timings, triplets: int, precision: str, dropout: float, size: int) -> list[Row]:
    """Triplets per second beside the towers' and beside the bare products."""
    ours, limit = (triplets / timings.median(side) for side in ("ours", "bare products"))
    recomputed = 1 / (timings.median("encoding") / PART + 1 / ours)
    question = f"Combiner, dropout {dropout:g}, {precision}, batch {size:,}"
    note = f"towers on {PART} triplets, projected; decoding left out"
    peer = Row(
        question, ours, recomputed, "triplets/s", ours / recomputed, "encoding at each step", FLOORS[precision], note
    )
    share, floor = timings.ratio("bare products", "ours"), 0.7 if dropout else 0.85
    return [peer, Row(question, ours, limit, "triplets/s", share, "its bare products", floor)]


def main(arguments: list[str]) -> None:
    """Measure and print."""
    keep_freed_memory()  # as train.py does
    triplets, batch = map(int, arguments or (18_000, 4_096))
    steps = triplets // batch
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("32-true", "bf16-mixed"):
            for dropout in (0.0, 0.5):
                module = make_module(dropout)
                data = Triplets(triplets, batch, Path(folder) / f"{precision}-{dropout}", module.model)
                sides: dict[str, Callable[[], object]] = {
                    "ours": lambda m=module, d=data, p=precision: epoch(m, d, p),
                    "bare products": products(batch, steps, precision),
                    "encoding": encoding(PART, precision),
                }
                timings = interleave(sides, ROUNDS)
                rows += rows_of(timings, steps * batch, precision, dropout, batch)
    show(rows, "composer_epoch")


if __name__ == "__main__":
    main(sys.argv[1:])
