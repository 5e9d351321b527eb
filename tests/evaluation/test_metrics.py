import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cliplab.evaluation.metrics import (
    RetrievalMetric,
    average_precision,
    full_grade_ranks,
    mean_per_class,
    recalls,
    soft_recall,
    with_mean,
)
from tests.evaluation.plain import precision_at
from tests.processes import in_processes

SHARE = {"pessimistic": 0.0, "mean": 0.5, "optimistic": 1.0}


def make_rows(count: int = 41) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, pessimistic ranks, ties (fewer than the rank)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(count, generator=generator)
    ranks = torch.randint(1, 30, (count,), generator=generator)
    ties = (ranks - 1) * torch.randint(0, 2, (count,), generator=generator) // 2
    return ids, ranks, ties


def loop(ranks: list[float], recall_at: tuple[int, ...]) -> dict[str, float]:
    found = {f"R@{k}": 100 * sum(rank <= k for rank in ranks) / len(ranks) for k in recall_at}
    return found | {"median_rank": statistics.median(ranks), "mean_rank": statistics.mean(ranks)}


@pytest.mark.parametrize("rule", SHARE)
@pytest.mark.parametrize("count", [40, 41])
def test_values_are_a_loops_under_every_tie_rule(rule: str, count: int) -> None:
    ids, ranks, ties = make_rows(count)
    metric = RetrievalMetric((1, 5, 10), rule)
    for rows in torch.arange(count).split(7):
        metric.update(ids[rows], ranks[rows], ties[rows])
    found = {key: float(value) for key, value in metric.compute().items()}
    under_rule = [r - SHARE[rule] * t for r, t in zip(ranks.tolist(), ties.tolist(), strict=True)]
    expected = loop(under_rule, (1, 5, 10))
    if rule == "pessimistic":
        best = loop([r - t for r, t in zip(ranks.tolist(), ties.tolist(), strict=True)], (1, 5, 10))
        differing = {key: best[key] for key in ("R@1", "R@5", "R@10") if best[key] != expected[key]}
        assert differing, "the case must be worth it"
        expected |= {f"{key}_optimistic": value for key, value in differing.items()}
    assert found == pytest.approx(expected)


def test_a_query_that_came_twice_counts_once() -> None:
    ids, ranks, ties = make_rows()
    once, twice = RetrievalMetric(), RetrievalMetric()
    once.update(ids, ranks, ties)
    twice.update(ids, ranks, ties)
    twice.update(ids[:9], ranks[:9], ties[:9])
    assert {k: float(v) for k, v in twice.compute().items()} == {k: float(v) for k, v in once.compute().items()}
    order = ids.argsort()
    for table in (once.table(), twice.table()):
        assert all(torch.equal(a, b) for a, b in zip(table, (ids[order], ranks[order], ties[order]), strict=True))


def test_ties_may_be_left_away() -> None:
    metric = RetrievalMetric((1,))
    metric.update(torch.tensor([4, 2]), torch.tensor([1, 3]))
    assert {key: float(value) for key, value in metric.compute().items()} == {
        "R@1": 50,
        "median_rank": 2,
        "mean_rank": 2,
    }
    assert metric.table()[2].tolist() == [0, 0]


def test_reset_forgets() -> None:
    metric = RetrievalMetric((1,))
    metric.update(torch.tensor([0]), torch.tensor([9]))
    metric.reset()
    assert [len(column) for column in metric.table()] == [0, 0, 0]
    metric.update(torch.tensor([0]), torch.tensor([1]))
    assert float(metric.compute()["R@1"]) == 100


def test_recalls_in_percent() -> None:
    rank = torch.tensor([1.0, 2.0, 2.5, 11.0], dtype=torch.float64)
    assert {key: float(value) for key, value in recalls(rank, (1, 2, 10)).items()} == {
        "R@1": 25,
        "R@2": 50,
        "R@10": 75,
    }


def in_one_of_two(rank: int, case: str) -> dict[str, Any]:
    """`uneven`: the second process has no rows and never calls update; `shared`: the rows overlap."""
    ids, ranks, ties = make_rows()
    metric = RetrievalMetric()
    if case == "uneven" and rank == 0:
        metric.update(ids, ranks, ties)
    if case == "shared":
        part = slice(0, 25) if rank == 0 else slice(16, None)
        metric.update(ids[part], ranks[part], ties[part])
    first = {key: float(value) for key, value in metric.compute().items()}
    with metric.sync_context():
        table = [column.tolist() for column in metric.table()]
    metric.update(torch.tensor([100 + rank]), torch.tensor([1]))
    return {"metrics": first, "table": table, "mean_rank_later": float(metric.compute()["mean_rank"])}


def both_cases(rank: int) -> dict[str, dict[str, Any]]:
    return {case: in_one_of_two(rank, case) for case in ("uneven", "shared")}


def test_two_processes_measure_what_one_does() -> None:
    ids, ranks, ties = make_rows()
    alone = RetrievalMetric()
    alone.update(ids, ranks, ties)
    expected = {key: float(value) for key, value in alone.compute().items()}
    table = [column.tolist() for column in alone.table()]
    later = (int(ranks.sum()) + 2) / (len(ranks) + 2)
    for outcome in in_processes(both_cases, 2):
        for case in ("uneven", "shared"):
            assert outcome[case]["metrics"] == expected, case
            assert outcome[case]["table"] == table, case
            assert outcome[case]["mean_rank_later"] == pytest.approx(later), case


def test_mean_per_class_weighs_classes_and_not_pictures() -> None:
    rank = torch.tensor([1.0, 1.0, 2.0, 1.0, 1.5, 3.0])
    classes = torch.tensor([7, 7, 7, 7, 2, 5])  # 3 of 4, none, none
    assert mean_per_class(rank, classes) == pytest.approx(25.0)
    assert mean_per_class(rank[:4], classes[:4]) == pytest.approx(75.0)


def test_with_mean() -> None:
    found = with_mean(
        {
            "dress": {"R@10": 10.0, "R@50": 30.0, "median_rank": 7.0, "R@10_optimistic": 11.0},
            "shirt": {"R@10": 40.0, "R@50": 80.0, "median_rank": 3.0},
        }
    )
    assert found == {
        "dress/R@10": 10.0,
        "dress/R@50": 30.0,
        "dress/median_rank": 7.0,
        "dress/R@10_optimistic": 11.0,
        "shirt/R@10": 40.0,
        "shirt/R@50": 80.0,
        "shirt/median_rank": 3.0,
        "mean/R@10": 25.0,
        "mean/R@50": 55.0,
        "mean/Avg": 40.0,
    }
    assert with_mean({"t2i": {"R@1": 10.0, "R@10": 40.0}}) == {
        "t2i/R@1": 10.0,
        "t2i/R@10": 40.0,
        "mean/R@1": 10.0,
        "mean/R@10": 40.0,
    }


def test_with_mean_of_composed_benchmarks() -> None:
    """CIRR has an average of its own; CIRCO's R@10 and R@50 are not FashionIQ's."""
    cirr = {"R@5": 40.0, "R@10": 50.0, "R@50": 80.0, "Rsubset@1": 60.0, "Avg": 50.0}
    found = with_mean({"cirr": cirr, "other": {**cirr, "Avg": 30.0, "Rsubset@1": 20.0, "mAP@5": 3.0}})
    assert found["mean/Avg"] == 40.0 and found["mean/Rsubset@1"] == 40.0
    assert "mean/mAP@5" not in found, "one of them has none"
    circo = {"R@10": 10.0, "R@50": 30.0, "mAP@5": 4.0, "mAP@10": 6.0, "mAP@10/addition": 7.0}
    found = with_mean({"circo": circo, "again": {**circo, "mAP@5": 8.0}})
    assert found["mean/mAP@5"] == 6.0 and found["mean/mAP@10/addition"] == 7.0
    assert "mean/Avg" not in found


class TestAveragePrecision:
    @pytest.mark.parametrize("k", [1, 2, 5, 10, 1000])
    def test_it_is_the_sum_over_a_ranking(self, k: int) -> None:
        rng = np.random.default_rng(k)
        expected, ranks = [], []
        for _ in range(40):
            rows = rng.permutation(30).tolist()
            relevant = rng.choice(30, rng.integers(1, 9), replace=False).tolist()
            expected.append(precision_at(rows, relevant, k))
            ranks.append(torch.tensor(sorted(rows.index(row) + 1 for row in relevant)))
        found = average_precision(ranks, k)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected)
        depth = [row[:k] for row in ranks]
        assert average_precision(depth, k, [len(row) for row in ranks]).tolist() == pytest.approx(expected)

    def test_by_hand(self) -> None:
        """Three of four found within 5: 1/1, 2/3, 3/5; the fourth comes too late."""
        row = torch.tensor([1, 3, 5, 9])
        assert average_precision([row], 5).tolist() == pytest.approx([(1 + 2 / 3 + 3 / 5) / 4])
        assert average_precision([row], 3).tolist() == pytest.approx([(1 + 2 / 3) / 3])
        assert average_precision([row], 2).tolist() == pytest.approx([1 / 2])
        assert average_precision([torch.tensor([1, 2])], 50).tolist() == [1.0]


def test_full_grade_ranks_by_hand() -> None:
    ranks = [torch.tensor([7.0, 3.0, 5.0]), torch.tensor([1.0, 2.5]), torch.tensor([1.0])]
    gains = [[1.0, 0.5, 1.0], [0.9, 1.0], [-1.0]]
    assert full_grade_ranks(ranks, gains).tolist() == [5.0, 2.5, float("inf")]


def test_soft_recall_is_the_best_gain_among_the_first() -> None:
    ranks = [torch.tensor([3, 1, 8]), torch.tensor([2]), torch.tensor([1, 6]), torch.tensor([9])]
    gains = [[1.0, 0.5, 0.2], [1.0], [-1.0, 0.2], [1.0]]
    assert soft_recall(ranks, gains, 1).tolist() == [0.5, 0, 0, 0]
    assert soft_recall(ranks, gains, 2).tolist() == [0.5, 1, 0, 0]
    assert soft_recall(ranks, gains, 6).tolist() == [1, 1, 0.2, 0]
    assert soft_recall(ranks, gains, 100).tolist() == [1, 1, 0.2, 1]
