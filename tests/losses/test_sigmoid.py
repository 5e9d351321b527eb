import math

import pytest
import torch
from open_clip.loss import SigLipLoss

from cliplab.losses import rows
from cliplab.losses.sigmoid import sigmoid
from tests.losses.features import assert_same, features, number

B, D = 7, 5
IDS = [4, 1, 4, 4, 9, 1, 0]


def loop(query: torch.Tensor, target: torch.Tensor, scale: float, bias: float, ids: list[int]) -> float:
    """The docstring's formula with Python floats."""
    total = 0.0
    for i, q in enumerate(query.tolist()):
        for j, y in enumerate(target.tolist()):
            z = 1 if ids[i] == ids[j] else -1
            total += math.log(1 + math.exp(-z * (scale * sum(a * b for a, b in zip(q, y, strict=True)) + bias)))
    return total / len(query)


@pytest.mark.parametrize("ids", [None, IDS])
def test_the_value_is_a_loops(ids: list[int] | None) -> None:
    query, target = features((B, D), (B, D))
    given = torch.tensor(ids) if ids is not None else None
    loss = sigmoid(query, target, number(9.0), bias=number(-3.0), target_id=given)
    assert loss.shape == () and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(loop(query, target, 9.0, -3.0, ids or list(range(B))), rel=1e-12)


def test_values_and_gradients_are_open_clips() -> None:
    query, target = features((B, D), (B, D))
    scale, bias = number(9.0), number(-3.0)
    expected = SigLipLoss()(query, target, scale, bias)
    assert_same(sigmoid(query, target, scale, bias=bias), expected, (query, target, scale, bias))


def test_the_gradients_with_equal_targets_are_those_of_the_formula() -> None:
    query, target = features((B, D), (B, D))
    scale, bias, ids = number(9.0), number(-3.0), torch.tensor(IDS)
    z = torch.where(ids[:, None] == ids, 1.0, -1.0).double()
    expected = torch.log1p(torch.exp(-z * (scale * query @ target.T + bias))).sum() / B
    found = sigmoid(query, target, scale, bias=bias, target_id=ids)
    assert_same(found, expected, (query, target, scale, bias))


def test_rows_by_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query, target = features((B, D), (B, D))
    scale, bias, ids = number(9.0), number(-3.0), torch.tensor(IDS)
    expected = sigmoid(query, target, scale, bias=bias, target_id=ids)
    monkeypatch.setattr(rows, "KEPT", 10)
    monkeypatch.setattr(rows, "CHUNK", 2 * B)
    found = sigmoid(query, target, scale, bias=bias, target_id=ids)
    assert_same(found, expected, (query, target, scale, bias))


def test_a_joint_score_replaces_the_cosine() -> None:
    query, target = features((B, D), (B, D))
    scale, bias = number(9.0), number(-3.0)
    found = sigmoid(query, target, scale, lambda q, y: (q @ y.T) ** 2, bias=bias)
    logits = scale * (query @ target.T) ** 2 + bias
    z = 2 * torch.eye(B, dtype=torch.float64) - 1
    assert_same(found, torch.log1p(torch.exp(-z * logits)).sum() / B, (query, target, scale, bias))


def test_half_precision_is_computed_in_fp32() -> None:
    query, target = features((B, D), (B, D), dtype=torch.bfloat16)
    scale, bias = number(9.0, torch.bfloat16), number(-3.0, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sigmoid(query, target, scale, bias=bias)
    exact = [each.detach().double() for each in (query, target, scale, bias)]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(SigLipLoss()(*exact).item(), rel=1e-5)
