"""Exact ranks of targets in both directions, from one pass over blocks of scores (counting.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, distributed

from cliplab.errors import UserError
from cliplab.evaluation.counting import Pairs, ScoreTable, Targets, compare, count_ahead
from cliplab.evaluation.scoring import CosineScorer, Scorer

Rows = Sequence[Sequence[int]]  # rows of the gallery by query (backward: rows of the queries by gallery row)
CPU_BLOCKS, GPU_BLOCKS = (4096, 1024), (8192, 8192)  # (queries, gallery) per block: 16 MB; 256 MB


@dataclass(frozen=True)
class Ranks:
    """The pessimistic rank of each target (all ties ahead of it) and how many candidates tie with it. [T] int64."""

    pessimistic: Tensor
    ties: Tensor

    def under(self, rule: str) -> Tensor:
        """float64 ranks [T] under a protocol's tie rule: pessimistic, optimistic or mean."""
        share = {"pessimistic": 0.0, "mean": 0.5, "optimistic": 1.0}[rule]
        return self.pessimistic.double() - share * self.ties


@dataclass(frozen=True)
class Truth:
    """What the queries look for in the gallery, or `backward` the gallery rows among the queries.

    of = best: the best positive, among what is no positive; one rank per query, and the worst if a positive's score is
    not a number. of = each: every positive (if `depth` is given, that many best ones) in the order in which they come;
    a positive's score that is not a number comes last. of = graded: every positive, in the order given, among all
    others, positives as well. `excluded` rows are no candidates.
    """

    positives: Rows
    excluded: Rows | None = None
    of: Literal["best", "each", "graded"] = "best"
    backward: bool = False
    depth: int | None = None


@dataclass(frozen=True)
class _Question:
    """The targets [T] of one truth: their query, their layer (one target per query each) and who of them is ahead."""

    line: Tensor  # int64 [T]
    layer: Tensor  # int64 [T]
    positives_ahead: Tensor  # int64 [T]
    targets: list[Targets] = field(default_factory=list)  # by layer

    def ranks(self) -> Ranks:
        ahead, ties = (
            torch.stack([getattr(each, name) for each in self.targets]).cpu()[self.layer, self.line]
            if self.targets
            else torch.zeros(0, dtype=torch.int64)
            for name in ("ahead", "ties")
        )
        return Ranks(1 + self.positives_ahead + ahead + ties, ties)


@torch.no_grad()
def rank_truths(
    queries: Tensor,
    gallery: Tensor,
    truths: Sequence[Truth],
    scorer: Scorer | None = None,
    blocks: tuple[int, int] | None = None,
    spread: bool = False,
) -> list[Ranks]:
    """Ranks by truth; all of them come from the same scores, computed once. On the CPU.

    queries [Q, ...] and gallery [G, D], unit vectors of any precision; they are compared in fp32 and, where that does
    not decide, in float64. `spread`: all processes call this with the same arguments and share the blocks. Raises
    UserError for a query without a positive.
    """
    table = ScoreTable(queries, gallery, scorer or CosineScorer())
    questions = [_ask(truth, table) for truth in truths]
    targets = [each for question in questions for each in question.targets]
    blocks = blocks or (CPU_BLOCKS if queries.device.type == "cpu" else GPU_BLOCKS)
    if spread and distributed.is_initialized() and distributed.get_world_size() > 1:
        count_ahead(targets, table, blocks, (distributed.get_rank(), distributed.get_world_size()))
        for each in targets:
            distributed.all_reduce(each.ahead)
            distributed.all_reduce(each.ties)
    else:
        count_ahead(targets, table, blocks)
    return [question.ranks() for question in questions]


def rank_positives(
    queries: Tensor,
    gallery: Tensor,
    positives: Rows,
    excluded: Rows | None = None,
    scorer: Scorer | None = None,
    blocks: tuple[int, int] | None = None,
) -> Ranks:
    """Rank [Q] of the best positive of each query among the gallery rows that are neither positive nor excluded.

    rank = 1 + #{j : s_j > max_p s_p} (+ #{j : s_j = max_p s_p}, the ties). queries [Q, ...], gallery [G, D]: unit
    vectors of any precision. A score that is not a number counts against the target. Raises as rank_truths does.
    """
    return rank_truths(queries, gallery, [Truth(positives, excluded)], scorer, blocks)[0]


def positive_ranks(
    queries: Tensor,
    gallery: Tensor,
    positives: Rows,
    excluded: Rows | None = None,
    scorer: Scorer | None = None,
) -> list[Tensor]:
    """By query: the positions of all its positives, int64, rising from 1 or more, in a ranking without excluded rows.

    What is no positive and ties with one counts as ahead of it. queries [Q, ...], gallery [G, D] as in rank_positives.
    """
    (ranks,) = rank_truths(queries, gallery, [Truth(positives, excluded, of="each")], scorer)
    return by_query(ranks.pessimistic, [len(set(rows)) for rows in positives])


def by_query(values: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """[T] -> Q tensors of as many values as `counts` says."""
    return list(values.split(list(counts)))


@torch.no_grad()
def subset_ranks(
    queries: Tensor, gallery: Tensor, positives: Rows, subsets: Rows, excluded: Rows, scorer: Scorer | None = None
) -> Ranks:
    """Rank [Q] of each query's best positive among the rows of its subset that are neither positive nor excluded."""
    table = ScoreTable(queries, gallery, scorer or CosineScorer())
    best = _best(_pairs(positives), table, backward=False)
    if not all(subsets):
        raise UserError(f"query {[*map(bool, subsets)].index(False)} has an empty subset: there is nothing to rank in")
    rivals = Pairs({*s} - {*p} - {*e} for s, p, e in zip(subsets, positives, excluded, strict=True))
    line = rivals.line.to(best.device)
    found = compare(table.pairs(rivals.line, rivals.candidate, backward=False), best[line], table.scorer.tie)
    ahead, ties = (torch.zeros(len(best), dtype=torch.int64).index_add_(0, rivals.line, each.cpu()) for each in found)
    return Ranks(1 + ahead + ties, ties)


def _ask(truth: Truth, table: ScoreTable) -> _Question:
    """The targets to count for, with their exact scores."""
    count = len(table.gallery if truth.backward else table.queries)
    assert len(truth.positives) == count, "one list of positives per query"
    if truth.of != "best":
        return _ask_each(truth, table, count)
    pairs = _pairs(truth.positives)
    best, kept_out = _best(pairs, table, truth.backward), _kept_out(truth, pairs)
    none = torch.zeros(count, dtype=torch.int64)
    return _Question(torch.arange(count), none, none, [Targets(best, kept_out, truth.backward)] if count else [])


def _ask_each(truth: Truth, table: ScoreTable, count: int) -> _Question:
    """A layer holds each query's i-th positive: the i-th best one, or if they are graded the i-th given."""
    pairs = _pairs(truth.positives)
    line, layer = pairs.line, pairs.place()
    scores = table.positives(pairs, truth.backward)
    if truth.of == "each":
        best_first = scores.where(~scores.isnan(), -torch.inf).argsort(descending=True, stable=True)
        scores = scores[best_first[line.to(scores.device)[best_first].argsort(stable=True)]]
    if truth.depth is not None:
        wanted = layer < truth.depth
        line, layer, scores = line[wanted], layer[wanted], scores[wanted.to(scores.device)]
    question = _Question(line, layer, layer if truth.of == "each" else torch.zeros_like(layer))
    kept_out = _kept_out(truth, pairs)
    for number in range(int(layer.max()) + 1 if len(layer) else 0):
        mine = (layer == number).to(scores.device)
        target = torch.full((count,), torch.inf, dtype=torch.float64, device=scores.device)
        target[line.to(scores.device)[mine]] = scores[mine]
        if truth.of == "graded":  # only the target itself is no rival of its own
            own = ([*dict.fromkeys(p)][number : number + 1] for p in truth.positives)
            kept_out = Pairs({*p, *e} for p, e in zip(own, _excluded(truth), strict=True))
        question.targets.append(Targets(target, kept_out, truth.backward))
    return question


def _excluded(truth: Truth) -> Rows:
    return truth.excluded if truth.excluded is not None else [()] * len(truth.positives)


def _kept_out(truth: Truth, positives: Pairs) -> Pairs:
    """What is no candidate: positives and excluded rows."""
    if not any(_excluded(truth)):
        return positives
    return Pairs({*p, *e} for p, e in zip(truth.positives, _excluded(truth), strict=True))


def _pairs(positives: Rows) -> Pairs:
    """Without repetitions, in the order given. Raises UserError where a query has none."""
    pairs = Pairs(rows if len(rows) == 1 else dict.fromkeys(rows) for rows in positives)
    if len(empty := (pairs.counts == 0).nonzero()):
        raise UserError(f"query {int(empty[0])} has no positive: there is nothing to rank for it ({len(empty)} such)")
    return pairs


def _best(pairs: Pairs, table: ScoreTable, backward: bool) -> Tensor:
    """float64 [L]: the exact score of each line's best pair; not a number if any of them is none."""
    scores = table.positives(pairs, backward)
    best = torch.full((len(pairs.counts),), -torch.inf, dtype=torch.float64, device=scores.device)
    return best.scatter_reduce(0, pairs.line.to(best.device), scores, "amax")
