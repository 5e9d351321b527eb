import torch

from cliplab.losses import LOSSES
from cliplab.losses.mse import mse


def test_values_and_gradients() -> None:
    torch.manual_seed(0)
    query, target = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = sum((q - y) ** 2 for q, y in zip(query.flatten(), target.flatten(), strict=True)) / 35
    found = LOSSES["mse"](query, target)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, (query, target))
    torch.testing.assert_close(torch.autograd.grad(found, (query, target)), wanted)


def test_half_precision_is_computed_in_single() -> None:
    torch.manual_seed(0)
    query, target = (torch.randn(5, 7).bfloat16() for _ in range(2))
    assert torch.equal(mse(query, target), mse(query.float(), target.float()))
