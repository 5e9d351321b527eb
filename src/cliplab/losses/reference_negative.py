"""InfoNCE with each query's own reference image and its mined images as negatives (MegaPairs, Zhou et al., 2024)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cliplab.losses.gather import gather
from cliplab.losses.rows import shares, sum_over_rows
from cliplab.precision import at_least_fp32, exact_fp32


def reference_negative(
    query: Tensor,
    target: Tensor,
    scale: Tensor,
    *,
    reference: Tensor,
    negatives: Tensor | None = None,
    target_id: Tensor | None = None,
) -> Tensor:
    """BGE-VL's loss: a query must not just return the image that it was asked with -> scalar.

    L = -1/B sum_i log e^{s <q_i, y_i>} / (sum_j e^{s <q_i, y_j>} + sum_h e^{s <q_i, n_ih>}), s = scale.
    n_i0 is `reference` [B, D], the others are `negatives` [B, N, D] where the data set has them; all of unit length.
    The targets y_j are those of all processes, the negatives n_ih those of row i alone: whether BGE-VL shares them
    between rows is unpublished. query, target [B, D]. Computed in fp32 at least.
    target_id [B] int64: equal ids are positives of each other and share the mass, as in `info_nce`.
    """
    own = reference[:, None] if negatives is None else torch.cat([reference[:, None], negatives], dim=1)
    query, target, own = (gather(at_least_fp32(each)) for each in (query, target, own))
    ids = gather(target_id) if target_id is not None else None

    def of_rows(rows: slice) -> Tensor:
        with exact_fp32(query.device):
            against_own = (query[rows, None] * own[rows]).sum(-1)
            logits = at_least_fp32(scale) * torch.cat([query[rows] @ target.T, against_own], dim=1)
            wanted = F.pad(shares(rows, ids, len(target), logits), (0, own.shape[1]))
            return F.cross_entropy(logits, wanted, reduction="sum")

    return sum_over_rows(of_rows, len(query)) / len(query)
