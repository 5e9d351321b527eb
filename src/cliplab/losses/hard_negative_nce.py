"""HN-NCE: InfoNCE whose harder negatives weigh more (Radenovic et al., CVPR 2023), as CoVR trains with."""

import math

import torch
from torch import Tensor

from cliplab.errors import UserError
from cliplab.losses.gather import gather
from cliplab.losses.info_nce import Score, cosine_scores
from cliplab.precision import at_least_fp32, exact_fp32


def hard_negative_nce(
    query: Tensor,
    target: Tensor,
    scale: Tensor,
    score: Score = cosine_scores,
    *,
    alpha: float = 1.0,
    beta: float = 0.5,
    released: bool = False,
) -> Tensor:
    """The sum of both directions, over the batch of all processes -> scalar.

    S = scale * score(Q, Y); w_ij = (B-1) exp(beta S_ij) / sum_{k != i} exp(beta S_ik) for j != i, w_ii = alpha
    L = mean_i [log sum_j w_ij exp(S_ij) - S_ii] + the same over columns.
    query [B, ...], target [B, D]. Computed by log-sum-exp in fp32 at least; the weights carry gradients, as in CoVR's
    code. alpha 1 and beta 0 give twice the symmetric InfoNCE. `released`: in the direction of the rows that code
    divides w_ij by the sum of row j instead of row i. Raises UserError for a batch of one and alpha or beta below 0.
    """
    query, target = gather(at_least_fp32(query)), gather(at_least_fp32(target))
    if len(query) < 2 or not (0 <= alpha < math.inf and 0 <= beta < math.inf):
        raise UserError(
            "loss 'hard_negative_nce' needs a batch of 2 or more (data.batch_size), and finite alpha and beta of 0 or "
            f"more, got {len(query)}, {alpha}, {beta}"
        )
    with exact_fp32(query.device):
        logits = at_least_fp32(scale) * score(query, target)
        return _one_way(logits, alpha, beta, released) + _one_way(logits.T, alpha, beta, False)


def _one_way(logits: Tensor, alpha: float, beta: float, by_column: bool) -> Tensor:
    """Over the rows of [B, B] -> scalar. `by_column`: entry ij is divided by the sum of row j."""
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    others = (beta * logits).masked_fill(own, -torch.inf)
    sums = others.logsumexp(dim=1)  # [B]
    log_weights = math.log(len(logits) - 1) + beta * logits - (sums[None, :] if by_column else sums[:, None])
    log_alpha = math.log(alpha) if alpha > 0 else -math.inf
    weighted = torch.where(own, logits + log_alpha, log_weights + logits)
    return (weighted.logsumexp(dim=1) - logits.diagonal()).mean()
