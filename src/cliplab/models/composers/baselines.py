"""The baselines every table needs: a benchmark that one modality solves measures no composition."""

from typing import Any

from torch import Tensor

from cliplab.models.composers.composer import Composer, unit


class ImageOnly(Composer):
    """q = n(i)."""

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """[B, D], [B, D] -> [B, D]."""
        return unit(reference)


class TextOnly(Composer):
    """q = n(t)."""

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """[B, D], [B, D] -> [B, D]."""
        return unit(text)
