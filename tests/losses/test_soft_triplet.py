import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cliplab.errors import UserError
from cliplab.losses.soft_triplet import draw_negatives, soft_triplet
from tests.losses.features import assert_same, features, number

module = sys.modules["cliplab.losses.soft_triplet"]  # the package has a function of the same name
B, D = 5, 4
IDS = [4, 1, 4, 9, 0]


def plain(query: Tensor, target: Tensor, scale: Tensor, negatives: list[list[int]]) -> Tensor:
    """The formula triplet by triplet, from squared distances of the scaled vectors."""
    f = torch.sqrt(scale) * torch.cat([query, target])
    terms = []
    for anchor, chosen in enumerate(negatives):
        partner = (anchor + B) % (2 * B)
        for negative in chosen:
            near, far = ((f[anchor] - f[other]).pow(2).sum() for other in (partner, negative))
            terms.append(torch.log(1 + torch.exp(near - far)))
    return torch.stack(terms).mean()


def unit(raw: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Distances and cosines have the same gradients on the sphere alone: the vectors behind it are compared."""
    query, target = (F.normalize(3 * each, dim=-1) for each in raw)
    return query, target


def others(ids: list[int]) -> list[list[int]]:
    doubled = [*ids, *ids]
    return [[k for k in range(2 * B) if doubled[k] != doubled[a]] for a in range(2 * B)]


@pytest.mark.parametrize("ids", [None, IDS])
def test_with_all_negatives_it_is_the_mean_over_all_triplets(ids: list[int] | None) -> None:
    raw = features((B, D), (B, D))
    query, target = unit(raw)
    scale = number(3.0)
    given = torch.tensor(ids) if ids is not None else None
    found = soft_triplet(query, target, scale, negatives_drawn=100, target_id=given)
    assert_same(found, plain(query, target, scale, others(ids or list(range(B)))), (*raw, scale))


def test_the_drawn_triplets_count_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = features((B, D), (B, D))
    query, target = unit(raw)
    scale = number(3.0)
    drawn = [[(anchor + step) % (2 * B) for step in (1, 2, 3)] for anchor in range(2 * B)]
    kept = torch.ones(2 * B, 3, dtype=torch.bool)
    kept[0, 1:] = False  # anchor 0 has one negative alone
    asked: list[int] = []

    def draw(ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
        asked.append(count)
        assert ids.tolist() == [*range(B), *range(B)]
        return torch.tensor(drawn), kept

    monkeypatch.setattr(module, "draw_negatives", draw)
    found = soft_triplet(query, target, scale)
    assert asked == [3]
    assert_same(found, plain(query, target, scale, [drawn[0][:1], *drawn[1:]]), (*raw, scale))


def test_negatives_are_of_other_pairs_all_different_and_all_drawn_in_time() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([4, 1, 4, 9, 0] * 2)
    seen: set[tuple[int, int]] = set()
    for _ in range(60):
        places, are_negatives = draw_negatives(ids, 3)
        assert places.shape == (10, 3) and are_negatives.all()
        assert (ids[places] != ids[:, None]).all()
        assert all(len(set(row)) == 3 for row in places.tolist())
        seen |= {(anchor, place) for anchor, row in enumerate(places.tolist()) for place in row}
    assert seen == {(a, k) for a in range(10) for k in range(10) if ids[a] != ids[k]}


def test_fewer_negatives_than_asked_are_marked() -> None:
    places, are_negatives = draw_negatives(torch.tensor([0, 1, 0, 1, 0]), 3)
    assert are_negatives.sum(dim=1).tolist() == [2, 3, 2, 3, 2] and places.shape == (5, 3)
    query, target = features((3, D), (3, D))
    alone = soft_triplet(query, target, number(3.0), target_id=torch.tensor([7, 7, 7]))
    assert alone.item() == 0 and torch.isfinite(torch.autograd.grad(alone, query)[0]).all()


def test_half_precision_is_computed_in_fp32() -> None:
    query, target = features((B, D), (B, D), dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = soft_triplet(query, target, number(3.0, torch.bfloat16), negatives_drawn=100)
    expected = plain(query.double(), target.double(), number(3.0), others(list(range(B))))
    # Unit vectors in bf16 are not quite of unit length, which the distances of the plain form see.
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-2)


@pytest.mark.parametrize(("batch", "drawn"), [(1, 3), (4, 0)])
def test_what_cannot_be_is_refused(batch: int, drawn: int) -> None:
    query, target = features((batch, D), (batch, D))
    with pytest.raises(UserError, match=r"'soft_triplet' needs negatives_drawn of 1 or more and a batch of 2"):
        soft_triplet(query, target, number(3.0), negatives_drawn=drawn)
