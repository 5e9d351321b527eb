"""Sums over the rows of a matrix of logits: whole where it is small, else some rows at a time, computed twice."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

KEPT = 2**24  # logits that are kept for the backward pass: beyond it (a batch of 4,096), they are computed twice
CHUNK = 2**22  # logits at a time then


def is_large(count: int) -> bool:
    """Whether the logits [count, count] are too many to be kept."""
    return count**2 > KEPT


def sum_over_rows(loss_of: Callable[[slice], Tensor], count: int) -> Tensor:
    """The sum of `loss_of(rows)` [] over all `count` rows of a square matrix of logits."""
    if not is_large(count):
        return loss_of(slice(0, count))
    size = max(1, CHUNK // count)
    chunks = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    parts = [checkpoint(loss_of, rows, use_reentrant=False) for rows in chunks]
    return torch.stack(parts).sum()  # type: ignore[arg-type]


def positives(rows: slice, ids: Tensor | None, count: int, like: Tensor) -> Tensor:
    """1 where a row's target counts as its own, else 0: [n, count] in the precision of `like`.

    On the diagonal, or with ids [count] wherever they are equal.
    """
    own = torch.arange(count, device=like.device) if ids is None else ids
    return (own[rows, None] == own[None, :]).to(like.dtype)


def shares(rows: slice, ids: Tensor | None, count: int, like: Tensor) -> Tensor:
    """What each of a row's positives has of the mass [n, count]: equal parts."""
    same = positives(rows, ids, count, like)
    return same / same.sum(dim=1, keepdim=True)
