"""Counts what is ahead of targets, block by block: each block serves all targets, no Q x G matrix is kept.

A score in fp32 depends on the shape of the matrix product that made it. Candidates whose fp32 score lies within a band
around the target's are therefore scored again as float64 rows, in an order of additions that is the same for every
shape and device, and only then compared. Counts are so equal for every block size and number of processes.

A line is a query that looks along the gallery (a row of scores_qg [Q, G]) or, backward, a gallery row that looks along
the queries (a column). L lines, N candidates across them.
"""

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cliplab.evaluation.rounding import RoundingErrors, rounds_products
from cliplab.evaluation.scoring import Scorer
from cliplab.precision import exact_fp32, matmul_precision

PIECE = 2**18  # numbers that a cache holds
SEGMENT = 128  # candidates that are looked through together for those near a target


class Pairs:
    """(line, candidate) pairs sorted by line: positives, or what is kept out of a ranking. int64 [P], on the CPU."""

    def __init__(self, candidates_of_line: Iterable[Collection[int]]) -> None:
        rows = list(candidates_of_line)
        self.counts = torch.from_numpy(np.fromiter(map(len, rows), np.int64, len(rows)))  # [L]
        self.line = torch.repeat_interleave(torch.arange(len(rows)), self.counts)
        flat = itertools.chain.from_iterable(rows)
        self.candidate = torch.from_numpy(np.fromiter(flat, np.int64, len(self.line)))

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

    @property
    def can_round(self) -> bool:
        """Whether the scores are products that the hardware multiplies faster from rounded operands."""
        return self.scorer.is_product and rounds_products(self.queries.device.type)

    @property
    def band(self) -> float:
        """How far a fp32 score may be from its exact one."""
        return self.scorer.band(self.gallery.shape[-1])

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
        parts = [
            self.scorer.pairs(self.queries.index_select(0, rows[p]), self.gallery.index_select(0, columns[p]))
            for p in blocks_of(len(rows), size)
        ]
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
        self.near: list[tuple[Tensor, Tensor]] = []  # (line, candidate) pairs that are to be compared exactly

    def bounds(self, queries: slice, gallery: slice, band: float) -> tuple[Tensor, Tensor]:
        """fp32 [L] (low, high) of a block's lines: what is below low is behind, what is not below high is ahead."""
        score = self.score[gallery if self.backward else queries].float()
        return score - band, (score + band).nextafter(score.new_tensor(torch.inf))

    def count(self, block: "Block", below: Tensor) -> None:
        """Add the candidates of a block; below fp32 [2, S, L]: in each segment, how many are below low and high."""
        lines, across = (block.gallery, block.queries) if self.backward else (block.queries, block.gallery)
        scores = block.scores_qg.T if self.backward else block.scores_qg  # [L, N] of the block
        low, high = self.bounds(block.queries, block.gallery, block.band)
        kept_out = line, candidate = tuple(each.to(scores.device) for each in self.kept_out.inside(lines, across))
        theirs, place = scores[kept_out], (candidate // SEGMENT, line)
        for found, bound in zip(below, (low, high), strict=True):
            found.index_put_(place, (~(theirs < bound[line])).float(), accumulate=True)
        self.ahead[lines] += below.shape[1] * SEGMENT - below[1].sum(0).long()
        segment, unsure = (below[0] < below[1]).nonzero(as_tuple=True)
        if len(unsure):
            scores[kept_out] = -torch.inf
            other = segment[:, None] * SEGMENT + torch.arange(SEGMENT, device=scores.device)
            chosen = scores[unsure[:, None], other.clamp(max=scores.shape[1] - 1)]
            is_near = (chosen >= low[unsure, None]) & (chosen < high[unsure, None]) & (other < scores.shape[1])
            scores[kept_out] = theirs
            number, column = is_near.nonzero(as_tuple=True)
            self.near.append((lines.start + unsure[number], across.start + other[number, column]))

    def settle(self, table: ScoreTable, most: int = 0) -> None:
        """Compare the near candidates exactly, if there are more than `most`."""
        if sum(len(line) for line, _ in self.near) <= most:
            return
        line, candidate = (torch.cat(each) for each in zip(*self.near, strict=True))
        ahead, ties = compare(table.pairs(line, candidate, self.backward), self.score[line], table.scorer.tie)
        self.ahead.index_add_(0, line, ahead)
        self.ties.index_add_(0, line, ties)
        self.near.clear()


def compare(scores: Tensor, targets: Tensor, tie: float) -> tuple[Tensor, Tensor]:
    """float64 scores [P] of candidates and of their targets -> int64 [P] (is ahead, ties), 0 or 1."""
    difference = scores - targets
    ties = difference.abs() <= tie
    return (~(difference < 0) & ~ties).long(), ties.long()  # what is not a number is ahead


@dataclass(frozen=True)
class Block:
    """fp32 scores of some queries and some gallery rows; where they differ by `band` or less, they order nothing."""

    scores_qg: Tensor
    queries: slice
    gallery: slice
    band: float


class Scores:
    """Block after block of a table's scores in one buffer: new memory for each costs a CPU a tenth of its time."""

    def __init__(self, table: ScoreTable, blocks: tuple[int, int]) -> None:
        self.table, self.errors = table, RoundingErrors(table.queries, table.gallery)
        sizes = min(blocks[0], len(table.queries)), min(blocks[1], len(table.gallery))
        self.buffer = torch.empty(sizes, device=table.queries.device)

    def block(self, queries: slice, gallery: slice, rounded: bool = False) -> Block:
        """Until the next one is asked for. `rounded`: from operands in bf16, with the band that this needs."""
        if not rounded:
            return Block(self.table.block(queries, gallery, self.buffer), queries, gallery, self.table.band)
        with matmul_precision("medium"):
            scores_qg = self.table.block(queries, gallery, self.buffer)
        return Block(scores_qg, queries, gallery, self.errors.band(queries, gallery))


class FirstLook:
    """Scores a block from rounded operands first, where the hardware then multiplies faster and few scores get near.

    Trained features leave few candidates within the wider band. Where they are many, blocks are scored in fp32, and a
    rounded look is tried again only after a while.
    """

    PAUSE = 64  # blocks
    FEW = 1 / 1000  # share of a block: to compare more of them exactly costs what the faster product saves

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self.pause: float = 0 if scores.table.can_round else float("inf")

    def block(self, targets: Sequence[Targets], queries: slice, gallery: slice) -> tuple[Block, list[Tensor]]:
        """The scores of a block, and per target how many of each segment are below its bounds."""
        if self.pause == 0:
            block = self.scores.block(queries, gallery, rounded=True)
            below = _below(block, targets)
            if sum(int((high - low).sum()) for low, high in below) <= len(below) * self.FEW * block.scores_qg.numel():
                return block, below
            self.pause = self.PAUSE + 1
        self.pause -= 1
        block = self.scores.block(queries, gallery)
        return block, _below(block, targets)


@torch.no_grad()
def count_ahead(
    targets: Sequence[Targets], table: ScoreTable, blocks: tuple[int, int], share: tuple[int, int] = (0, 1)
) -> None:
    """One pass over blocks of (queries, gallery) for all targets; of share (i, n), process i of n does every nth."""
    with exact_fp32(table.queries.device):
        every = itertools.product(blocks_of(len(table.gallery), blocks[1]), blocks_of(len(table.queries), blocks[0]))
        look = FirstLook(Scores(table, blocks))
        for gallery, queries in itertools.islice(every, share[0], None, share[1]):
            block, below = look.block(targets, queries, gallery)
            for each, found in zip(targets, below, strict=True):
                each.count(block, found)
                each.settle(table, most=PIECE)
        for each in targets:
            each.settle(table)


def blocks_of(length: int, size: int) -> list[slice]:
    """0 .. length in slices of at most `size`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _below(block: Block, targets: Sequence[Targets]) -> list[Tensor]:
    """Per target, fp32 [2, S, L]: of each segment of a line, how many scores are below its low and its high bounds.

    The block is taken in pieces that stay in the cache for all bounds. Flags are fp32: they add up several times faster
    than bools, and exactly. What lies beyond the block is flagged as below.
    """
    scores_qg, rows, columns = block.scores_qg, *block.scores_qg.shape
    down, across = (-(-each // SEGMENT) for each in (rows, columns))
    size = min(down, max(1, PIECE // (across * SEGMENT**2))) if scores_qg.device.type == "cpu" else down
    flags = scores_qg.new_empty(size * SEGMENT, across * SEGMENT)
    flags[:, columns:] = 1
    bounds = [each.bounds(block.queries, block.gallery, block.band) for each in targets]
    below = [scores_qg.new_empty(2, *((down, columns) if each.backward else (across, rows))) for each in targets]
    for segments in blocks_of(down, size):
        piece = slice(segments.start * SEGMENT, min(segments.stop * SEGMENT, rows))
        scores, count = scores_qg[piece], segments.stop - segments.start
        flags[len(scores) :] = 1
        for each, both, found in zip(targets, bounds, below, strict=True):
            for number, bound in enumerate(both):
                torch.lt(scores, bound if each.backward else bound[piece, None], out=flags[: len(scores), :columns])
                if each.backward:
                    torch.sum(flags.view(size, SEGMENT, -1)[:count, :, :columns], 1, out=found[number, segments])
                else:
                    by_segment = flags.view(len(flags), across, SEGMENT)[: len(scores)]
                    torch.sum(by_segment, 2, out=found[number].T[piece])
    return below
