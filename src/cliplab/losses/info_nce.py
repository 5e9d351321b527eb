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
) -> Tensor:
    """Cross-entropy of each query over the targets of all processes -> scalar.

    L = -1/B sum_i log softmax_j(scale * score(q_i, y_j))_i; symmetric: the mean with the same over columns.
    query [B, ...], target [B, D]: row i of one belongs to row i of the other. Computed in fp32 at least.
    """
    with exact_fp32(query.device):
        query, target = gather(_at_least_fp32(query)), gather(_at_least_fp32(target))
        logits = _at_least_fp32(scale) * score(query, target)
        labels = torch.arange(len(logits), device=logits.device)
        rows = F.cross_entropy(logits, labels)
        return (rows + F.cross_entropy(logits.T, labels)) / 2 if symmetric else rows


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
