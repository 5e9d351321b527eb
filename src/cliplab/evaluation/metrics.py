"""Ranks -> recall, mAP, soft recall, intervals. One torchmetrics metric; its state is 1-D ids and ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class RetrievalMetric(Metric):
    """Collects (query id, rank, ties) on every process; a query that came twice counts once.

    One metric and no collection of recalls: torchmetrics merges the states of metrics that agree on the first batch.
    """

    full_state_update = False
    query_id: list[Tensor]
    rank: list[Tensor]
    ties: list[Tensor]

    def __init__(self, recall_at: Sequence[int] = (1, 5, 10), tie_rule: str = "pessimistic") -> None:
        super().__init__()
        self.recall_at, self.tie_rule = tuple(recall_at), tie_rule
        for state in ("query_id", "rank", "ties"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, query_id: Tensor, rank: Tensor, ties: Tensor | None = None) -> None:
        """Int64 ids [N], pessimistic ranks [N] (1 = best), numbers of ties [N]."""
        self.query_id.append(query_id)
        self.rank.append(rank)
        self.ties.append(ties if ties is not None else torch.zeros_like(rank))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As torchmetrics, but a process without rows sends empty int64 states and not empty floats."""
        if len(self.query_id) == 0:
            self.update(*torch.empty(3, 0, dtype=torch.int64, device=self.device))
        super().sync(*args, **kwargs)

    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """(query ids, pessimistic ranks, ties), unique and sorted by id."""
        if len(self.query_id) == 0:  # a list, or after synchronisation a tensor
            empty = torch.empty(0, dtype=torch.int64)
            return empty, empty, empty
        ids, rank, ties = (dim_zero_cat(state) for state in (self.query_id, self.rank, self.ties))
        unique, inverse = ids.unique(return_inverse=True)
        first = torch.full_like(unique, len(ids)).scatter_reduce(
            0, inverse, torch.arange(len(ids), device=ids.device), "amin"
        )
        return unique, rank[first], ties[first]

    def compute(self) -> dict[str, Tensor]:
        """What rank_metrics makes of the table."""
        _, pessimistic, ties = self.table()
        return rank_metrics(pessimistic, ties, self.recall_at, self.tie_rule)


def rank_metrics(pessimistic: Tensor, ties: Tensor, recall_at: Sequence[int], tie_rule: str) -> dict[str, Tensor]:
    """Pessimistic ranks [Q] and ties [Q], int64 -> R@k in percent, median and mean rank under a tie rule.

    Where pessimistic and optimistic recall differ, both are given.
    """
    share = {"pessimistic": 0.0, "mean": 0.5, "optimistic": 1.0}[tie_rule]
    rank = pessimistic.double() - share * ties
    found = recalls(rank, recall_at) | {"median_rank": rank.quantile(0.5), "mean_rank": rank.mean()}
    if tie_rule == "pessimistic" and bool((ties > 0).any()):
        optimistic = recalls((pessimistic - ties).double(), recall_at)
        found |= {f"{key}_optimistic": value for key, value in optimistic.items() if value != found[key]}
    return found


def recalls(rank: Tensor, recall_at: Sequence[int]) -> dict[str, Tensor]:
    """Ranks [Q] -> `{"R@k": percent of queries with rank <= k}`."""
    return {f"R@{k}": 100 * (rank <= k).sum().double() / len(rank) for k in recall_at}


def average_precision(ranks: Sequence[Tensor], k: int, counts: Sequence[int] | None = None) -> Tensor:
    """By query the rising ranks of its relevant rows -> AP@k, float64 [Q] (Baldrati et al., 2023, CIRCO).

    AP@k = 1 / min(|P|, k) * sum_i [rank_i <= k] i / rank_i. `counts` |P|, where ranks beyond some depth are left out.
    """
    values = []
    for row, count in zip(ranks, counts or [len(row) for row in ranks], strict=True):
        precision = torch.arange(1, len(row) + 1, dtype=torch.float64) / row.double()
        values.append((precision * (row <= k)).sum() / min(count, k))
    return torch.stack(values)


def soft_recall(ranks: Sequence[Tensor], gains: Sequence[Sequence[float]], k: int) -> Tensor:
    """Ranks of each query's graded rows and their gains -> the best gain within the top k, float64 [Q].

    Liu et al., 2021 (CIRPLANT). Where nothing or only a negative gain is found, a query gives 0.
    """
    best = [
        max([0.0, *(gain for rank, gain in zip(row.tolist(), given, strict=True) if rank <= k)])
        for row, given in zip(ranks, gains, strict=True)
    ]
    return torch.tensor(best, dtype=torch.float64)


def full_grade_ranks(ranks: Sequence[Tensor], gains: Sequence[Sequence[float]]) -> Tensor:
    """Ranks of each query's graded rows and their gains -> rank of its best row of grade 1, float64 [Q].

    Infinite where no row has that grade: such a query can't be solved.
    """
    best = [
        min((rank for rank, gain in zip(row.tolist(), given, strict=True) if gain >= 1), default=float("inf"))
        for row, given in zip(ranks, gains, strict=True)
    ]
    return torch.tensor(best, dtype=torch.float64)


def mean_per_class(rank: Tensor, classes: Tensor) -> float:
    """Ranks [Q] and classes [Q] of pictures -> percent of rank 1 within each class that occurs, averaged over them."""
    hits = (rank <= 1).double()
    return 100 * float(torch.stack([hits[classes == label].mean() for label in classes.unique()]).mean())


def with_mean(per_benchmark: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Flat `dress/R@10`, ... plus `mean/R@k`, the unweighted mean over benchmarks, and `mean/Avg`.

    So for mAP@K and Rsubset@K. Avg is the mean of the benchmarks' own (CIRR), or else FashionIQ's
    (mean R@10 + mean R@50) / 2, where both are there and no mAP is.
    """
    flat = {f"{name}/{key}": value for name, metrics in per_benchmark.items() for key, value in metrics.items()}
    first, *others = per_benchmark.values()
    keys = [key for key in first if _has_mean(key) and all(key in metrics for metrics in others)]
    for key in keys:
        flat[f"mean/{key}"] = float(np.mean([metrics[key] for metrics in per_benchmark.values()]))
    if {"R@10", "R@50"} <= set(keys) and not any(key.startswith(("Avg", "mAP@")) for key in keys):
        flat["mean/Avg"] = (flat["mean/R@10"] + flat["mean/R@50"]) / 2
    return flat


def _has_mean(key: str) -> bool:
    return key == "Avg" or (key.startswith(("R@", "mAP@", "Rsubset@")) and not key.endswith("optimistic"))
