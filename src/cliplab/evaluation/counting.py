"""Counts what is ahead of targets, block by block: each block serves all targets, no Q x G matrix is kept.

A score in fp32 depends on the shape of the matrix product that made it. Candidates whose fp32 score lies within a band
around the target's are therefore scored again as float64 rows, in an order of additions that is the same for every
shape and device, and only then compared. Counts are so equal for every block size and number of processes.

A line is a query that looks along the gallery (a row of scores_qg [Q, G]) or, backward, a gallery row that looks along
the queries (a column). L lines, N candidates across them.
"""

import itertools
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cliplab.evaluation.scoring import Scorer
from cliplab.precision import exact_fp32

PIECE = 2**18  # numbers per operand of exact scores: what a cache holds


class Pairs:
    """(line, candidate) pairs sorted by line: positives, or what is kept out of a ranking. int64 [P], on the CPU."""

    def __init__(self, candidates_of_line: Iterable[Iterable[int]]) -> None:
        counts, flat = array("q"), array("q")
        for candidates in candidates_of_line:
            before = len(flat)
            flat.extend(candidates)
            counts.append(len(flat) - before)
        self.counts = torch.from_numpy(np.array(counts, dtype=np.int64))  # [L]
        self.line = torch.repeat_interleave(torch.arange(len(counts)), self.counts)
        self.candidate = torch.from_numpy(np.array(flat, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.line)

    def place(self) -> Tensor:
        """int64 [P]: which of its line's pairs each one is, from 0."""
        return torch.arange(len(self)) - (self.counts.cumsum(0) - self.counts)[self.line]

    def inside(self, lines: slice, candidates: slice) -> tuple[Tensor, Tensor]:
        """The pairs of a block, counted from its first line and candidate."""
        start, stop = torch.searchsorted(self.line, torch.tensor([lines.start, lines.stop])).tolist()
        line, candidate = self.line[start:stop], self.candidate[start:stop]
        keep = (candidate >= candidates.start) & (candidate < candidates.stop)
        return line[keep] - lines.start, candidate[keep] - candidates.start


@dataclass(frozen=True)
class ScoreTable:
    """Queries [Q, ...] and gallery [G, D] of any precision, compared in fp32 by block and in float64 by pair."""

    queries: Tensor
    gallery: Tensor
    scorer: Scorer
    known: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def block(self, queries: slice, gallery: slice) -> Tensor:
        """fp32 scores_qg of a block."""
        return self.scorer.block(self.queries[queries].float(), self.gallery[gallery].float()).float()

    def pairs(self, line: Tensor, candidate: Tensor, backward: bool) -> Tensor:
        """float64 scores [P] of (line, candidate) pairs, in pieces that fit a cache."""
        rows, columns = (candidate, line) if backward else (line, candidate)
        rows, columns = rows.to(self.queries.device), columns.to(self.gallery.device)
        size = max(1, PIECE // self.queries[:1].numel()) if len(self.queries) else 1
        parts = [self.scorer.pairs(self.queries[rows[p]], self.gallery[columns[p]]) for p in blocks_of(len(rows), size)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=self.queries.device)

    def positives(self, pairs: Pairs, backward: bool) -> Tensor:
        """float64 scores [P] of pairs; a transpose, the same pairs in another order, costs nothing."""
        row, column = (pairs.candidate, pairs.line) if backward else (pairs.line, pairs.candidate)
        key, order = (row * len(self.gallery) + column).sort()
        found = next((scores for known, scores in self.known if torch.equal(known, key)), None)
        order = order.to(self.queries.device)
        if found is None:
            scores = self.pairs(pairs.line, pairs.candidate, backward)
            self.known.append((key, scores[order]))
            return scores
        return torch.empty_like(found).index_copy_(0, order, found)


class Targets:
    """One target per line, by its exact score: how many candidates are ahead of it, and how many tie with it.

    `score` float64 [L]; inf where a line has no target. `kept_out`: the line's candidates that do not count. `ahead`
    and `ties` int64 [L] on the device of the score. A score that is not a number counts against the target.
    """

    def __init__(self, score: Tensor, kept_out: Pairs, backward: bool = False) -> None:
        self.score, self.kept_out, self.backward = score, kept_out, backward
        self.ahead, self.ties = (torch.zeros(len(score), dtype=torch.int64, device=score.device) for _ in range(2))

    def count(self, scores_qg: Tensor, queries: slice, gallery: slice, table: ScoreTable) -> None:
        """Add the candidates of a block: one comparison clears the lines that hold nothing as high as the target."""
        lines, across = (gallery, queries) if self.backward else (queries, gallery)
        scores = scores_qg.T if self.backward else scores_qg  # [L, N] of the block
        line, candidate = (each.to(scores.device) for each in self.kept_out.inside(lines, across))
        low, high = (self.score[lines].float() + sign * table.scorer.band for sign in (-1, 1))
        not_behind = _how_many_not(torch.lt, scores, low, (line, candidate))
        left = not_behind.nonzero().flatten()
        if 2 * len(left) < len(scores):  # else copying them costs more than it saves
            number = torch.full_like(not_behind, -1)
            number[left] = torch.arange(len(left), device=left.device)
            line, candidate = number[line], candidate[number[line] >= 0]
            scores, line = scores.index_select(0, left), line[line >= 0]
        else:
            left = torch.arange(len(scores), device=left.device)
        ahead = _how_many_not(torch.le, scores, high[left], (line, candidate))
        self.ahead.index_add_(0, lines.start + left, ahead)
        unsure = (not_behind[left] > ahead).nonzero().flatten()
        if len(unsure):
            chosen, bounds = scores.index_select(0, unsure), (low[left[unsure], None], high[left[unsure], None])
            found = ((chosen >= bounds[0]) & (chosen <= bounds[1])).flatten().nonzero().flatten()
            width = scores.shape[1]
            place = unsure[found // width] * width + found % width
            place = place[~torch.isin(place, line * width + candidate)]
            self._settle(lines.start + left[place // width], across.start + place % width, table)

    def _settle(self, line: Tensor, candidate: Tensor, table: ScoreTable) -> None:
        """Compare exactly the candidates [P] that lie within the band, on their lines [P]."""
        exact = table.pairs(line, candidate, self.backward)
        ahead, ties = compare(exact, self.score[line], table.scorer.tie)
        self.ahead.index_add_(0, line, ahead)
        self.ties.index_add_(0, line, ties)


def compare(scores: Tensor, targets: Tensor, tie: float) -> tuple[Tensor, Tensor]:
    """float64 scores [P] of candidates and of their targets -> int64 [P] (is ahead, ties), 0 or 1."""
    difference = scores - targets
    ties = difference.abs() <= tie
    return (~(difference < 0) & ~ties).long(), ties.long()  # what is not a number is ahead


@torch.no_grad()
def count_ahead(
    targets: Sequence[Targets], table: ScoreTable, blocks: tuple[int, int], share: tuple[int, int] = (0, 1)
) -> None:
    """One pass over blocks of (queries, gallery) for all targets; of share (i, n), process i of n does every nth."""
    with exact_fp32(table.queries.device):
        every = itertools.product(blocks_of(len(table.gallery), blocks[1]), blocks_of(len(table.queries), blocks[0]))
        for gallery, queries in itertools.islice(every, share[0], None, share[1]):
            scores_qg = table.block(queries, gallery)
            for each in targets:
                each.count(scores_qg, queries, gallery, table)


def blocks_of(length: int, size: int) -> list[slice]:
    """0 .. length in slices of at most `size`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _how_many_not(test: Callable[..., Tensor], scores: Tensor, bound: Tensor, kept_out: tuple[Tensor, ...]) -> Tensor:
    """Of scores [L, N] against bounds [L]: how many fail the test and are not kept out, int64 [L].

    The flags are fp32: they add up several times faster than bools, and exactly up to 2^24.
    """
    flags = test(scores, bound[:, None], out=torch.empty_like(scores))
    flags[kept_out] = 1
    return flags.shape[1] - flags.sum(1).long()
