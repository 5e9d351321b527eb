import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from cliplab.losses.gather import gather
from cliplab.losses.info_nce import info_nce
from tests.processes import in_processes

B, INPUT, D = 3, 6, 4  # rows per process
FORMS = {"symmetric": True, "one_way": False}
WAYS = [(2, "by hand"), (2, "joint score"), (2, "ddp"), (3, "by hand"), (3, "joint score")]  # ddp imports for seconds


class Towers(nn.Module):
    """Two linear encoders and a temperature; optionally a score with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.target = nn.Linear(INPUT, D).double(), nn.Linear(INPUT, D).double()
        self.bilinear = nn.Parameter(torch.randn(D, D, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, queries: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, target = F.normalize(self.query(queries), dim=-1), F.normalize(self.target(targets), dim=-1)
        return query, target, self.log_scale.exp()

    def score(self, query: Tensor, target: Tensor) -> Tensor:
        return query @ self.bilinear @ target.T


def joint_batch(world: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    queries, targets = (torch.randn(world * B, INPUT, generator=generator, dtype=torch.float64) for _ in range(2))
    return queries, targets


def cross_entropy(scores: Tensor, symmetric: bool) -> Tensor:
    """One process, the joint batch, no code of ours."""
    rows = -scores.log_softmax(dim=1).diagonal().mean()
    return (rows - scores.log_softmax(dim=0).diagonal().mean()) / 2 if symmetric else rows


def gradients(towers: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in towers.named_parameters() if parameter.grad is not None}


def target_ids(world: int) -> Tensor:
    """Equal ones within a process and across processes."""
    return torch.arange(world * B) % 4


def shared_mass(scores: Tensor, ids: Tensor) -> Tensor:
    """One process, the joint batch: the mean of log p over the positives of each row, of rows and columns."""
    losses = []
    for log_p in (scores.log_softmax(dim=1), scores.log_softmax(dim=0).T):
        losses += [-log_p[i][ids == ids[i]].mean() for i in range(len(ids))]
    return torch.stack(losses).mean()


def with_positives(ours: tuple[Tensor, Tensor], ids: Tensor) -> dict[str, Any]:
    """As `by_hand`, with equal targets as positives."""
    towers = Towers()
    loss = info_nce(*towers(*ours), target_id=ids)
    loss.backward()
    found = gradients(towers)
    for gradient in found.values():
        distributed.all_reduce(gradient)
        gradient /= distributed.get_world_size()
    return {"loss": loss.item(), "gradients": found}


def by_hand(ours: tuple[Tensor, Tensor], symmetric: bool, joint_score: bool) -> dict[str, Any]:
    """A step without DistributedDataParallel, the gradients reduced to their mean as it does."""
    towers = Towers()
    query, target, scale = towers(*ours)
    score = {"score": towers.score} if joint_score else {}
    loss = info_nce(query, target, scale, symmetric=symmetric, **score)
    loss.backward()
    found = gradients(towers)
    for gradient in found.values():
        distributed.all_reduce(gradient)
        gradient /= distributed.get_world_size()
    return {"loss": loss.item(), "gradients": found}


def with_ddp(ours: tuple[Tensor, Tensor], symmetric: bool) -> dict[str, Any]:
    towers = Towers()
    towers.bilinear.requires_grad_(False)
    wrapped = DistributedDataParallel(towers)
    query, target, scale = wrapped(*ours)
    loss = info_nce(query, target, scale, symmetric=symmetric)
    loss.backward()
    return {"loss": loss.item(), "gradients": gradients(towers)}


def shared_gradient() -> tuple[Tensor, Tensor]:
    """The gradients of x and w in sum((gather(x) + w)^2): both get the same tensor, which gather must not change."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    x = torch.full((2,), float(rank + 1), requires_grad=True)
    w = torch.zeros(2 * world, requires_grad=True)
    other = w * 1
    (gather(x) + other).pow(2).sum().backward()
    assert x.grad is not None and w.grad is not None
    return x.grad, w.grad


def step(rank: int, world: int) -> dict[str, Any]:
    queries, targets = joint_batch(world)
    ours = (queries[rank * B : (rank + 1) * B], targets[rank * B : (rank + 1) * B])
    found: dict[str, Any] = {"gathered": gather(ours[0][:, :2].T.contiguous().T), "shared": shared_gradient()}
    found["positives"] = with_positives(ours, target_ids(world)[rank * B : (rank + 1) * B])
    for form, symmetric in FORMS.items():
        found[f"{form} by hand"] = by_hand(ours, symmetric, joint_score=False)
        found[f"{form} joint score"] = by_hand(ours, symmetric, joint_score=True)
        if world == 2:
            found[f"{form} ddp"] = with_ddp(ours, symmetric)
    return found


@functools.cache
def outcomes(world: int) -> list[dict[str, Any]]:
    """By rank; the processes run once for all tests."""
    return in_processes(step, world, world)


@pytest.mark.parametrize(("world", "way"), WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_one_process(world: int, way: str, form: str) -> None:
    towers = Towers()
    query, target, scale = towers(*joint_batch(world))
    scores = towers.score(query, target) if way == "joint score" else query @ target.T
    loss = cross_entropy(scale * scores, FORMS[form])
    loss.backward()
    expected = gradients(towers)
    for outcome in outcomes(world):
        assert outcome[f"{form} {way}"]["loss"] == pytest.approx(loss.item(), rel=1e-10)
        given = outcome[f"{form} {way}"]["gradients"]
        assert given.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 1e-3, name
            torch.testing.assert_close(given[name], gradient, rtol=1e-6, atol=1e-12, msg=name)


@pytest.mark.parametrize("world", [2, 3])
def test_equal_targets_of_other_processes_are_positives(world: int) -> None:
    towers = Towers()
    query, target, scale = towers(*joint_batch(world))
    loss = shared_mass(scale * query @ target.T, target_ids(world))
    loss.backward()
    expected = gradients(towers)
    for outcome in outcomes(world):
        assert outcome["positives"]["loss"] == pytest.approx(loss.item(), rel=1e-10)
        for name, gradient in expected.items():
            assert gradient.abs().max() > 1e-3, name
            torch.testing.assert_close(outcome["positives"]["gradients"][name], gradient, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("world", [2, 3])
def test_rows_come_in_rank_order(world: int) -> None:
    queries, _ = joint_batch(world)
    assert all(torch.equal(outcome["gathered"], queries[:, :2]) for outcome in outcomes(world))


@pytest.mark.parametrize("world", [2, 3])
def test_the_backward_pass_leaves_the_incoming_gradient_alone(world: int) -> None:
    gathered = torch.arange(1.0, world + 1).repeat_interleave(2)
    for rank, outcome in enumerate(outcomes(world)):
        x, w = outcome["shared"]
        torch.testing.assert_close(x, world * 2 * gathered[2 * rank : 2 * rank + 2])
        torch.testing.assert_close(w, 2 * gathered)


def test_one_process_gathers_itself() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert gather(x) is x
