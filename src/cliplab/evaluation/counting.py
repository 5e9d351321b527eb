"""Counts what is ahead of targets, block by block: each block serves all targets, no Q x G matrix is kept.

A score in fp32 depends on the shape of the matrix product that made it. Candidates whose fp32 score lies within a band
around the target's are therefore scored again as float64 rows, in an order of additions that is the same for every
shape and device, and only then compared. Counts are so equal for every block size and number of processes.

A line is a query that looks along the gallery (a row of scores_qg [Q, G]) or, backward, a gallery row that looks along
the queries (a column). L lines, N candidates across them.
"""

import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cliplab.evaluation.scoring import Scorer
from cliplab.precision import exact_fp32

PIECE = 2**18  # numbers that a cache holds


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

    def block(self, queries: slice, gallery: slice, buffer: Tensor) -> Tensor:
        """fp32 scores_qg of a block, in the buffer [block of queries, block of gallery] if the scorer can."""
        rows, columns = self.queries[queries].float(), self.gallery[gallery].float()
        out = buffer.flatten()[: len(rows) * len(columns)].view(len(rows), len(columns))
        return self.scorer.block(rows, columns, out=out).float()

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

    def bounds(self, queries: slice, gallery: slice, band: float) -> list[tuple[Tensor, bool]]:
        """fp32 [L]: what is below the first is behind, what is not below the second ahead. Each with `backward`."""
        score = self.score[gallery if self.backward else queries].float()
        return [(score - band, self.backward), ((score + band).nextafter(score.new_tensor(torch.inf)), self.backward)]

    def count(self, scores_qg: Tensor, queries: slice, gallery: slice, counts: list[Tensor], table: ScoreTable) -> None:
        """Add the candidates of a block, given how many of each line's scores are not below its bounds."""
        lines, across = (gallery, queries) if self.backward else (queries, gallery)
        scores = scores_qg.T if self.backward else scores_qg  # [L, N] of the block
        low, high = (bound for bound, _ in self.bounds(queries, gallery, table.scorer.band))
        line, candidate = (each.to(scores.device) for each in self.kept_out.inside(lines, across))
        kept_out = scores[line, candidate]
        not_behind = counts[0].index_add_(0, line, (kept_out < low[line]).long() - 1)
        ahead = counts[1].index_add_(0, line, (kept_out < high[line]).long() - 1)
        self.ahead[lines] += ahead
        unsure = (not_behind > ahead).nonzero().flatten()
        if len(unsure):
            chosen = scores_qg.index_select(int(self.backward), unsure)  # along memory: a transpose is copied slowly
            chosen = chosen.T if self.backward else chosen
            near = (chosen >= low[unsure, None]) & (chosen < high[unsure, None])
            number = torch.full_like(ahead, -1).index_copy_(0, unsure, torch.arange(len(unsure), device=unsure.device))
            found = number[line] >= 0
            near[number[line[found]], candidate[found]] = False
            number, other = near.nonzero(as_tuple=True)
            self._settle(lines.start + unsure[number], across.start + other, table)

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
        sizes = min(blocks[0], len(table.queries)), min(blocks[1], len(table.gallery))
        buffer = torch.empty(sizes, device=table.queries.device)  # new memory for every block costs a CPU a tenth
        for gallery, queries in itertools.islice(every, share[0], None, share[1]):
            scores_qg = table.block(queries, gallery, buffer)
            bounds = [bound for each in targets for bound in each.bounds(queries, gallery, table.scorer.band)]
            counts = iter(_not_below(scores_qg, bounds))
            for each in targets:
                each.count(scores_qg, queries, gallery, [next(counts), next(counts)], table)


def blocks_of(length: int, size: int) -> list[slice]:
    """0 .. length in slices of at most `size`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _not_below(scores_qg: Tensor, bounds: list[tuple[Tensor, bool]]) -> list[Tensor]:
    """Per bound (of each row of the block, or backward of each column) how many scores are not below it, int64 [L].

    The block is taken in pieces that stay in the cache for all bounds. Flags are fp32: they add up several times faster
    than bools, and exactly up to 2^24.
    """
    rows, columns = scores_qg.shape
    size = max(1, PIECE // columns) if scores_qg.device.type == "cpu" else rows
    buffer = scores_qg.new_empty(size, columns)
    below = [torch.zeros_like(bound) for bound, _ in bounds]
    for piece in blocks_of(rows, size):
        scores, flags = scores_qg[piece], buffer[: piece.stop - piece.start]
        for (bound, backward), count in zip(bounds, below, strict=True):
            if backward:
                count += torch.lt(scores, bound, out=flags).sum(0)
            else:
                torch.sum(torch.lt(scores, bound[piece, None], out=flags), 1, out=count[piece])
    return [(rows if backward else columns) - count.long() for (_, backward), count in zip(bounds, below, strict=True)]
