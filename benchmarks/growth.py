"""How cost grows with work: a training step with its batch, ranking with its gallery, start-up with the data set.

python -m benchmarks.growth: prints the exponent of each (1 = linear, 0 = independent) and draws benchmarks/growth.png.
"""

import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter
from PIL import Image

from benchmarks.measure import Row, Timings, interleave, machine, show
from benchmarks.ranking import features, near
from cliplab import build
from cliplab.config import load_config
from cliplab.evaluation.ranking import Truth, rank_truths
from cliplab.losses import LOSSES
from cliplab.models.composed import ComposedRetriever

BATCHES, GALLERIES, IMAGES = (8, 16, 32, 64), (25_000, 50_000, 100_000, 200_000), (500, 2_000, 8_000, 32_000)
PICTURE = Path(__file__).with_suffix(".png")


@functools.cache
def trained() -> tuple[ComposedRetriever, torch.optim.Optimizer]:
    """One ViT-B-32 for all batch sizes."""
    config = load_config("configs/flickr8k.yaml", ["model.arch=ViT-B-32", "model.weights=null"])
    model, _ = build.build_model(config)
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def step(batch: int) -> Callable[[], None]:
    """Forward, backward and AdamW on pictures and captions of random content."""
    model, optimizer = trained()
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    text = torch.randint(1, 49_000, (batch, 77))
    text[:, 16] = 49_407

    def call() -> None:
        query, target = model.encode_query({"text": text}), model.encode_target({"image": images})
        LOSSES["info_nce"](query, target, model.scale).backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def ranking(size: int) -> Callable[[], None]:
    """1,000 queries in a gallery."""
    gallery = features(size, seed=1)
    queries = near(gallery, torch.arange(1000), 2.0)
    truth = Truth([[query] for query in range(1000)])
    return lambda: rank_truths(queries, gallery, [truth]) and None


def start(size: int, folder: Path) -> Callable[[], None]:
    """What train.py does with a data set before it builds a model, its annotations and folder of pictures new to it."""
    folder = folder / str(size)
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "images" / "0.jpg")
    records = []
    for number in range(size):
        if number:
            os.link(folder / "images" / "0.jpg", folder / "images" / f"{number}.jpg")
        split = {0: "test", 1: "val"}.get(number % 50, "train")
        captions = [{"raw": f"caption {place} of picture {number}", "imgid": number} for place in range(5)]
        records.append({"filename": f"{number}.jpg", "imgid": number, "split": split, "sentences": captions})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": records, "dataset": "coco"}))
    config = load_config("configs/coco.yaml", [f"data.root={folder}", "model.arch=ViT-tiny-8-64", "model.weights=null"])
    return lambda: build.check(config) and None


def measured(make: Callable[[int], Callable[[], None]], sizes: Sequence[int], rounds: int = 3) -> Timings:
    """Each size in turn."""
    return interleave({str(size): make(size) for size in sizes}, rounds)


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Of the power law through the measured points, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def main() -> None:
    """Measure, draw and print."""
    with tempfile.TemporaryDirectory() as folder:
        asked = {
            "training step, ViT-B-32": ("pictures in the batch", BATCHES, measured(step, BATCHES)),
            "ranking 1,000 queries": ("gallery rows", GALLERIES, measured(ranking, GALLERIES)),
            "start-up: check of captions": (
                "pictures in the data set",
                IMAGES,
                measured(lambda size: start(size, Path(folder)), IMAGES),
            ),
        }
    figure, axes = plt.subplots(1, len(asked), figsize=(13, 4), layout="constrained")
    rows = []
    for axis, (title, (what, sizes, timings)) in zip(axes, asked.items(), strict=True):
        seconds = [timings.median(str(size)) for size in sizes]
        power = exponent(sizes, seconds)
        axis.plot(sizes, seconds, "o-", label="measured")
        axis.plot(sizes, [seconds[-1] * size / sizes[-1] for size in sizes], "--", color="grey", label="linear")
        axis.set(title=f"{title}: ~ n^{power:.2f}", xlabel=what, ylabel="seconds", ylim=0)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.legend()
        growth, expected = seconds[-1] / seconds[0], sizes[-1] / sizes[0]
        notes = f"cost ~ n^{power:.2f}; {seconds[-1]:.2f} s at {sizes[-1]:,}"
        question = f"{title}: growth for {expected:g} times the work"
        wanted, against = (1.0, "no growth") if title.startswith("start-up") else (expected, "linear growth")
        rows.append(Row(question, growth, wanted, "times", wanted / growth, against, 0.9, notes))
    figure.suptitle(machine(), fontsize=8)
    figure.savefig(PICTURE, dpi=110)
    show(rows, "growth")


if __name__ == "__main__":
    main()
