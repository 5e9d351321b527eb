"""Exact ranks by counting over gallery blocks; no Q x G matrix is kept.

A score in fp32 depends on the shape of the matrix product that made it. Candidates whose fp32 score lies within a band
around the target's are therefore scored again as float64 rows, in an order of additions that is the same for every
shape and device, and only then compared. Ranks and ties are so equal for every block size and number of processes.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cliplab.precision import exact_fp32


class Scorer(Protocol):
    """How queries and gallery are compared: fast in blocks, exactly in pairs."""

    band: float  # two fp32 block scores further apart than this are ordered rightly
    tie: float  # two exact scores at most this far apart are equal

    def block(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """[Q, ...], [G, D] -> fp32 scores_qg [Q, G]."""
        ...

    def pairs(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """[N, ...], [N, D] -> float64 scores [N] of row n with row n."""
        ...


class CosineScorer:
    """Dot products of unit vectors."""

    band = 4e-6  # 1e-6 is enough for most; at D = 768 a row dot and its entry of a product differed by up to 7.5e-7
    tie = 0.0

    def block(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """[Q, D], [G, D] -> [Q, G]."""
        return queries @ gallery.T

    def pairs(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """[N, D], [N, D] -> [N]: exact products, added up by halving, an order that no shape or device changes."""
        terms = queries.double() * gallery.double()
        width = 1 << max(terms.shape[1] - 1, 0).bit_length()
        terms = nn.functional.pad(terms, (0, width - terms.shape[1]))
        while terms.shape[1] > 1:
            half = terms.shape[1] // 2
            terms = terms[:, :half] + terms[:, half:]
        return terms[:, 0]


class JointScorer:
    """A composer that scores queries and gallery jointly; exact means in float64, ties within 1e-12."""

    band = 2e-5  # such scores are sums of quotients: less exact in fp32 than a dot product
    tie = 1e-12

    def __init__(self, composer: Any) -> None:  # a module with score([Q, ...], [G, D]) -> [Q, G]
        self.composer = composer
        self.exact = copy.deepcopy(composer).double().eval()

    def block(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """[Q, ...], [G, D] -> [Q, G]."""
        weights = next(self.composer.parameters(), queries)
        return self.composer.score(queries.to(weights.dtype), gallery.to(weights.dtype))

    def pairs(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """[N, ...], [N, D] -> [N]."""
        return torch.vmap(self._one)(queries.double(), gallery.double())

    def _one(self, query: Tensor, target: Tensor) -> Tensor:
        return self.exact.score(query[None], target[None])[0, 0]


@dataclass(frozen=True)
class Ranks:
    """Per query: the pessimistic rank (all ties ahead of the target) and how many candidates tie with it. [Q] int64."""

    pessimistic: Tensor
    ties: Tensor

    def under(self, rule: str) -> Tensor:
        """float64 ranks [Q] under a protocol's tie rule: pessimistic, optimistic or mean."""
        share = {"pessimistic": 0.0, "mean": 0.5, "optimistic": 1.0}[rule]
        return self.pessimistic.double() - share * self.ties


class Pairs:
    """(row of a query, row of the gallery) pairs, sorted by query: positives or what is kept out of a ranking."""

    def __init__(self, rows_of_query: Sequence[Sequence[int]]) -> None:
        counts = torch.tensor([len(rows) for rows in rows_of_query], dtype=torch.int64)
        self.query = torch.repeat_interleave(torch.arange(len(rows_of_query)), counts)
        self.gallery = torch.tensor([row for rows in rows_of_query for row in rows], dtype=torch.int64)

    def inside(self, queries: slice, gallery: slice) -> tuple[Tensor, Tensor]:
        """The pairs of a block, as rows and columns of the block."""
        keep = (self.query >= queries.start) & (self.query < queries.stop)
        keep &= (self.gallery >= gallery.start) & (self.gallery < gallery.stop)
        return self.query[keep] - queries.start, self.gallery[keep] - gallery.start


@torch.no_grad()
def rank_positives(
    queries: Tensor,
    gallery: Tensor,
    positives: Sequence[Sequence[int]],
    excluded: Sequence[Sequence[int]] | None = None,
    scorer: Scorer | None = None,
    query_block: int = 1024,
    gallery_block: int = 8192,
) -> Ranks:
    """Rank of the best positive of each query among the gallery rows that are neither positive nor excluded.

    rank = 1 + #{j : s_j > max_p s_p} (+ #{j : s_j = max_p s_p}, the ties). queries [Q, ...] and gallery [G, D] fp32
    unit vectors; positives and excluded: gallery rows by query. A score that is not a number counts against the target.
    """
    scorer = scorer or CosineScorer()
    queries, gallery = queries.float(), gallery.float()
    positive_pairs = Pairs(positives)
    assert len(positives) == len(queries), "one list of positives per query"
    assert bool((torch.bincount(positive_pairs.query, minlength=len(queries)) > 0).all()), "a query has no positive"
    kept_out = Pairs([sorted({*p, *e}) for p, e in zip(positives, excluded or [()] * len(positives), strict=True)])
    best = _best_positive(queries, gallery, positive_pairs, scorer)
    ahead = torch.zeros(len(queries), dtype=torch.int64)
    ties = torch.zeros(len(queries), dtype=torch.int64)
    with exact_fp32(queries.device):
        for q, g in itertools.product(_blocks(len(queries), query_block), _blocks(len(gallery), gallery_block)):
            block_ahead, block_ties = _count_block(queries[q], gallery[g], best[q], kept_out.inside(q, g), scorer)
            ahead[q] += block_ahead.cpu()
            ties[q] += block_ties.cpu()
    return Ranks(1 + ahead + ties, ties)


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _best_positive(queries: Tensor, gallery: Tensor, positives: Pairs, scorer: Scorer) -> Tensor:
    """float64 [Q]: the exact score of each query's best positive; not a number if any of them is none."""
    scores = _exact(queries, gallery, positives.query, positives.gallery, scorer)
    best = torch.full((len(queries),), -torch.inf, dtype=torch.float64, device=queries.device)
    return best.scatter_reduce(0, positives.query.to(best.device), scores, "amax")


def _count_block(
    queries: Tensor, gallery: Tensor, best: Tensor, kept_out: tuple[Tensor, Tensor], scorer: Scorer
) -> tuple[Tensor, Tensor]:
    """How many candidates of the block are ahead of the target, and how many tie with it: two [Q] int64."""
    margin = scorer.block(queries, gallery).float() - best.float()[:, None]
    margin[kept_out] = -torch.inf
    near = margin.abs() <= scorer.band
    not_behind = ~(margin < -scorer.band)  # also true of what is not a number
    ahead = not_behind.sum(1) - near.sum(1)
    ties = torch.zeros_like(ahead)
    rows, columns = near.nonzero(as_tuple=True)
    if len(rows):
        difference = _exact(queries, gallery, rows, columns, scorer) - best[rows]
        ahead.index_add_(0, rows, (difference > scorer.tie).long())
        ties.index_add_(0, rows, (difference.abs() <= scorer.tie).long())
    return ahead, ties


def _exact(queries: Tensor, gallery: Tensor, rows: Tensor, columns: Tensor, scorer: Scorer) -> Tensor:
    """float64 scores [N] of (query row, gallery row) pairs, in pieces that fit the memory."""
    rows, columns = rows.to(queries.device), columns.to(gallery.device)
    piece = max(1, 2**24 // queries[:1].numel()) if len(queries) else 1
    parts = [scorer.pairs(queries[rows[p]], gallery[columns[p]]) for p in _blocks(len(rows), piece)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=queries.device)


@torch.no_grad()
def top_k(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    excluded: Sequence[Sequence[int]] | None = None,
    scorer: Scorer | None = None,
) -> Tensor:
    """Gallery rows of the k best candidates [Q, min(k, G)], best first; for pictures, ties in any order."""
    scores = (scorer or CosineScorer()).block(queries.float(), gallery.float())
    if excluded is not None:
        scores[Pairs(excluded).inside(slice(0, len(queries)), slice(0, len(gallery)))] = -torch.inf
    return scores.topk(min(k, len(gallery)), dim=1).indices
