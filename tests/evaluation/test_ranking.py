import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cliplab.errors import UserError
from cliplab.evaluation.ranking import (
    Ranks,
    Truth,
    by_query,
    positive_ranks,
    rank_positives,
    rank_truths,
    subset_ranks,
)
from cliplab.evaluation.scoring import CosineScorer, JointScorer
from cliplab.models.composers import Artemis
from tests.evaluation.plain import dot, integers, loop, ranking, some, unit

BLOCKS = [(1, 1), (3, 5), (7, 100), (100, 7), (1024, 8192)]


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


def whole_case(seed: int, queries: int = 13, gallery: int = 29) -> tuple[Tensor, Tensor, list, list, list]:
    """Queries, gallery of whole numbers, positives, excluded rows (some of them positive) and subsets by query."""
    generator = torch.Generator().manual_seed(seed)
    sides = integers(queries, generator), integers(gallery, generator)
    positives = [some(1 + q % 5, gallery, generator) for q in range(queries)]
    excluded = [some(q % 4, gallery, generator) for q in range(queries)]
    subsets = [some(1 + q % 7, gallery, generator) for q in range(queries)]
    return *sides, positives, excluded, subsets


class TestPositiveRanks:
    @pytest.mark.parametrize("seed", range(4))
    def test_they_are_the_places_in_a_sorted_list(self, seed: int) -> None:
        queries, gallery, positives, excluded, _ = whole_case(seed)
        found = positive_ranks(queries, gallery, positives, excluded)
        ties = 0
        for q, places in enumerate(found):
            order = ranking(queries[q], gallery, positives[q], excluded[q])
            assert places.tolist() == sorted(order.index(row) + 1 for row in positives[q]), q
            assert places.dtype == torch.int64
            scores = [dot(queries[q], gallery[row]) for row in order]
            ties += len(scores) - len(set(scores))
        assert ties > 100, "the case must be worth it"

    def test_the_first_of_them_is_the_rank_of_the_best(self) -> None:
        queries, gallery, positives, excluded, _ = whole_case(7)
        best = rank_positives(queries, gallery, positives, excluded).pessimistic.tolist()
        assert best == [int(places[0]) for places in positive_ranks(queries, gallery, positives, excluded)]

    def test_a_positive_given_twice_counts_once(self) -> None:
        queries, gallery = integers(1, torch.Generator().manual_seed(0)), integers(9, torch.Generator().manual_seed(1))
        (once,), (twice,) = (positive_ranks(queries, gallery, [rows]) for rows in ([2, 5], [5, 2, 5]))
        assert once.tolist() == twice.tolist() and len(once) == 2

    def test_constant_features_put_all_positives_last(self) -> None:
        (found,) = positive_ranks(torch.ones(1, 3), torch.ones(8, 3), [[0, 4, 5]], [[7]])
        assert found.tolist() == [5, 6, 7]

    def test_positives_that_are_not_numbers_come_last(self) -> None:
        gallery = torch.tensor([[1.0], [2.0], [torch.nan], [3.0], [torch.nan], [0.0]])
        (found,) = positive_ranks(torch.ones(1, 1), gallery, [[2, 3, 0]])
        assert found.tolist() == [2, 4, 6], "row 4, no number, is ahead of everything"

    def test_depth_leaves_later_ones_out(self) -> None:
        queries, gallery, positives, excluded, _ = whole_case(3)
        (ranks,) = rank_truths(queries, gallery, [Truth(positives, excluded, "each", depth=2)])
        counts = [min(2, len(rows)) for rows in positives]
        for few, every in zip(
            by_query(ranks.pessimistic, counts), positive_ranks(queries, gallery, positives, excluded), strict=True
        ):
            assert few.tolist() == every[:2].tolist()


def test_graded_rows_are_ranked_among_all_others() -> None:
    for seed in range(3):
        queries, gallery, positives, excluded, _ = whole_case(seed)
        excluded = [[row for row in rows if row not in p] for rows, p in zip(excluded, positives, strict=True)]
        (ranks,) = rank_truths(queries, gallery, [Truth(positives, excluded, "graded")])
        places, ties = (by_query(each, [*map(len, positives)]) for each in (ranks.pessimistic, ranks.ties))
        for q, rows in enumerate(positives):
            expected = [ranking(queries[q], gallery, [row], excluded[q]).index(row) + 1 for row in rows]
            assert places[q].tolist() == expected
            equal = [
                sum(
                    dot(queries[q], gallery[other]) == dot(queries[q], gallery[row])
                    for other in range(len(gallery))
                    if other != row and other not in excluded[q]
                )
                for row in rows
            ]
            assert ties[q].tolist() == equal


class TestSubsetRanks:
    @pytest.mark.parametrize("seed", range(3))
    def test_they_are_ranks_in_the_subset_alone(self, seed: int) -> None:
        queries, gallery, positives, excluded, subsets = whole_case(seed)
        found = subset_ranks(queries, gallery, positives, subsets, excluded)
        for q, subset in enumerate(subsets):
            best = max(dot(queries[q], gallery[row]) for row in positives[q])
            others = [row for row in subset if row not in positives[q] and row not in excluded[q]]
            scores = [dot(queries[q], gallery[row]) for row in others]
            assert found.pessimistic[q] == 1 + sum(score >= best for score in scores)
            assert found.ties[q] == sum(score == best for score in scores)
        assert found.ties.max() > 0 and found.pessimistic.max() > 2, "the case must be worth it"

    def test_what_is_not_a_number_is_ahead(self) -> None:
        gallery = torch.tensor([[1.0], [torch.nan], [0.5], [2.0]])
        found = subset_ranks(torch.ones(2, 1), gallery, [[0], [1]], [[0, 1, 2], [0, 1, 2]], [[], []])
        assert found.pessimistic.tolist() == [2, 3] and found.ties.tolist() == [0, 0]

    def test_an_empty_subset_is_an_error(self) -> None:
        with pytest.raises(UserError, match="query 1 has an empty subset"):
            subset_ranks(unit(2, 3), unit(4, 3), [[0], [1]], [[0], []], [[], []])


class TestTruthsOfOnePass:
    @pytest.mark.parametrize("blocks", [(1, 1), (3, 5), (7, 100), (100, 7), None])
    def test_each_is_what_it_is_alone(self, blocks: tuple[int, int] | None) -> None:
        queries, gallery, positives, excluded, _ = whole_case(5)
        generator = torch.Generator().manual_seed(1)
        back = [some(1 + g % 3, len(queries), generator) for g in range(len(gallery))]
        out = [some(g % 3, len(queries), generator) for g in range(len(gallery))]
        truths = [Truth(positives, excluded), Truth(back, out, backward=True), Truth(positives, excluded, "each")]
        truths += [Truth(back, out, "each", backward=True), Truth(back, out, "graded", backward=True)]
        found = rank_truths(queries, gallery, truths, blocks=blocks)
        expected = [
            *rank_truths(queries, gallery, [truths[0]]),
            *rank_truths(gallery, queries, [Truth(back, out)]),
            *rank_truths(queries, gallery, [truths[2]]),
            *rank_truths(gallery, queries, [Truth(back, out, "each")]),
            *rank_truths(gallery, queries, [Truth(back, out, "graded")]),
        ]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.pessimistic, other.pessimistic) and torch.equal(one.ties, other.ties)
        ranks, ties = loop(gallery, queries, back, out)
        assert found[1].pessimistic.tolist() == ranks and found[1].ties.tolist() == ties

    def test_scores_are_computed_once(self) -> None:
        class Counting(CosineScorer):
            entries = 0
            is_product = False  # else a first look may be taken at some of them

            def block(self, queries: Tensor, gallery: Tensor, out: Tensor | None = None) -> Tensor:
                Counting.entries += len(queries) * len(gallery)
                return super().block(queries, gallery, out)

        queries, gallery, positives, excluded, _ = whole_case(2)
        back = [[0]] * len(gallery)
        rank_truths(queries, gallery, [Truth(positives, excluded), Truth(back, backward=True)], Counting(), (4, 8))
        assert Counting.entries == len(queries) * len(gallery)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_scores_are_fp32_whatever_the_features_are(self, dtype: torch.dtype) -> None:
        queries, gallery, positives, excluded = make_case(1)
        queries, gallery = queries.to(dtype), gallery.to(dtype)
        found = rank_positives(queries, gallery, positives, excluded)
        ranks, ties = loop(queries, gallery, positives, excluded)
        assert found.pessimistic.tolist() == ranks and found.ties.tolist() == ties

    def test_queries_without_a_positive_are_counted(self) -> None:
        with pytest.raises(UserError, match=r"query 2 has no positive.*\(2 such\)"):
            positive_ranks(unit(4, 3), unit(5, 3), [[0], [1], [], []])


@pytest.mark.parametrize("blocks", [None, (7, 13)])
@pytest.mark.parametrize("width", [384, 512, 768, 4096])
def test_products_that_vanish_beside_a_partial_sum_do_not_change_a_rank(width, blocks):
    """All but one product are too small to be added to the first in fp32: a whole kernel's sum loses 1e-5 of them."""
    small = 1.7e-4
    query, candidate, target = torch.full((width,), small), torch.full((width,), small), torch.zeros(width)
    query[-2:] = 0
    query[0] = (1 - query[1:].double().square().sum()).sqrt()
    candidate[0], candidate[-2:] = 0.98, 0
    candidate[-1] = (1 - candidate[:-1].double().square().sum()).sqrt()
    gap = 5e-6  # of the true scores
    target[0] = (query.double() @ candidate.double() - gap) / query[0].double()
    target[-2] = (1 - target[0].double().square()).sqrt()
    gallery = torch.stack([target, *[candidate] * 255])
    options = {} if blocks is None else {"blocks": blocks}
    (ranks,) = (rank_positives(query.repeat(64, 1), gallery, [[0]] * 64, **options),)
    assert ranks.pessimistic.tolist() == [256] * 64
