"""A weighted sum of unit features: late fusion with one number, learned or fixed."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.composers.composer import Composer, unit


class WeightedSum(Composer):
    """q = n(w n(t) + (1 - w) n(i)), w = sigmoid(b) learned from the start value `text_weight`, or fixed at it."""

    def __init__(self, text_weight: float = 0.5, learned: bool = True) -> None:
        super().__init__()
        if not 0 <= text_weight <= 1 or (learned and text_weight in (0, 1)):
            raise UserError(
                "composer 'weighted_sum' needs text_weight in [0, 1], and neither 0 nor 1 with learned=true (sigmoid "
                f"never gets there), got {text_weight}"
            )
        self.fixed_weight = text_weight
        start = math.log(text_weight / (1 - text_weight)) if learned else 0.0
        self.logit = nn.Parameter(torch.tensor(start)) if learned else None

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """[B, D], [B, D] -> [B, D]."""
        weight = self.fixed_weight if self.logit is None else torch.sigmoid(self.logit)
        return unit(weight * unit(text) + (1 - weight) * unit(reference))
