"""CLIP4Cir's Combiner (Baldrati et al., CVPR 2022, TOMM 2023)."""

from typing import Any

import torch
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.composers.composer import Composer, unit
from cliplab.models.dropout import Dropout


class Combiner(Composer):
    """A learned mixture of the two features plus a learned residual.

    t' = Drop(ReLU(Wt t)), i' = Drop(ReLU(Wi i)), c = [t'; i']
    v = Wo Drop(ReLU(Wc c)), l = sigmoid(W2 Drop(ReLU(W1 c)))
    q = n(v + l t + (1 - l) i), with t and i un-normalised.

    The paper has projection_dim = 4 D and hidden_dim = 8 D; those are the defaults.
    """

    def __init__(
        self,
        embed_dim: int,
        projection_dim: int | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        projection = 4 * embed_dim if projection_dim is None else projection_dim
        hidden = 8 * embed_dim if hidden_dim is None else hidden_dim
        if projection < 1 or hidden < 1 or not 0 <= dropout <= 1:
            raise UserError(
                "composer 'combiner' needs projection_dim and hidden_dim of 1 or more and dropout in [0, 1], got "
                f"{projection}, {hidden}, {dropout}"
            )
        self.text_projection = nn.Sequential(nn.Linear(embed_dim, projection), nn.ReLU(), Dropout(dropout))
        self.image_projection = nn.Sequential(nn.Linear(embed_dim, projection), nn.ReLU(), Dropout(dropout))
        self.residual = nn.Sequential(
            nn.Linear(2 * projection, hidden), nn.ReLU(), Dropout(dropout), nn.Linear(hidden, embed_dim)
        )
        self.mixture = nn.Sequential(
            nn.Linear(2 * projection, hidden), nn.ReLU(), Dropout(dropout), nn.Linear(hidden, 1), nn.Sigmoid()
        )

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """[B, D], [B, D] -> [B, D]."""
        combined = torch.cat([self.text_projection(text), self.image_projection(reference)], dim=-1)
        share = self.mixture(combined)  # [B, 1]
        return unit(self.residual(combined) + share * text + (1 - share) * reference)
