"""Random unit features for the tests of losses, and gradients to compare."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def features(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Unit along the last axis, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [F.normalize(each, dim=-1).to(dtype).requires_grad_() for each in drawn]


def number(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype).requires_grad_()


def assert_same(found: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> None:
    """Equal values and equal gradients, none of which is zero."""
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(expected, inputs, retain_graph=True)
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients), "an input that does nothing tests nothing"
    torch.testing.assert_close(torch.autograd.grad(found, inputs, retain_graph=True), gradients)
