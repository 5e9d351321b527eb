import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cliplab.evaluation import nearest
from cliplab.evaluation.nearest import top_k
from cliplab.evaluation.scoring import CosineScorer, JointScorer
from cliplab.models.composers import Artemis
from tests.evaluation.plain import dot, integers, some, unit


def best(queries: Tensor, gallery: Tensor, excluded: list[list[int]], k: int) -> list[list[int]]:
    """By a loop: excluded rows last, of equal scores the lower row first."""
    found = []
    for query, out in zip(queries, excluded, strict=True):
        scores = [dot(query, row) for row in gallery]
        found.append(sorted(range(len(gallery)), key=lambda j, s=scores, o=out: (j in o, -s[j], j))[:k])
    return found


@pytest.mark.parametrize("blocks", [(1, 1), (4, 7), (1024, 4096)])
@pytest.mark.parametrize("k", [1, 3, 40, 60])
def test_the_best_are_a_loops(blocks: tuple[int, int], k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "BLOCKS", blocks)
    monkeypatch.setattr(nearest, "SPARE", 2)
    torch.manual_seed(k)
    gallery = unit(30, 12)[torch.randint(0, 30, (45,))]  # with copies
    queries = F.normalize(gallery[:9] + 0.3 * torch.randn(9, 12), dim=1)
    excluded = [torch.randperm(45)[: 5 * (q % 3)].tolist() for q in range(9)]
    found = top_k(queries, gallery, k, excluded)
    expected = best(queries, gallery, excluded, min(k, 45))
    for rows, wanted, out in zip(found.tolist(), expected, excluded, strict=True):
        sure = min(k, 45 - len(out))
        assert rows[:sure] == wanted[:sure] and set(rows[sure:]) <= set(out)


def test_what_fp32_can_not_see_is_ordered() -> None:
    """Scores that differ by 1e-12, more of them than a short list holds."""
    gallery = torch.zeros(200, 64, dtype=torch.float64)
    gallery[:, 0] = 0.5 + 1e-12 * torch.randperm(200, generator=torch.Generator().manual_seed(0)).double()
    query = torch.zeros(1, 64, dtype=torch.float64)
    query[0, 0] = 1
    assert torch.equal(top_k(query, gallery, 12)[0], gallery[:, 0].argsort(descending=True)[:12])


def test_equal_scores_come_by_row() -> None:
    gallery = F.normalize(torch.ones(300, 8), dim=1)
    assert top_k(gallery[:2], gallery, 5, [[], [1, 3]]).tolist() == [[0, 1, 2, 3, 4], [0, 2, 4, 5, 6]]


@pytest.mark.parametrize("seed", range(3))
def test_whole_numbers_with_many_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = integers(11, generator), integers(70, generator)
    excluded = [some(q % 4, 70, generator) for q in range(11)]
    assert top_k(queries, gallery, 9, excluded).tolist() == best(queries, gallery, excluded, 9)


def test_no_more_than_there_are() -> None:
    queries, gallery = unit(2, 4), unit(3, 4)
    found = top_k(queries, gallery, 10)
    assert [sorted(rows) for rows in found.tolist()] == [[0, 1, 2]] * 2
    assert top_k(queries, gallery, 10, [[0], []])[0, -1] == 0, "an excluded row comes last"
    assert top_k(queries[:0], gallery, 10).shape == (0, 3)


def test_what_is_not_a_number_comes_last() -> None:
    queries, gallery = unit(3, 4), unit(40, 4)
    gallery[7] = torch.nan
    found = top_k(queries, gallery, 40)
    assert found[:, -1].tolist() == [7] * 3
    assert 7 not in top_k(queries, gallery, 5)


def test_a_joint_score_decides() -> None:
    torch.manual_seed(0)
    artemis, gallery = Artemis(4), unit(6, 4)
    queries = artemis.compose(unit(3, 4), unit(3, 4)).detach()
    expected = artemis.score(queries, gallery).argsort(dim=1, descending=True)
    assert torch.equal(top_k(queries, gallery, 4, scorer=JointScorer(artemis)), expected[:, :4])


def test_most_queries_need_no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(CosineScorer):
        entries = 0

        def block(self, queries: Tensor, gallery: Tensor, out: Tensor | None = None) -> Tensor:
            Counting.entries += len(queries) * len(gallery)
            return super().block(queries, gallery, out)

    torch.manual_seed(0)
    gallery = unit(20_000, 64)
    top_k(unit(50, 64), gallery, 10, scorer=Counting())
    assert Counting.entries < 1.2 * 50 * len(gallery)
