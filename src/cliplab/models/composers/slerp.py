"""Slerp (Jang et al., ECCV 2024): the query lies on the arc between image and text; nothing is learned."""

from typing import Any

import torch
from torch import Tensor

from cliplab.errors import UserError
from cliplab.models.composers.composer import Composer, unit

_NEARLY_PARALLEL = 0.9995  # |c| above it: sin(theta) is too small to divide by


class Slerp(Composer):
    """Spherical interpolation; `alpha` is the text's share: 0.8 for FashionIQ and CIRCO, 0.9 for CIRR in the paper.

    c = <n(i), n(t)>, theta = acos(c)
    q = n(sin((1 - alpha) theta) / sin(theta) n(i) + sin(alpha theta) / sin(theta) n(t)),  |c| <= 0.9995
    q = n((1 - alpha) n(i) + alpha n(t)),  else
    """

    def __init__(self, alpha: float = 0.8) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(f"composer 'slerp' needs alpha in [0, 1], got {alpha}")
        self.alpha = alpha

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """[B, D], [B, D] -> [B, D]."""
        image, text = unit(reference), unit(text)
        cosine = (image * text).sum(dim=-1, keepdim=True)
        parallel = cosine.abs() > _NEARLY_PARALLEL
        # The branch that is not taken has gradients too, and 0 times infinity is NaN: it gets a harmless angle.
        theta = torch.acos(cosine.masked_fill(parallel, 0))
        image_share = torch.where(parallel, 1 - self.alpha, torch.sin((1 - self.alpha) * theta) / torch.sin(theta))
        text_share = torch.where(parallel, self.alpha, torch.sin(self.alpha * theta) / torch.sin(theta))
        return unit(image_share * image + text_share * text)
