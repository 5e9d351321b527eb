"""Every loss on shares of a batch in two processes has the value and the gradients of the whole batch in one."""

import functools
from typing import Any

import pytest
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor, distributed

from cliplab.losses import LOSSES
from tests.losses.features import features, number
from tests.processes import in_processes

B, N, D, WORLD = 3, 2, 4, 2  # rows per process
NAMES = tuple(name for name in LOSSES if name != "mse")  # no row of it knows of another: nothing is gathered
OPTIONS = {"soft_triplet": {"negatives_drawn": 100}}  # all: nothing is drawn
GIVEN = {
    "sigmoid": ("bias",),
    "reference_negative": ("reference", "negatives"),
    "distillation": ("teacher_query", "teacher_target", "teacher_scale"),
}


def inputs(rank: int | None) -> dict[str, Tensor]:
    """The joint batch, or the share of a process; scalars as they are."""
    shapes = [(WORLD * B, D)] * 5 + [(WORLD * B, N, D)]
    names = ("query", "target", "reference", "teacher_query", "teacher_target", "negatives")
    drawn = dict(zip(names, features(*shapes), strict=True))
    share = slice(None) if rank is None else slice(rank * B, (rank + 1) * B)
    found = {name: each.detach()[share].requires_grad_() for name, each in drawn.items()}
    return found | {"scale": number(4.0), "bias": number(-2.0), "teacher_scale": number(3.0)}


def outcome(name: str, rank: int | None) -> dict[str, Any]:
    given = inputs(rank)
    learned = [given[key] for key in ("query", "target", "scale", *GIVEN.get(name, ()))]
    taken = {key: given[key] for key in GIVEN.get(name, ())}
    loss = LOSSES[name](given["query"], given["target"], given["scale"], **taken, **OPTIONS.get(name, {}))
    return {"loss": loss.item(), "gradients": torch.autograd.grad(loss, learned)}


def siglip(rank: int) -> dict[str, Any]:
    given = inputs(rank)
    learned = [given[key] for key in ("query", "target", "scale", "bias")]
    loss = SigLipLoss(rank=rank, world_size=WORLD)(*learned)
    gradients = torch.autograd.grad(loss, learned)
    mean = loss.detach().clone()
    distributed.all_reduce(mean)
    return {"loss": mean.item() / WORLD, "gradients": gradients}


def step(rank: int) -> dict[str, Any]:
    return {name: outcome(name, rank) for name in NAMES} | {"open_clip": siglip(rank)}


@functools.cache
def outcomes() -> list[dict[str, Any]]:
    return in_processes(step, WORLD)


def assert_gradients(found: list[dict[str, Any]], expected: tuple[Tensor, ...]) -> None:
    """Per row those of the whole batch times the number of processes, whose mean DDP takes; of scalars its mean."""
    for place, gradient in enumerate(expected):
        shares = [each["gradients"][place] for each in found]
        if gradient.dim() == 0:
            torch.testing.assert_close(torch.stack(shares).mean(), gradient)
        else:
            torch.testing.assert_close(torch.cat(shares) / WORLD, gradient)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one(name: str) -> None:
    expected = outcome(name, None)
    found = [each[name] for each in outcomes()]
    assert all(each["loss"] == pytest.approx(expected["loss"], rel=1e-10) for each in found)
    assert all(gradient.abs().max() > 1e-4 for gradient in expected["gradients"])
    assert_gradients(found, expected["gradients"])


def test_the_sigmoid_loss_has_the_mean_and_the_gradients_of_open_clips_exchange() -> None:
    found = [each["open_clip"] for each in outcomes()]
    expected = outcome("sigmoid", None)
    assert all(each["loss"] == pytest.approx(expected["loss"], rel=1e-10) for each in found)
    assert_gradients(found, expected["gradients"])
