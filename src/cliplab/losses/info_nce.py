"""InfoNCE (van den Oord et al., 2018): CLIP's symmetric form and the one-way form of CLIP4Cir and ARTEMIS."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cliplab.losses.gather import gather
from cliplab.precision import exact_fp32

KEPT = 2**24  # logits that are kept for the backward pass: beyond it (a batch of 4,096), they are computed twice
CHUNK = 2**22  # logits at a time then

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
    query, target = gather(_at_least_fp32(query)), gather(_at_least_fp32(target))
    ids = gather(target_id) if target_id is not None else None
    if len(query) ** 2 > KEPT:
        return _by_chunks(query, target, scale, score, symmetric, ids)
    everything = slice(0, len(query))
    with exact_fp32(query.device):
        logits = _at_least_fp32(scale) * score(query, target)
        labels = _labels(everything, logits, ids)
        rows = F.cross_entropy(logits, labels)
        return (rows + F.cross_entropy(logits.T, labels)) / 2 if symmetric else rows


def _by_chunks(
    query: Tensor, target: Tensor, scale: Tensor, score: Score, symmetric: bool, ids: Tensor | None
) -> Tensor:
    """The same, with the logits of some rows (or columns) at a time, which the backward pass computes again."""
    size = max(1, CHUNK // len(query))

    def of_chunk(rows: slice, columns: bool) -> Tensor:
        with exact_fp32(query.device):
            scores = score(query, target[rows]).T if columns else score(query[rows], target)
            logits = _at_least_fp32(scale) * scores
            return F.cross_entropy(logits, _labels(rows, logits, ids), reduction="sum")

    chunks = [slice(start, min(start + size, len(query))) for start in range(0, len(query), size)]
    directions = (False, True) if symmetric else (False,)
    parts = [checkpoint(of_chunk, rows, columns, use_reentrant=False) for columns in directions for rows in chunks]
    return torch.stack(parts).sum() / (len(query) * len(directions))  # type: ignore[arg-type]


def _labels(rows: slice, logits: Tensor, ids: Tensor | None) -> Tensor:
    """The target of each of some rows [n] int64, or with ids the share of each [n, B]; the same for the columns."""
    if ids is None:
        return torch.arange(rows.start, rows.stop, device=logits.device)
    same = (ids[rows, None] == ids[None, :]).to(logits.dtype)
    return same / same.sum(dim=1, keepdim=True)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
