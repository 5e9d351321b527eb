"""Retrieval measured by loops and sorting: what the fast code has to equal."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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


def ranking(query: Tensor, gallery: Tensor, last: Sequence[int], excluded: Sequence[int]) -> list[int]:
    """Gallery rows, best first; among equal ones those of `last` come last, as a pessimist sorts."""
    rows = [row for row in range(len(gallery)) if row not in excluded or row in last]
    return sorted(rows, key=lambda row: (-dot(query, gallery[row]), row in last))


def precision_at(rows: Sequence[int], relevant: Sequence[int], k: int) -> float:
    """AP@k as CIRCO writes it: the sum of P@k * rel(k) over min(|GT|, k)."""
    total = sum(
        sum(row in relevant for row in rows[: place + 1]) / (place + 1)
        for place in range(min(k, len(rows)))
        if rows[place] in relevant
    )
    return total / min(len(set(relevant)), k)


def integers(count: int, generator: torch.Generator, width: int = 4) -> Tensor:
    """Small whole numbers, so that equal scores are common and every product is exact."""
    return torch.randint(-2, 3, (count, width), generator=generator).float()


def some(count: int, below: int, generator: torch.Generator) -> list[int]:
    """Different numbers."""
    return torch.randperm(below, generator=generator)[:count].tolist()
