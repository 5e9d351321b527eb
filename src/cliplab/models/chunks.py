"""Encoding a large batch in chunks whose activations are computed again in the backward pass, one chunk at a time.

The features of the whole batch are kept, so that a contrastive loss sees all of it, and the gradients are those of one
pass (GradCache, Gao et al., 2021, by activation checkpointing: no second optimisation loop).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from cliplab.errors import UserError


def encode_in_chunks(encode: Callable[..., Any], *inputs: Tensor, size: int | None) -> Any:
    """encode(*inputs), each [B, ...], a tensor or several, in chunks of `size` rows where gradients are computed.

    Dropout is replayed.
    """
    if size is None or len(inputs[0]) <= size or not torch.is_grad_enabled():
        return encode(*inputs)
    chunks = zip(*(each.split(size) for each in inputs), strict=True)
    parts = [checkpoint(encode, *chunk, use_reentrant=False) for chunk in chunks]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(of_all) for of_all in zip(*parts, strict=True))


def check_chunks(towers: Sequence[nn.Module], size: int | None) -> None:
    """Raises UserError where a chunk is not what it would be in the batch: BatchNorm in training mode."""
    for tower in towers if size is not None else ():
        for name, module in tower.named_modules():
            if isinstance(module, _BatchNorm) and module.training:
                raise UserError(
                    f"model.chunk_size={size}: the statistics of {name} (BatchNorm) would be those of a chunk, not of "
                    "the batch; freeze the tower (model.freeze), take one without BatchNorm, or use "
                    "model.grad_checkpointing"
                )
