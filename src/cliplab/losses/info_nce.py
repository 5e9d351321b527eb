"""InfoNCE (van den Oord et al., 2018): CLIP's symmetric form and the one-way form of CLIP4Cir and ARTEMIS."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cliplab.losses.gather import gather
from cliplab.precision import exact_fp32

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
    with exact_fp32(query.device):
        query, target = gather(_at_least_fp32(query)), gather(_at_least_fp32(target))
        logits = _at_least_fp32(scale) * score(query, target)
        labels = _labels(logits, target_id)
        rows = F.cross_entropy(logits, labels)
        return (rows + F.cross_entropy(logits.T, labels)) / 2 if symmetric else rows


def _labels(logits: Tensor, target_id: Tensor | None) -> Tensor:
    """The row of each row's target [B] int64, or with ids the share of each [B, B]; the same for the columns."""
    if target_id is None:
        return torch.arange(len(logits), device=logits.device)
    ids = gather(target_id)
    same = (ids[:, None] == ids[None, :]).to(logits.dtype)
    return same / same.sum(dim=1, keepdim=True)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
