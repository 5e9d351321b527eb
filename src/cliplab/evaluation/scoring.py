"""How a query and a target are compared: fast in blocks, exactly in pairs."""

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn


def summation_error(width: int) -> float:
    """How far a fp32 dot product of unit vectors [width] is from the true one at most, in any order of additions.

    Partial sums stay within 1 (Cauchy and Schwarz), so each product and each addition rounds by 2^-25 at most.
    """
    return 1.05 * (width + 2) * 2**-25  # products add up to 2^-25 in all; vectors are of unit length up to rounding


class Scorer(Protocol):
    """How queries and gallery are compared: fast in blocks, exactly in pairs."""

    tie: float  # two exact scores at most this far apart are equal
    is_product: bool  # block is a matrix product of queries and gallery

    def band(self, width: int) -> float:
        """How far a fp32 block score of unit vectors of `width` entries may be from its exact one."""
        ...

    def block(self, queries: Tensor, gallery: Tensor, out: Tensor | None = None) -> Tensor:
        """[Q, ...], [G, D] -> fp32 scores_qg [Q, G]; `out` is memory that may be used for them."""
        ...

    def pairs(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """[N, ...], [N, D] -> float64 scores [N] of row n with row n."""
        ...


class CosineScorer:
    """Dot products of unit vectors."""

    tie = 0.0
    is_product = True

    def band(self, width: int) -> float:
        """The bound of any order of additions; kernels that lose half of it exist."""
        return summation_error(width)

    def block(self, queries: Tensor, gallery: Tensor, out: Tensor | None = None) -> Tensor:
        """[Q, D], [G, D] -> [Q, G]."""
        return torch.mm(queries, gallery.T, out=out)

    def pairs(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """[N, D], [N, D] -> [N]: exact products, added up by halving, an order that no shape or device changes."""
        terms = queries.double() * gallery.double()
        width = 1 << max(terms.shape[1] - 1, 0).bit_length()
        if width != terms.shape[1]:
            terms = nn.functional.pad(terms, (0, width - terms.shape[1]))
        while terms.shape[1] > 1:
            half = terms.shape[1] // 2
            terms = terms[:, :half].add_(terms[:, half:])
        return terms[:, 0]


class JointScorer:
    """A composer that scores queries and gallery jointly; exact means in float64, ties within 1e-12."""

    tie = 1e-12
    is_product = False

    def __init__(self, composer: Any) -> None:  # a module with score([Q, ...], [G, D]) -> [Q, G]
        self.composer = composer
        self.exact = copy.deepcopy(composer).double().eval()

    def band(self, width: int) -> float:
        """Such scores are sums of quotients: less exact in fp32 than a dot product."""
        return 4 * summation_error(width)

    def block(self, queries: Tensor, gallery: Tensor, out: Tensor | None = None) -> Tensor:
        """[Q, ...], [G, D] -> [Q, G]."""
        weights = next(self.composer.parameters(), queries)
        return self.composer.score(queries.to(weights.dtype), gallery.to(weights.dtype))

    def pairs(self, queries: Tensor, gallery: Tensor) -> Tensor:
        """[N, ...], [N, D] -> [N]."""
        return torch.vmap(self._one)(queries.double(), gallery.double())

    def _one(self, query: Tensor, target: Tensor) -> Tensor:
        return self.exact.score(query[None], target[None])[0, 0]
