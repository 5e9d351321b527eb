import pytest
import torch

from cliplab.evaluation.counting import Pairs, ScoreTable, Targets, blocks_of, compare, count_ahead
from cliplab.evaluation.scoring import CosineScorer
from tests.evaluation.plain import dot, integers, some, unit


def test_pairs_of_a_block() -> None:
    rows = [[3, 0], [], [4, 1, 3], [2]]
    pairs = Pairs(rows)
    assert pairs.counts.tolist() == [2, 0, 3, 1] and len(pairs) == 6
    assert pairs.place().tolist() == [0, 1, 0, 1, 2, 0]
    for lines in (slice(0, 4), slice(1, 3), slice(2, 4), slice(4, 9)):
        for candidates in (slice(0, 5), slice(1, 4), slice(3, 4)):
            expected = [
                (line - lines.start, row - candidates.start)
                for line in range(lines.start, min(lines.stop, 4))
                for row in rows[line]
                if candidates.start <= row < candidates.stop
            ]
            assert list(zip(*(each.tolist() for each in pairs.inside(lines, candidates)), strict=True)) == expected
    assert len(Pairs([])) == 0


def test_blocks() -> None:
    assert blocks_of(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert blocks_of(0, 3) == []


def test_compare() -> None:
    nan = float("nan")
    scores, targets = torch.tensor([1.0, 2.0, 3.0, nan, 1.0, 2.4]), torch.tensor([2.0, 2.0, 2.0, 2.0, nan, 2.0])
    ahead, ties = compare(scores.double(), targets.double(), 0.5)
    assert ahead.tolist() == [0, 0, 1, 1, 1, 0] and ties.tolist() == [0, 1, 0, 0, 0, 1]


def make_table(seed: int = 0) -> tuple[ScoreTable, list[list[int]], torch.Tensor]:
    """Whole numbers; a target score and what is kept out per query; the last query has no target."""
    generator = torch.Generator().manual_seed(seed)
    table = ScoreTable(integers(11, generator), integers(23, generator), CosineScorer())
    score = torch.randint(-6, 7, (11,), generator=generator).double()
    score[10] = torch.inf
    return table, [some(q % 6, 23, generator) for q in range(11)], score


@pytest.mark.parametrize("blocks", [(1, 1), (4, 5), (11, 23), (100, 100)])
@pytest.mark.parametrize("shares", [1, 3])
def test_counts_are_a_loops_and_shares_add_up(blocks: tuple[int, int], shares: int) -> None:
    table, kept_out, score = make_table()
    parts = [Targets(score, Pairs(kept_out)) for _ in range(shares)]
    for number, part in enumerate(parts):
        count_ahead([part], table, blocks, (number, shares))
    for q in range(11):
        scores = [dot(table.queries[q], row) for g, row in enumerate(table.gallery) if g not in kept_out[q]]
        assert sum(int(part.ahead[q]) for part in parts) == sum(each > score[q] for each in scores)
        assert sum(int(part.ties[q]) for part in parts) == sum(each == score[q] for each in scores)


@pytest.mark.parametrize("high", [0, 60])
def test_lines_with_many_candidates_ahead_or_none(high: int) -> None:
    """Targets far ahead of all but a few candidates: counts are a loop's."""
    torch.manual_seed(0)
    table = ScoreTable(unit(80, 6), unit(50, 6), CosineScorer())
    score = table.pairs(torch.arange(80), torch.arange(80) % 50, backward=False)
    score[:high] = 2.0
    kept_out = [[q % 50, (q + 7) % 50] for q in range(80)]
    targets = Targets(score, Pairs(kept_out))
    count_ahead([targets], table, (80, 50))
    for q in range(80):
        scores = [dot(table.queries[q], row) for g, row in enumerate(table.gallery) if g not in kept_out[q]]
        assert targets.ahead[q] == sum(each > score[q] for each in scores)
        assert targets.ties[q] == sum(each == score[q] for each in scores)


def test_known_scores_of_positives_are_found_again_backward() -> None:
    class Once(CosineScorer):
        calls = 0

        def pairs(self, queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
            Once.calls += 1
            return super().pairs(queries, gallery)

    torch.manual_seed(0)
    table = ScoreTable(unit(4, 3), unit(3, 3), Once())
    forward = table.positives(Pairs([[2, 0], [1], [0], [2, 1]]), backward=False)
    backward = table.positives(Pairs([[2, 0], [1, 3], [3, 0]]), backward=True)
    assert Once.calls == 1
    assert backward.tolist() == [float(forward[place]) for place in (3, 1, 2, 5, 4, 0)]
    other = table.positives(Pairs([[2, 0], [1, 3], [3, 1]]), backward=True)
    assert Once.calls == 2 and other[5] == pytest.approx(dot(table.queries[1], table.gallery[2]))
