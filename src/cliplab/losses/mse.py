"""Mean squared error: LinCIR (Gu et al., CVPR 2024)."""

import torch.nn.functional as F
from torch import Tensor


def mse(query: Tensor, target: Tensor) -> Tensor:
    """1 / (B D) sum_ij (q_ij - y_ij)^2 -> scalar, in fp32 at least; query and target [B, D], of any length.

    There is no scale. No row knows of another, so nothing is gathered: DDP's mean over processes of equal batches is
    the mean over all rows. Of unit vectors it is (2 - 2 cosine) / D.
    """
    query, target = (x.float() if x.dtype.itemsize < 4 else x for x in (query, target))
    return F.mse_loss(query, target)
