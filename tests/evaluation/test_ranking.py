import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cliplab.errors import UserError
from cliplab.evaluation.ranking import Ranks, rank_positives, top_k
from cliplab.evaluation.scoring import CosineScorer, JointScorer
from cliplab.models.composers import Artemis

BLOCKS = [(1, 1), (3, 5), (7, 100), (100, 7), (1024, 8192)]
Score = Callable[[Tensor, Tensor], float]
Rows = Sequence[Sequence[int]]


def dot(query: Tensor, target: Tensor) -> float:
    """Rounded once, at the end."""
    return math.fsum(a * b for a, b in zip(query.tolist(), target.tolist(), strict=True))


def loop(
    queries: Tensor, gallery: Tensor, positives: Rows, excluded: Rows, score: Score = dot, tie: float = 0.0
) -> tuple[list[int], list[int]]:
    """Pessimistic ranks and numbers of ties, one comparison after the other."""
    ranks, all_ties = [], []
    for q, query in enumerate(queries):
        scores = [score(query, target) for target in gallery]
        best = max((scores[p] for p in positives[q]), key=lambda s: math.inf if math.isnan(s) else s)
        others = [s for j, s in enumerate(scores) if j not in positives[q] and j not in excluded[q]]
        ties = sum(abs(s - best) <= tie for s in others)
        ahead = sum(not s < best and not abs(s - best) <= tie for s in others)  # also what is not a number
        ranks.append(1 + ahead + ties)
        all_ties.append(ties)
    return ranks, all_ties


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def make_case(seed: int = 0) -> tuple[Tensor, Tensor, list[list[int]], list[list[int]]]:
    """Several positives per query; the gallery holds exact copies of them and of others; some rows are excluded."""
    torch.manual_seed(seed)
    gallery = unit(40, 12)
    positives = [torch.randperm(40)[: 1 + q % 3].tolist() for q in range(23)]
    queries = F.normalize(gallery[[p[0] for p in positives]] + 0.35 * torch.randn(23, 12), dim=-1)
    gallery = gallery[torch.cat([torch.arange(40), torch.randint(0, 40, (25,))])]  # the last 25 are copies
    excluded = [[j for j in torch.randperm(65)[: 2 * (q % 8)].tolist() if j not in positives[q]] for q in range(23)]
    order = torch.randperm(65)
    place = order.argsort().tolist()
    moved = [[[place[row] for row in rows] for rows in each] for each in (positives, excluded)]
    return queries, gallery[order], moved[0], moved[1]


@pytest.mark.parametrize("seed", range(3))
def test_ranks_and_ties_are_a_loops_at_every_block_size(seed: int) -> None:
    queries, gallery, positives, excluded = make_case(seed)
    ranks, ties = loop(queries, gallery, positives, excluded)
    assert max(ties) >= 1 and len(set(ranks)) > 5, "the case must be worth it"
    assert loop(queries, gallery, positives, [[]] * len(queries))[0] != ranks
    for query_block, gallery_block in BLOCKS:
        found = rank_positives(queries, gallery, positives, excluded, blocks=(query_block, gallery_block))
        assert found.pessimistic.tolist() == ranks, (query_block, gallery_block)
        assert found.ties.tolist() == ties, (query_block, gallery_block)
    assert found.pessimistic.dtype == found.ties.dtype == torch.int64


def test_copies_tie_at_every_block_size_among_many() -> None:
    torch.manual_seed(0)
    gallery, copies = unit(3000, 64), 40
    gallery[1000 : 1000 + copies] = gallery[:copies]
    queries = F.normalize(gallery[:copies] + 0.05 * torch.randn(copies, 64), dim=-1)
    positives = [[q] for q in range(copies)]
    for query_block, gallery_block in ((40, 1), (1, 977), (3, 77), (1024, 8192)):
        found = rank_positives(queries, gallery, positives, blocks=(query_block, gallery_block))
        assert found.ties.tolist() == [1] * copies
        assert found.pessimistic.tolist() == [2] * copies


def test_the_order_of_the_gallery_does_not_matter() -> None:
    queries, gallery, positives, excluded = make_case()
    expected = rank_positives(queries, gallery, positives, excluded)
    order = torch.randperm(len(gallery))
    place = order.argsort().tolist()
    moved = [[[place[row] for row in rows] for rows in each] for each in (positives, excluded)]
    found = rank_positives(queries, gallery[order], *moved)
    assert torch.equal(found.pessimistic, expected.pessimistic) and torch.equal(found.ties, expected.ties)


@pytest.mark.parametrize("nan_rows", [[3], [3, 9, 30]])
def test_what_is_not_a_number_counts_against_the_target(nan_rows: list[int]) -> None:
    queries, gallery, _, excluded = make_case()
    gallery[nan_rows] = torch.nan
    positives = [[q % 65, (q + 1) % 65] for q in range(len(queries))]
    excluded = [[j for j in rows if j not in p] for rows, p in zip(excluded, positives, strict=True)]
    queries[5] = torch.nan
    ranks, ties = loop(queries, gallery, positives, excluded)
    candidates = [65 - len({*p, *e}) for p, e in zip(positives, excluded, strict=True)]
    for row in (2, 3, 5):  # a positive that is none, another one, a query that is none
        assert ranks[row] == 1 + candidates[row]
    for query_block, gallery_block in BLOCKS:
        found = rank_positives(queries, gallery, positives, excluded, blocks=(query_block, gallery_block))
        assert found.pessimistic.tolist() == ranks and found.ties.tolist() == ties


def test_constant_features_give_the_worst_rank() -> None:
    same = F.normalize(torch.ones(1, 5), dim=-1)
    excluded = [[9], [], [7, 8]]
    found = rank_positives(same.expand(3, 5), same.expand(10, 5), [[0], [1, 2], [3]], excluded)
    assert found.under("pessimistic").tolist() == [9, 9, 8]
    assert found.under("optimistic").tolist() == [1, 1, 1]
    assert found.under("mean").tolist() == [5, 5, 4.5]
    assert found.ties.tolist() == [8, 8, 7]


def test_near_ties_that_fp32_can_not_see() -> None:
    torch.manual_seed(0)
    query = unit(64)
    query[0] = 1e-3
    target = unit(64)
    target[0] = 1e-3
    ahead, behind = target.clone(), target.clone()
    ahead[0] = torch.nextafter(target[0], torch.tensor(1.0))  # the score changes by 1e-13
    behind[0] = torch.nextafter(target[0], torch.tensor(0.0))
    gallery = torch.stack([behind, target, ahead, target])
    assert len(set((query @ gallery.T).tolist())) == 1, "the case must be worth it"
    for block in (1, 2, 4):
        found = rank_positives(query.expand(3, 64), gallery, [[0], [1], [2]], blocks=(1024, block))
        assert found.pessimistic.tolist() == [4, 3, 1]
        assert found.ties.tolist() == [0, 1, 0]


def test_nothing_but_positives_is_rank_one() -> None:
    found = rank_positives(unit(1, 4), unit(3, 4), [[0, 2]], [[1]])
    assert found.pessimistic.tolist() == [1] and found.ties.tolist() == [0]


def test_no_queries_and_no_positives() -> None:
    empty = rank_positives(torch.empty(0, 4), unit(3, 4), [])
    assert len(empty.pessimistic) == len(empty.ties) == 0
    with pytest.raises(UserError, match="query 1 has no positive"):
        rank_positives(unit(2, 4), unit(3, 4), [[0], []])
    with pytest.raises(AssertionError, match="one list of positives per query"):
        rank_positives(unit(2, 4), unit(3, 4), [[0]])


def test_ranks_under_a_rule() -> None:
    ranks = Ranks(torch.tensor([4, 1]), torch.tensor([3, 0]))
    assert ranks.under("pessimistic").tolist() == [4, 1]
    assert ranks.under("mean").tolist() == [2.5, 1]
    assert ranks.under("optimistic").tolist() == [1, 1]
    assert ranks.under("mean").dtype == torch.float64


@pytest.mark.parametrize("width", [1, 5, 8, 512, 768])
def test_exact_pairs_do_not_depend_on_their_number(width: int) -> None:
    torch.manual_seed(0)
    queries, gallery = unit(50, width), unit(50, width)
    scores = CosineScorer().pairs(queries, gallery)
    assert scores.dtype == torch.float64
    alone = [CosineScorer().pairs(queries[n : n + 1], gallery[n : n + 1]).item() for n in range(50)]
    assert scores.tolist() == alone
    assert alone == pytest.approx([dot(q, y) for q, y in zip(queries, gallery, strict=True)], abs=1e-15)


class TestJointScorer:
    @pytest.fixture
    def artemis(self) -> Artemis:
        torch.manual_seed(0)
        artemis = Artemis(8)
        with torch.no_grad():
            for parameter in artemis.parameters():
                parameter += 0.5 * torch.randn_like(parameter)
        return artemis

    def test_ranks_are_a_loops(self, artemis: Artemis) -> None:
        queries, gallery = artemis.compose(unit(9, 8), unit(9, 8)).detach(), unit(30, 8)
        gallery[20:] = gallery[:10]
        positives = [[q, 11 + q] for q in range(9)]
        excluded = [[25, 19][: q % 3] for q in range(9)]
        exact = Artemis(8).double()
        exact.load_state_dict(artemis.state_dict())

        def score(query: Tensor, target: Tensor) -> float:
            """EM + IS of the paper, one pair at a time in float64."""
            r, m = query.double()
            y = target.double()
            explicit = F.normalize(exact.transform(m), dim=0) @ F.normalize(exact.attention_em(m) * y, dim=0)
            weight = exact.attention_is(m)
            return (explicit + F.normalize(weight * r, dim=0) @ F.normalize(weight * y, dim=0)).item()

        ranks, ties = loop(queries, gallery, positives, excluded, score, tie=1e-12)
        assert max(ties) == 1 and len(set(ranks)) > 3, "the case must be worth it"
        for query_block, gallery_block in BLOCKS:
            found = rank_positives(
                queries, gallery, positives, excluded, JointScorer(artemis), (query_block, gallery_block)
            )
            assert found.pessimistic.tolist() == ranks and found.ties.tolist() == ties

    def test_pairs_are_scored_in_float64_by_a_copy(self, artemis: Artemis) -> None:
        artemis.train()
        queries, gallery = artemis.compose(unit(5, 8), unit(5, 8)).detach(), unit(5, 8)
        scores = JointScorer(artemis).pairs(queries, gallery)
        expected = Artemis(8).double()
        expected.load_state_dict(artemis.state_dict())
        table = expected.score(queries.double(), gallery.double())
        torch.testing.assert_close(scores, table.diagonal().detach(), rtol=1e-13, atol=1e-13)
        assert artemis.training and artemis.transform.weight.dtype == torch.float32, "the model itself is untouched"


class TestTopK:
    def test_the_best_come_first_and_excluded_ones_do_not(self) -> None:
        queries, gallery, _, excluded = make_case()
        gallery = unit(30, 12)
        excluded = [[j for j in rows if j < 30] for rows in excluded]
        found = top_k(queries, gallery, 10, excluded).tolist()
        for q, rows in enumerate(found):
            scores = {j: dot(queries[q], gallery[j]) for j in range(30) if j not in excluded[q]}
            assert rows == sorted(scores, key=lambda j: -scores[j])[:10]

    def test_no_more_than_there_are(self) -> None:
        queries, gallery = unit(2, 4), unit(3, 4)
        found = top_k(queries, gallery, 10)
        assert [sorted(rows) for rows in found.tolist()] == [[0, 1, 2]] * 2
        assert top_k(queries, gallery, 10, [[0], []])[0, -1] == 0, "an excluded row comes last"

    def test_a_joint_score_decides(self) -> None:
        torch.manual_seed(0)
        artemis, gallery = Artemis(4), unit(6, 4)
        queries = artemis.compose(unit(3, 4), unit(3, 4)).detach()
        expected = artemis.score(queries, gallery).argsort(dim=1, descending=True)
        assert torch.equal(top_k(queries, gallery, 4, scorer=JointScorer(artemis)), expected[:, :4])
