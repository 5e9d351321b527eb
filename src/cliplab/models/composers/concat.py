"""Concatenation and two layers: a baseline of TIRG's paper (Vo et al., CVPR 2019), as its code has it."""

from typing import Any

import torch
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.composers.composer import Composer, unit
from cliplab.models.dropout import Dropout


class Concat(Composer):
    """q = n(Lin(2d, d) . Drop . ReLU . BN . Lin(2d, 2d) . ReLU . BN [i; t])   (right to left)."""

    def __init__(self, embed_dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise UserError(f"composer 'concat' needs dropout in [0, 1], got {dropout}")
        both = 2 * embed_dim
        self.layers = nn.Sequential(
            nn.BatchNorm1d(both),
            nn.ReLU(),
            nn.Linear(both, both),
            nn.BatchNorm1d(both),
            nn.ReLU(),
            Dropout(dropout),
            nn.Linear(both, embed_dim),
        )

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """[B, D], [B, D] -> [B, D]."""
        return unit(self.layers(torch.cat([reference, text], dim=-1)))
