"""The one distributed gather: embeddings of all processes, with exact gradients."""

import torch
from torch import Tensor, distributed


class _AllGather(torch.autograd.Function):
    """Concatenate over processes; the backward pass adds up what every process's loss says of our rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        gathered = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, x.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        total = grads[0].clone()  # all_reduce writes in place
        distributed.all_reduce(total)
        return total.chunk(distributed.get_world_size())[distributed.get_rank()]


def gather(x: Tensor) -> Tensor:
    """[B, ...] of each process -> [W * B, ...] of all, in rank order; B must be equal. One process: x itself.

    With the full loss on every process and DDP's mean over processes, the gradients equal those of one process with the
    joint batch: the backward pass sums W equal losses, DDP divides by W.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return x
    return _AllGather.apply(x)
