"""The sigmoid loss of SigLIP (Zhai et al., ICCV 2023)."""

import torch.nn.functional as F
from torch import Tensor

from cliplab.losses.gather import gather
from cliplab.losses.info_nce import Score, cosine_scores
from cliplab.losses.rows import positives, sum_over_rows
from cliplab.precision import at_least_fp32, exact_fp32


def sigmoid(
    query: Tensor,
    target: Tensor,
    scale: Tensor,
    score: Score = cosine_scores,
    *,
    bias: Tensor,
    target_id: Tensor | None = None,
) -> Tensor:
    """Every query with every target of all processes is a pair or it is not -> scalar.

    L = -1/B sum_ij log sigmoid(z_ij (scale * score(q_i, y_j) + bias)), z_ij = 1 where i = j, else -1.
    query [B, ...], target [B, D], scale and bias [] or [1]. Computed in fp32 at least.
    target_id [B] int64: z_ij = 1 wherever the ids of i and j are equal.

    The bias is the model's own logit_bias; a model without one gets it with this loss (see build.py). A fixed scale
    (model.fixed_scale) or a frozen temperature holds the bias as well.
    """
    query, target = gather(at_least_fp32(query)), gather(at_least_fp32(target))
    ids = gather(target_id) if target_id is not None else None

    def of_rows(rows: slice) -> Tensor:
        with exact_fp32(query.device):
            logits = at_least_fp32(scale) * score(query[rows], target) + at_least_fp32(bias)
            signs = 2 * positives(rows, ids, len(target), logits) - 1
            return -F.logsigmoid(signs * logits).sum()

    return sum_over_rows(of_rows, len(query)) / len(query)
