"""Full fp32 where it matters, whatever precision the run around it has."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 or bf16 inside fp32 matrix products: for similarities, losses and ranks.

    In bf16 a logit of 30 has steps of 0.125, and ranks need scores that are exact to a few 1e-7.
    """
    with matmul_precision("highest"), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision for a while: highest, or medium (bf16 or TF32 inside fp32 products)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """Half precision as fp32, anything else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
