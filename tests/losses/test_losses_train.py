"""Every loss learns a batch of the wardrobe, and what it has learned survives a checkpoint."""

from pathlib import Path

import pytest
import torch

from cliplab import build
from cliplab.config import load_config
from cliplab.losses import LOSSES
from cliplab.models.checkpoints.weights import load_strictly
from cliplab.training.module import RetrievalModule
from cliplab.training.teacher import Teacher


def make(path: Path, name: str) -> tuple[RetrievalModule, build.BuiltFrom]:
    config = load_config(path, [f"loss={name}", "model.composer=sum"])
    torch.manual_seed(0)
    model, built_from = build.build_model(config)
    module = build.build_module(config, model, built_from)
    if name == "distillation":
        module.teacher = Teacher(build.build_model(config)[0])
    return module, built_from


def loss_of(module: RetrievalModule, batch: dict) -> torch.Tensor:
    pairs = module.model.training_pairs(batch["query"], batch["target"])
    torch.manual_seed(1)  # the same negatives are drawn each time
    return module._loss_of(pairs[0], module._given(pairs, batch)[0])


@pytest.fixture(scope="module")
def batch(tiny_config: Path) -> dict:
    config = load_config(tiny_config)
    model, built_from = build.build_model(config)
    dataset = build.build_dataset(config)
    return next(iter(build.build_datamodule(config, dataset, model, built_from).train_dataloader()))


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_falls_and_a_checkpoint_has_it_all(tiny_config: Path, batch: dict, name: str) -> None:
    module, built_from = make(tiny_config, name)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = loss_of(module, batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses
    again, _ = build.build_model(load_config(tiny_config, [f"loss={name}", "model.composer=sum"]), vars(built_from))
    load_strictly(again, module.model.state_dict(), "memory")
    assert (again.clip.logit_bias is not None) == (name == "sigmoid")
    fresh = build.build_module(load_config(tiny_config, [f"loss={name}", "model.composer=sum"]), again, built_from)
    fresh.teacher = module.teacher
    assert loss_of(fresh, batch).item() == pytest.approx(loss_of(module, batch).item(), rel=1e-5)
