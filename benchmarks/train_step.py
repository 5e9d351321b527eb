"""A train step as `train.py` does it, Lightning's loop included, beside open_clip's recipe on the same weights.

python -m benchmarks.train_step [ARCH ...] [--precision fp32 bf16] [--batch 16] [--rounds 7] [KEY=VALUE of a config ...]
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.measure import Row, Timings, in_new_process, show
from benchmarks.peers import OpenCLIPStep, batches, open_clip_model
from benchmarks.products import Recorder
from cliplab import build
from cliplab.cli import keep_freed_memory
from cliplab.config import merge_config, read_overrides
from cliplab.run import RunDirectory
from cliplab.trainer import build_trainer

FLOORS = {
    ("ViT-B-32", "fp32"): 1.5,
    ("ViT-B-32", "bf16"): 1.6,
    ("RN50", "fp32"): 1.5,
    ("RN50", "bf16"): 1.45,
    ("ViT-B-16", "fp32"): 1.15,
    ("ViT-B-16", "bf16"): 1.2,
}
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3}
OURS, PEER, FUSED, LIMIT = "ours", "open_clip", "open_clip with fused AdamW", "our bare products"
COMPARED = 5  # steps whose losses are compared; one more warms up and is watched for its products
SETTINGS = [
    "model.composer=null",
    "optim.lr=1e-5",
    "optim.warmup=0",
    "optim.schedule=constant",
    "trainer.gradient_clip_val=null",  # as in open_clip
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=50",
    "trainer.accelerator=cpu",
]


class Turns(L.Callback):
    """After each of our steps the others take their turn; the time between their turns is ours, loop and all."""

    def __init__(self, peer: Callable[[Mapping[str, Tensor]], float], optimizers: Mapping[str, Callable[[], None]]):
        self.peer, self.optimizers = peer, optimizers
        self.timings = Timings({name: [] for name in (OURS, *optimizers, LIMIT)})
        self.losses: list[tuple[float, float]] = []
        self.products = Recorder()
        self.started = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare, then watch, then time."""
        seconds = {OURS: time.perf_counter() - self.started}
        if batch_idx == COMPARED:
            self.products.__exit__(None, None, None)
            self.products.replay()
        gradients, loss = _timed(lambda: self.peer(batch))
        self.losses.append((float(outputs["loss"]), loss))
        for name, step in self.optimizers.items():
            if name == PEER or batch_idx >= COMPARED:
                seconds[name] = gradients + _timed(step)[0]
        if batch_idx + 1 == COMPARED:
            self.products.__enter__()
        elif batch_idx > COMPARED:
            seconds[LIMIT] = _timed(self.products.replay)[0]
            for name, value in seconds.items():
                self.timings.seconds[name].append(value)
        self.started = time.perf_counter()

    def largest_difference(self) -> float:
        """Of the losses of the compared steps."""
        return max(abs(ours - theirs) for ours, theirs in self.losses[:COMPARED])


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def train(arch: str, precision: str, batch_size: int, rounds: int, overrides: list[str]) -> Turns:
    """Our run with the others taking turns."""
    chosen = {"fp32": "32-true", "bf16": "bf16-mixed"}[precision]
    settings = [*SETTINGS, f"model.arch={arch}", f"trainer.precision={chosen}", "seed=1", *overrides]
    config = merge_config([("benchmark", read_overrides(settings))])
    torch.manual_seed(0)
    model, built_from = build.build_model(config)
    module = build.build_module(config, model, built_from)
    peer = OpenCLIPStep(open_clip_model(arch, model.clip), precision == "bf16")
    names = {id(parameter): name for name, parameter in model.clip.named_parameters()}
    groups = [{**g.as_group(), "params": [names[id(p)] for p in g.parameters]} for g in module.groups()]
    optimizers = {PEER: peer.optimizer(groups), FUSED: peer.optimizer(groups, fused=True)}
    turns = Turns(
        lambda batch: peer.gradients(model.normalize(batch["target"]["image"]), batch["query"]["text"]), optimizers
    )
    steps = [
        {"query": {"text": batch["text"]}, "target": {"image": batch["image"]}}
        for batch in batches(COMPARED + 1 + rounds, batch_size, model.clip.visual.image_size)
    ]
    with TemporaryDirectory() as folder:
        trainer = build_trainer(config, RunDirectory(Path(folder)))
        trainer.callbacks = [turns]  # type: ignore[attr-defined] - no validation: nothing to select a checkpoint by
        trainer.fit(module, DataLoader(steps, batch_size=None))  # type: ignore[arg-type]
    return turns


def rows(arch: str, precision: str, batch_size: int, rounds: int, overrides: list[str]) -> list[Row]:
    """Both of open_clip's optimisers, and the limit."""
    turns = train(arch, precision, batch_size, rounds, overrides)
    difference = turns.largest_difference()
    question = f"train step, {arch}, {precision}, batch {batch_size}"
    note = f"losses differ by at most {difference:.1e} over {COMPARED} steps"
    if difference > TOLERANCE[precision]:
        note += f", more than the {TOLERANCE[precision]:.0e} that is asked"
    floor = FLOORS.get((arch, precision))
    row = turns.timings.row
    return [
        replace(row(question, OURS, PEER, batch_size, "samples/s", floor), notes=note),
        row(question, OURS, FUSED, batch_size, "samples/s"),
        row(question, OURS, LIMIT, batch_size, "samples/s", 0.95),
    ]


def main() -> None:
    """Measure and print."""
    keep_freed_memory()  # as train.py does
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("archs", nargs="*", default=[])
    parser.add_argument("--precision", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    overrides = [word for word in given.archs if "=" in word]
    archs = [word for word in given.archs if "=" not in word] or ["ViT-B-32", "RN50", "ViT-B-16"]
    asked = [(arch, precision) for arch in archs for precision in given.precision]
    if len(asked) == 1:
        show(rows(*asked[0], given.batch, given.rounds, overrides), "train step")
        return
    found: list[Row] = []
    for arch, precision in asked:  # a process each: two models, their optimisers and all operands take up to 10 GB
        options = ("--precision", precision, "--batch", str(given.batch), "--rounds", str(given.rounds))
        told = in_new_process("benchmarks.train_step", arch, *overrides, *options)
        found += [Row(**row) for row in told]
    show(found, "train step")


if __name__ == "__main__":
    main()
