"""TIRG (Vo et al., CVPR 2019), the vector form."""

from typing import Any

import torch
from torch import Tensor, nn

from cliplab.models.composers.composer import Composer, unit


class TIRG(Composer):
    """A gate on the image feature plus a residual, both from BN([i; t]).

    gate = Lin(2d, d) . ReLU . BN, res = Lin(2d, d) . ReLU . Lin(2d, 2d) . ReLU . BN   (right to left)
    q = n(a0 sigmoid(gate) o i + a1 res), a0 = 1 and a1 = 10 at the start, learned.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        both = 2 * embed_dim
        self.gate = nn.Sequential(nn.BatchNorm1d(both), nn.ReLU(), nn.Linear(both, embed_dim))
        self.residual = nn.Sequential(
            nn.BatchNorm1d(both), nn.ReLU(), nn.Linear(both, both), nn.ReLU(), nn.Linear(both, embed_dim)
        )
        self.weights = nn.Parameter(torch.tensor([1.0, 10.0]))

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """[B, D], [B, D] -> [B, D]."""
        both = torch.cat([reference, text], dim=-1)
        gated = torch.sigmoid(self.gate(both)) * reference
        return unit(self.weights[0] * gated + self.weights[1] * self.residual(both))
