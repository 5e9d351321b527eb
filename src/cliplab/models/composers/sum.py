"""Addition of features: stage 1 of CLIP4Cir, BGE-VL (raw); late fusion of Pic2Word and ARTEMIS (normalised)."""

from typing import Any

from torch import Tensor

from cliplab.models.composers.composer import Composer, unit


class Sum(Composer):
    """q = n(i + t), or n(n(i) + n(t)). Two models: raw, the ratio of the feature norms is a hidden weight."""

    def __init__(self, normalize_inputs: bool = False) -> None:
        super().__init__()
        self.normalize_inputs = normalize_inputs

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """[B, D], [B, D] -> [B, D]."""
        if self.normalize_inputs:
            reference, text = unit(reference), unit(text)
        return unit(reference + text)
