import pytest
import torch
from torch import Tensor

from cliplab.models.composers.sum import Sum


def by_hand(reference: Tensor, text: Tensor, normalize_inputs: bool) -> Tensor:
    if normalize_inputs:
        reference = reference / reference.pow(2).sum(-1, keepdim=True).sqrt()
        text = text / text.pow(2).sum(-1, keepdim=True).sqrt()
    total = reference + text
    return total / total.pow(2).sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("normalize_inputs", [False, True])
def test_values_and_gradients(normalize_inputs: bool) -> None:
    torch.manual_seed(0)
    reference = (5 * torch.randn(4, 6, dtype=torch.float64)).requires_grad_()
    text = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    query, expected = Sum(normalize_inputs).compose(reference, text), by_hand(reference, text, normalize_inputs)
    torch.testing.assert_close(query, expected)
    cotangent = torch.randn_like(query)
    found = torch.autograd.grad((query * cotangent).sum(), (reference, text))
    wanted = torch.autograd.grad((expected * cotangent).sum(), (reference, text))
    torch.testing.assert_close(found, wanted)


def test_raw_and_unit_are_different_models() -> None:
    torch.manual_seed(0)
    reference, text = 5 * torch.randn(4, 6), torch.randn(4, 6)
    difference = Sum().compose(reference, text) - Sum(normalize_inputs=True).compose(reference, text)
    assert difference.abs().max() > 0.1
