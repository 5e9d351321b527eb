"""FiLM (Perez et al., AAAI 2018), the vector form: the text scales and shifts the image feature."""

from typing import Any

import torch
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.composers.composer import Composer, unit


class FiLM(Composer):
    """[gamma; beta] = Lin(h, 2d) . ReLU . Lin(d, h) t,  q = n(gamma o i + beta); h = d unless `hidden_dim` says else.

    TIRG's paper reports FiLM as a baseline without its depth: one hidden layer is our choice, and so is the start, a
    bias of 1 for gamma and 0 for beta.
    """

    def __init__(self, embed_dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        hidden = embed_dim if hidden_dim is None else hidden_dim
        if hidden < 1:
            raise UserError(f"composer 'film' needs hidden_dim of 1 or more, got {hidden}")
        last = nn.Linear(hidden, 2 * embed_dim)
        with torch.no_grad():
            last.bias.copy_(torch.cat([torch.ones(embed_dim), torch.zeros(embed_dim)]))
        self.layers = nn.Sequential(nn.Linear(embed_dim, hidden), nn.ReLU(), last)

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """[B, D], [B, D] -> [B, D]."""
        gamma, beta = self.layers(text).chunk(2, dim=-1)
        return unit(gamma * reference + beta)
