"""InfoNCE (van den Oord et al., 2018): CLIP's symmetric form and the one-way form of CLIP4Cir and ARTEMIS.

The one-way form is also TIRG's "batch-based classification" (Vo et al., 2019): its features are scaled unit vectors, so
that scale here is the square of TIRG's (initially 4: fixed_scale 16).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cliplab.losses.gather import gather
from cliplab.losses.rows import is_large, shares, sum_over_rows
from cliplab.precision import at_least_fp32, exact_fp32

Score = Callable[[Tensor, Tensor], Tensor]


def cosine_scores(query: Tensor, target: Tensor) -> Tensor:
    """Unit queries [Q, D], unit targets [G, D] -> scores_qg [Q, G]."""
    return query @ target.T


def info_nce(
    query: Tensor,
    target: Tensor,
    scale: Tensor,
    score: Score = cosine_scores,
    *,
    symmetric: bool = True,
    target_id: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each query over the targets of all processes -> scalar.

    L = -1/B sum_i log softmax_j(scale * score(q_i, y_j))_i; symmetric: the mean with the same over columns.
    query [B, ...], target [B, D]: row i of one belongs to row i of the other. Computed in fp32 at least.
    target_id [B] int64: equal ids are positives of each other and share the mass (BLIP, Li et al., 2022):
    L = -1/B sum_i 1/|P_i| sum_{j in P_i} log softmax_j(scale * score(q_i, y_j)), P_i = {j: id_j = id_i}.
    """
    query, target = gather(at_least_fp32(query)), gather(at_least_fp32(target))
    ids = gather(target_id) if target_id is not None else None
    if is_large(len(query)):
        return _by_chunks(query, target, scale, score, symmetric, ids)
    everything = slice(0, len(query))
    with exact_fp32(query.device):
        logits = at_least_fp32(scale) * score(query, target)
        labels = _labels(everything, logits, ids)
        rows = F.cross_entropy(logits, labels)
        return (rows + F.cross_entropy(logits.T, labels)) / 2 if symmetric else rows


def _by_chunks(
    query: Tensor, target: Tensor, scale: Tensor, score: Score, symmetric: bool, ids: Tensor | None
) -> Tensor:
    """The same, with the logits of some rows (or columns) at a time, which the backward pass computes again."""

    def of_rows(rows: slice) -> Tensor:
        with exact_fp32(query.device):
            logits = at_least_fp32(scale) * score(query[rows], target)
            return F.cross_entropy(logits, _labels(rows, logits, ids), reduction="sum")

    def of_columns(columns: slice) -> Tensor:
        with exact_fp32(query.device):
            logits = at_least_fp32(scale) * score(query, target[columns]).T
            return F.cross_entropy(logits, _labels(columns, logits, ids), reduction="sum")

    directions = (of_rows, of_columns) if symmetric else (of_rows,)
    total = torch.stack([sum_over_rows(direction, len(query)) for direction in directions]).sum()
    return total / (len(query) * len(directions))


def _labels(rows: slice, logits: Tensor, ids: Tensor | None) -> Tensor:
    """The target of each of some rows [n] int64, or with ids the share of each [n, B]; the same for the columns."""
    if ids is None:
        return torch.arange(rows.start, rows.stop, device=logits.device)
    return shares(rows, ids, len(ids), logits)
