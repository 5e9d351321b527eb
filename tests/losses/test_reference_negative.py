import pytest
import torch
from torch import Tensor

from cliplab.losses import rows
from cliplab.losses.info_nce import info_nce
from cliplab.losses.reference_negative import reference_negative
from tests.losses.features import assert_same, features, number

B, H, D = 6, 3, 5
IDS = [4, 1, 4, 4, 9, 1]


def plain(s: Tensor, own: Tensor, ids: list[int]) -> Tensor:
    """The formula row by row: logits [B, B] against targets and [B, 1 + H] against each row's own negatives."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(B):
        below = sum(torch.exp(s[i, j]) for j in range(B)) + sum(torch.exp(own[i, h]) for h in range(own.shape[1]))
        same = [j for j in range(B) if ids[j] == ids[i]]
        total = total - sum(torch.log(torch.exp(s[i, j]) / below) for j in same) / len(same) / B
    return total


@pytest.mark.parametrize("with_negatives", [False, True])
@pytest.mark.parametrize("ids", [None, IDS])
def test_values_and_gradients_are_those_of_the_formula(with_negatives: bool, ids: list[int] | None) -> None:
    query, target, reference, negatives = features((B, D), (B, D), (B, D), (B, H, D))
    scale = number(4.0)
    given = negatives if with_negatives else None
    target_id = torch.tensor(ids) if ids is not None else None
    found = reference_negative(query, target, scale, reference=reference, negatives=given, target_id=target_id)
    against = [[scale * query[i] @ reference[i]] for i in range(B)]
    for i in range(B if with_negatives else 0):
        against[i] += [scale * query[i] @ negatives[i, h] for h in range(H)]
    own = torch.stack([torch.stack(row) for row in against])
    inputs = (query, target, scale, reference, *((negatives,) if with_negatives else ()))
    assert_same(found, plain(scale * query @ target.T, own, ids or list(range(B))), inputs)


def test_a_reference_that_is_found_costs() -> None:
    query, target, reference = features((B, D), (B, D), (B, D))
    scale = number(20.0)
    one_way = info_nce(query, target, scale, symmetric=False)
    far = reference_negative(query, target, scale, reference=-query)
    torch.testing.assert_close(far, one_way, rtol=1e-6, atol=1e-6)
    assert reference_negative(query, target, scale, reference=query) > one_way + 1
    assert reference_negative(query, target, scale, reference=reference) > one_way


def test_rows_by_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query, target, reference, negatives = features((B, D), (B, D), (B, D), (B, H, D))
    scale = number(4.0)
    expected = reference_negative(query, target, scale, reference=reference, negatives=negatives)
    monkeypatch.setattr(rows, "KEPT", 10)
    monkeypatch.setattr(rows, "CHUNK", 2 * B)
    found = reference_negative(query, target, scale, reference=reference, negatives=negatives)
    assert_same(found, expected, (query, target, scale, reference, negatives))


def test_half_precision_is_computed_in_fp32() -> None:
    given = features((B, D), (B, D), (B, D), dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = reference_negative(given[0], given[1], number(4.0, torch.bfloat16), reference=given[2])
    query, target, reference = (each.double() for each in given)
    expected = reference_negative(query, target, number(4.0), reference=reference)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
