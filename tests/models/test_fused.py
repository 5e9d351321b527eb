import pytest
import torch
from torch import nn

from cliplab.models.fused import linear
from cliplab.models.transformer import QuickGELU, ResidualAttentionBlock

ACTIVATIONS = [None, nn.GELU(), nn.GELU(approximate="tanh"), QuickGELU()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_is_the_layer_and_its_activation(activation: nn.Module | None, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 5, 16), torch.randn(24, 16), torch.randn(24)
    given = [t.to(dtype) for t in (x, weight, bias)]
    wide = [t.double() for t in given]
    expected = nn.functional.linear(*wide)
    expected = expected if activation is None else activation(expected)
    with torch.no_grad():
        found = linear(*given, activation)
    assert found.dtype == dtype and found.shape == (2, 5, 24)
    limit = 2**-7 if dtype == torch.bfloat16 else 2**-20  # the activation of a rounded product is off by twice its step
    assert ((found.double() - expected).abs() <= limit * (1 + expected.abs()) * 2).all()


def test_gradients_flow_where_they_are_wanted() -> None:
    given = [torch.randn(*shape).bfloat16().requires_grad_() for shape in ((3, 4), (5, 4), (5,))]
    linear(*given, nn.GELU()).sum().backward()
    assert all(t.grad is not None and t.grad.any() for t in given)


def test_hooks_within_the_mlp_are_called() -> None:
    block, called = ResidualAttentionBlock(16, 2, 4.0, nn.GELU).bfloat16(), []
    x = torch.randn(2, 3, 16).bfloat16()
    with torch.no_grad():
        fused = block(x)
        block.mlp.gelu.register_forward_hook(lambda *given: called.append(given[2].shape))
        torch.testing.assert_close(block(x), fused, rtol=2e-2, atol=2e-2)
    assert called == [(2, 3, 64)]
