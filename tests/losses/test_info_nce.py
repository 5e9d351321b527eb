import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from cliplab.losses import rows
from cliplab.losses.info_nce import cosine_scores, info_nce

B, D = 7, 5


def make_features(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, target = (F.normalize(torch.randn(B, D, dtype=torch.float64), dim=-1).to(dtype) for _ in range(2))
    scale = torch.tensor(9.0, dtype=dtype)
    return query.requires_grad_(), target.requires_grad_(), scale.requires_grad_()


def loop(scores: list[list[float]], scale: float, symmetric: bool) -> float:
    """The docstring's formula with Python floats."""

    def row_loss(rows: list[list[float]]) -> float:
        terms = [math.log(sum(math.exp(scale * s) for s in row)) - scale * row[i] for i, row in enumerate(rows)]
        return sum(terms) / len(terms)

    columns = [list(column) for column in zip(*scores, strict=True)]
    return (row_loss(scores) + row_loss(columns)) / 2 if symmetric else row_loss(scores)


def dots(query: Tensor, target: Tensor) -> list[list[float]]:
    return [[sum(a * b for a, b in zip(q, y, strict=True)) for y in target.tolist()] for q in query.tolist()]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_value_is_a_loops(symmetric: bool) -> None:
    query, target, scale = make_features()
    loss = info_nce(query, target, scale, symmetric=symmetric)
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert loss.item() == pytest.approx(loop(dots(query, target), 9.0, symmetric), rel=1e-12)


def test_the_symmetric_form_is_open_clips() -> None:
    query, target, scale = make_features()
    loss, expected = info_nce(query, target, scale), ClipLoss()(query, target, scale)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, (query, target, scale))
    torch.testing.assert_close(found, torch.autograd.grad(expected, (query, target, scale)))


def test_the_one_way_gradients_by_hand() -> None:
    query, target, scale = make_features()
    info_nce(query, target, scale, symmetric=False).backward()
    scores = torch.tensor(dots(query, target), dtype=torch.float64)
    surplus = (torch.softmax(9 * scores, dim=1) - torch.eye(B, dtype=torch.float64)) / B  # d loss / d logits
    torch.testing.assert_close(query.grad, 9 * surplus @ target.detach())
    torch.testing.assert_close(target.grad, 9 * surplus.T @ query.detach())
    torch.testing.assert_close(scale.grad, (surplus * scores).sum())


def test_the_two_directions_differ() -> None:
    query, target, scale = make_features()
    one_way = info_nce(query, target, scale, symmetric=False)
    assert abs(one_way - info_nce(query, target, scale)) > 1e-3
    other_way = info_nce(target, query, scale, symmetric=False)
    torch.testing.assert_close(info_nce(query, target, scale), (one_way + other_way) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype, autocast: bool) -> None:
    query, target, scale = make_features(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = info_nce(query, target, scale)
    exact = [each.detach().double().requires_grad_() for each in (query, target, scale)]
    expected = ClipLoss()(*exact)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    assert query.grad is not None and query.grad.dtype == dtype
    torch.testing.assert_close(query.grad.double(), exact[0].grad, rtol=0.01, atol=1e-4)


def test_fp32_features_stay_fp32_under_autocast() -> None:
    query, target, scale = make_features(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(query, target, scale)
    assert loss.item() == info_nce(query, target, scale).item()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_joint_score_replaces_the_cosine(symmetric: bool) -> None:
    torch.manual_seed(1)
    query, target, scale = make_features()
    pairs = torch.stack([query, torch.randn(B, D, dtype=torch.float64)], dim=1)
    weight = nn.Parameter(torch.randn(D, D, dtype=torch.float64))

    def score(queries: Tensor, gallery: Tensor) -> Tensor:
        return queries[:, 0] @ weight @ gallery.T + queries[:, 1] @ (gallery**2).T

    loss = info_nce(pairs, target, scale, score, symmetric=symmetric)
    rows = [[(q[0] @ weight @ y + q[1] @ y**2).item() for y in target] for q in pairs]
    assert loss.item() == pytest.approx(loop(rows, 9.0, symmetric), rel=1e-12)
    loss.backward()
    assert weight.grad is not None and weight.grad.any()


def test_a_joint_score_is_computed_in_fp32_under_autocast() -> None:
    query, target, scale = make_features(torch.bfloat16)
    seen: list[torch.dtype] = []

    def score(queries: Tensor, gallery: Tensor) -> Tensor:
        seen.extend((queries.dtype, gallery.dtype, cosine_scores(queries, gallery).dtype))
        return cosine_scores(queries, gallery)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        info_nce(query, target, scale, score)
    assert seen == [torch.float32] * 3


def test_cosine_scores() -> None:
    query, target, _ = make_features()
    torch.testing.assert_close(
        cosine_scores(query, target[:4]), torch.tensor(dots(query, target[:4]), dtype=torch.float64)
    )


# Equal targets as positives

IDS = [4, 1, 4, 4, 9, 1, 0]


def shared_mass(scores: list[list[float]], scale: float, symmetric: bool) -> float:
    """The docstring's formula with Python floats."""

    def row_loss(rows: list[list[float]]) -> float:
        total = 0.0
        for i, row in enumerate(rows):
            log_sum = math.log(sum(math.exp(scale * s) for s in row))
            same = [j for j in range(len(row)) if IDS[j] == IDS[i]]
            total -= sum(scale * row[j] - log_sum for j in same) / len(same)
        return total / len(rows)

    columns = [list(column) for column in zip(*scores, strict=True)]
    return (row_loss(scores) + row_loss(columns)) / 2 if symmetric else row_loss(scores)


@pytest.mark.parametrize("symmetric", [True, False])
def test_equal_targets_share_the_mass_as_in_a_loop(symmetric: bool) -> None:
    query, target, scale = make_features()
    loss = info_nce(query, target, scale, symmetric=symmetric, target_id=torch.tensor(IDS))
    assert loss.item() == pytest.approx(shared_mass(dots(query, target), 9.0, symmetric), rel=1e-12)
    assert abs(loss - info_nce(query, target, scale, symmetric=symmetric)) > 0.1


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradients_with_equal_targets_are_a_loops(symmetric: bool) -> None:
    """Central differences of the loop, entry by entry."""
    inputs = make_features()
    found = torch.autograd.grad(info_nce(*inputs, symmetric=symmetric, target_id=torch.tensor(IDS)), inputs)
    step = 1e-6
    for tensor, gradient in zip(inputs, found, strict=True):
        flat, expected = tensor.detach().view(-1), torch.empty(tensor.numel(), dtype=torch.float64)
        for entry in range(len(flat)):
            values = []
            for sign in (1, -1):
                flat[entry] += sign * step
                values.append(shared_mass(dots(inputs[0], inputs[1]), inputs[2].item(), symmetric))
                flat[entry] -= sign * step
            expected[entry] = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(gradient.view(-1), expected, rtol=1e-6, atol=1e-8)


def test_different_targets_are_the_plain_loss() -> None:
    query, target, scale = make_features()
    loss = info_nce(query, target, scale, target_id=torch.arange(B).flip(0))
    torch.testing.assert_close(loss, info_nce(query, target, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_targets_are_computed_in_fp32(dtype: torch.dtype) -> None:
    query, target, scale = make_features(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(query, target, scale, target_id=torch.tensor(IDS))
    exact = [each.detach().double() for each in (query, target, scale)]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(shared_mass(dots(exact[0], exact[1]), 9.0, True), rel=1e-5)


class TestByChunks:
    """More logits than are kept: rows and columns in chunks."""

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("with_ids", [True, False])
    @pytest.mark.parametrize("chunk", [1, 3 * B, 1000])
    def test_values_and_gradients_are_those_of_one_piece(
        self, symmetric: bool, with_ids: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ids = torch.tensor([0, 1, 0, 2, 3, 1, 0]) if with_ids else None
        query, target, scale = make_features()
        loss = info_nce(query, target, scale, symmetric=symmetric, target_id=ids)
        expected = torch.autograd.grad(loss, (query, target, scale))
        monkeypatch.setattr(rows, "KEPT", 10)
        monkeypatch.setattr(rows, "CHUNK", chunk)
        largest = []

        def score(query: Tensor, target: Tensor) -> Tensor:
            largest.append(len(query) * len(target))
            return query @ target.T

        chunked = info_nce(query, target, scale, score, symmetric=symmetric, target_id=ids)
        torch.testing.assert_close(chunked, loss)
        torch.testing.assert_close(torch.autograd.grad(chunked, (query, target, scale)), expected)
        assert max(largest) <= max(chunk, B)

    def test_a_large_batch_in_half_precision_is_computed_in_fp32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        query, target, scale = make_features(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = info_nce(query, target, scale)
            monkeypatch.setattr(rows, "KEPT", 10)
            monkeypatch.setattr(rows, "CHUNK", 2 * B)
            chunked = info_nce(query, target, scale)
        assert chunked.dtype == torch.float32
        torch.testing.assert_close(chunked, loss, rtol=1e-6, atol=0)
        grads = torch.autograd.grad(loss, (query, target)), torch.autograd.grad(chunked, (query, target))
        torch.testing.assert_close(*grads, rtol=2**-7, atol=2**-9)
