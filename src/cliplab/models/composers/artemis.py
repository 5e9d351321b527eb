"""ARTEMIS (Delmas et al., ICLR 2022): the text weighs the dimensions of the target; no single query vector."""

from typing import Any

import torch
from torch import Tensor, nn

from cliplab.models.composers.composer import Composer, unit


class Artemis(Composer):
    """Explicit matching + implicit similarity; r, m, y are the unit features of reference, text and target.

    EM = <Tr(m), n(A_EM(m) o y)>,  IS = <n(A_IS(m) o r), n(A_IS(m) o y)>,  score = EM + IS
    Tr(m) = n(Lin(m)),  A(m) = softmax(Lin(ReLU(Lin(m))))
    """

    output = "score"

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.transform = nn.Linear(embed_dim, embed_dim)
        self.attention_em = _attention(embed_dim)
        self.attention_is = _attention(embed_dim)

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """[B, D], [B, D] -> the pair (r, m) [B, 2, D]; what depends on the text alone is computed by `score`."""
        return torch.stack([unit(reference), unit(text)], dim=1)

    def score(self, query: Tensor, gallery: Tensor) -> Tensor:
        """Pairs [Q, 2, D], unit gallery [G, D] -> scores_qg [Q, G] in [-2, 2].

        As matrix products: <a, n(w o y)> = (a o w) y / sqrt((w o w) (y o y)).
        """
        reference, text = query.unbind(dim=1)
        w_em, w_is = self.attention_em(text), self.attention_is(text)
        explicit = _weighted_cosine(unit(self.transform(text)), w_em, gallery)
        implicit = _weighted_cosine(unit(w_is * reference), w_is, gallery)
        return explicit + implicit


def _attention(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.Softmax(dim=-1))


def _weighted_cosine(anchor: Tensor, weight: Tensor, gallery: Tensor) -> Tensor:
    """<anchor, n(weight o y)> for every y: anchor, weight [Q, D], gallery [G, D] -> [Q, G]."""
    norm = (weight**2 @ (gallery**2).T).clamp_min(torch.finfo(gallery.dtype).tiny).sqrt()
    return (anchor * weight) @ gallery.T / norm
