import math

import pytest
import torch
from torch import Tensor

from cliplab.errors import UserError
from cliplab.losses.hard_negative_nce import hard_negative_nce
from cliplab.losses.info_nce import info_nce
from tests.losses.features import assert_same, features, number

B, D = 6, 5


def plain(s: Tensor, alpha: float, beta: float, released: bool) -> Tensor:
    """The formula entry by entry, exponentials and all; columns are the rows of the transpose."""
    total = torch.zeros((), dtype=torch.float64)
    for matrix, transposed in ((s, released), (s.T, False)):
        sums = [sum(torch.exp(beta * matrix[i, k]) for k in range(B) if k != i) for i in range(B)]
        for i in range(B):
            denominator = alpha * torch.exp(matrix[i, i])
            for j in range(B):
                if j != i:
                    weight = (B - 1) * torch.exp(beta * matrix[i, j]) / sums[j if transposed else i]
                    denominator = denominator + weight * torch.exp(matrix[i, j])
            total = total + (torch.log(denominator) - matrix[i, i]) / B
    return total


def covr(s: Tensor, alpha: float, beta: float) -> Tensor:
    """In whole matrices as the method's code has it: the row sums [B] are broadcast along the columns."""
    weighted = torch.exp(beta * s)
    own = torch.exp(beta * s.diagonal())
    eye = torch.eye(B, dtype=torch.float64)
    w_rows = (B - 1) * weighted / (weighted.sum(dim=1) - own) * (1 - eye) + alpha * eye
    w_columns = (B - 1) * weighted / (weighted.sum(dim=0) - own) * (1 - eye) + alpha * eye
    rows = torch.log((torch.exp(s) * w_rows).sum(dim=1)) - s.diagonal()
    columns = torch.log((torch.exp(s) * w_columns).sum(dim=0)) - s.diagonal()
    return rows.mean() + columns.mean()


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.5), (0.3, 0.0), (2.0, 1.5), (0.0, 0.5)])
@pytest.mark.parametrize("released", [False, True])
def test_values_and_gradients_are_those_of_the_formula(alpha: float, beta: float, released: bool) -> None:
    query, target = features((B, D), (B, D))
    scale = number(4.0)
    found = hard_negative_nce(query, target, scale, alpha=alpha, beta=beta, released=released)
    assert_same(found, plain(scale * query @ target.T, alpha, beta, released), (query, target, scale))


def test_the_released_form_is_the_one_with_the_transposed_broadcast() -> None:
    query, target = features((B, D), (B, D))
    scale = number(4.0)
    found = hard_negative_nce(query, target, scale, alpha=0.7, beta=0.5, released=True)
    assert_same(found, covr(scale * query @ target.T, 0.7, 0.5), (query, target, scale))
    assert abs(found - hard_negative_nce(query, target, scale, alpha=0.7, beta=0.5)) > 1e-2


def test_equal_weights_are_twice_info_nce() -> None:
    query, target = features((B, D), (B, D))
    found = hard_negative_nce(query, target, number(4.0), alpha=1, beta=0)
    torch.testing.assert_close(found, 2 * info_nce(query, target, number(4.0)))


def test_large_logits_stay_finite() -> None:
    query, target = features((B, D), (B, D), dtype=torch.float32)
    found = hard_negative_nce(query, target, number(100.0, torch.float32), beta=2.0)
    exact = hard_negative_nce(query.double(), target.double(), number(100.0), beta=2.0)
    assert math.isfinite(found.item()) and found.item() == pytest.approx(exact.item(), rel=1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(found, (query, target)))


def test_a_joint_score_replaces_the_cosine() -> None:
    query, target = features((B, D), (B, D))
    found = hard_negative_nce(query, target, number(4.0), lambda q, y: (q @ y.T) ** 2)
    torch.testing.assert_close(found, plain(4 * (query @ target.T) ** 2, 1.0, 0.5, False))


def test_half_precision_is_computed_in_fp32() -> None:
    query, target = features((B, D), (B, D), dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = hard_negative_nce(query, target, number(4.0, torch.bfloat16))
    expected = plain(4 * query.double() @ target.double().T, 1.0, 0.5, False)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("batch", "options"), [(1, {}), (3, {"alpha": -1.0}), (3, {"beta": -0.1})])
def test_what_cannot_be_is_refused(batch: int, options: dict[str, float]) -> None:
    query, target = features((batch, D), (batch, D))
    with pytest.raises(UserError, match=r"'hard_negative_nce' needs a batch of 2 or more .*alpha and beta"):
        hard_negative_nce(query, target, number(4.0), **options)
