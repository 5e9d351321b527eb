"""What is in a batch twice is encoded once: FashionIQ's images are reference of one triplet and target of another."""

from collections.abc import Callable

import torch
from torch import Tensor


def encode_once(encode: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
    """Rows [B, ...], of uint8 pixels or of ids -> encode(rows) [B, D], each different row encoded once.

    For encoders whose rows know nothing of each other and draw nothing at random. Values and gradients are the same:
    those of equal rows add up. Rows are equal where all their numbers are, whatever their ids say: a random crop makes
    two inputs of one image.
    """
    found = _first_of_each(given)
    if found is None:
        return encode(given)
    first, inverse = found
    return encode(given[first])[inverse]


def _first_of_each(given: Tensor) -> tuple[Tensor, Tensor] | None:
    """The rows [U] that differ and, for each row, its place among them [B]; None where all differ."""
    # Sums of channels find images that may be equal; two that are not are told apart below.
    keys = given if given.dim() == 2 else given.flatten(2).sum(-1, dtype=torch.int64)
    different, inverse = keys.unique(dim=0, return_inverse=True)
    if len(different) == len(given):
        return None
    rows = torch.arange(len(given), device=given.device)
    first = torch.full((len(different),), len(given), device=given.device).scatter_reduce(0, inverse, rows, "amin")
    doubled = rows != first[inverse]
    same = torch.equal(given[doubled], given[first[inverse][doubled]])
    return (first, inverse) if same else None
