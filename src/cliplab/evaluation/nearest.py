"""The best candidates of each query, in exact order, from blocks of scores; no Q x G matrix is kept."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cliplab.evaluation.counting import Pairs, Scores, ScoreTable, blocks_of
from cliplab.evaluation.scoring import CosineScorer, Scorer
from cliplab.precision import exact_fp32

BLOCKS = (1024, 4096)  # (queries, gallery)
SPARE = 16  # candidates beyond the best k: they are rarely needed, and then all near ones are looked up


@torch.no_grad()
def top_k(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    excluded: Sequence[Sequence[int]] | None = None,
    scorer: Scorer | None = None,
) -> Tensor:
    """Gallery rows of the k best candidates, int64 [Q, min(k, G)], best first, of equal ones the lower row first.

    queries [Q, ...], gallery [G, D]: unit vectors of any precision; float64 scores decide. Excluded rows come last.
    """
    table, k = ScoreTable(queries, gallery, scorer or CosineScorer()), min(k, len(gallery))
    excluded = excluded if excluded is not None else [()] * len(queries)
    chosen = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    unsettled = torch.arange(len(queries), device=queries.device)
    with exact_fp32(queries.device):
        for rounded in ((True, False) if table.can_round else (False,)) if k else ():
            part = ScoreTable(queries[unsettled], gallery, table.scorer)
            kept_out = Pairs(excluded[query] for query in unsettled.tolist())
            settled = []
            for rows in blocks_of(len(unsettled), BLOCKS[0]):
                found, is_settled = _short_lists(part, rows, k, kept_out, rounded)
                chosen[unsettled[rows]] = found
                settled.append(is_settled)
            unsettled = unsettled[~torch.cat(settled)] if settled else unsettled
        for query in unsettled.tolist():
            chosen[query] = _by_looking_at_all(table, query, k, excluded[query])
    return chosen


def _short_lists(table: ScoreTable, queries: slice, k: int, kept_out: Pairs, rounded: bool) -> tuple[Tensor, Tensor]:
    """Of n queries the best [n, k], by block scores and then by exact ones; and [n]: whether they are sure to be."""
    wide = min(2 * k + SPARE, len(table.gallery))
    scores = Scores(table, BLOCKS)
    best = torch.full((queries.stop - queries.start, wide), -torch.inf, device=table.queries.device)
    rows = torch.zeros_like(best, dtype=torch.int64)
    band = 0.0
    for gallery in blocks_of(len(table.gallery), BLOCKS[1]):
        block = scores.block(queries, gallery, rounded)
        band = max(band, block.band)
        block.scores_qg[tuple(each.to(best.device) for each in kept_out.inside(queries, gallery))] = -torch.inf
        promising = (~(block.scores_qg.amax(1) <= best[:, -1])).nonzero().flatten()  # few, once some blocks are read
        if len(promising):
            candidates = block.scores_qg.index_select(0, promising).nan_to_num(-torch.inf, torch.inf, -torch.inf)
            found, place = candidates.topk(min(wide, candidates.shape[1]), 1)
            both = torch.cat([best[promising], found], 1)
            which = torch.cat([rows[promising], place + gallery.start], 1)
            best[promising], order = both.topk(wide, 1)
            rows[promising] = which.gather(1, order)
    line = torch.arange(queries.start, queries.stop, device=rows.device).repeat_interleave(wide)
    exact = table.pairs(line, rows.flatten(), backward=False).view_as(rows)
    settled = best[:, -1] > -torch.inf
    if wide < len(table.gallery):
        settled &= best[:, k - 1] - best[:, -1] > 2 * band
    return _in_order(exact, rows)[:, :k], settled


def _by_looking_at_all(table: ScoreTable, query: int, k: int, excluded: Sequence[int]) -> Tensor:
    """Rows [k] of one query whose candidates are too close for its short list: all that are near are compared."""
    everything = slice(0, len(table.gallery))
    buffer = torch.empty(1, len(table.gallery), device=table.queries.device)
    scores = table.block(slice(query, query + 1), everything, buffer)[0].nan_to_num(-torch.inf, torch.inf, -torch.inf)
    scores[[*excluded]] = -torch.inf
    near = (scores >= scores.topk(k).values[-1] - 2 * table.band).nonzero().flatten()
    exact = table.pairs(torch.full_like(near, query), near, backward=False)
    return _in_order(exact.where(scores[near] > -torch.inf, -torch.inf)[None], near[None])[0, :k]


def _in_order(scores: Tensor, rows: Tensor) -> Tensor:
    """Rows [n, m] by falling score [n, m], equal ones by rising row; what is not a number comes last."""
    by_row = rows.argsort(1)
    scores = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).gather(1, by_row)
    return rows.gather(1, by_row.gather(1, scores.argsort(dim=1, descending=True, stable=True)))
