import pytest
import torch
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.composers.concat import Concat
from tests.models.composers.test_tirg import batch_norm, linear

D = 5


def by_hand(layers: nn.Sequential, i: Tensor, t: Tensor, training: bool) -> Tensor:
    """TIRG's code, without dropout."""
    x = torch.cat([i, t], dim=1)
    x = linear(layers[2], batch_norm(layers[0], x, training).relu())
    x = linear(layers[6], batch_norm(layers[3], x, training).relu())
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients(training: bool) -> None:
    torch.manual_seed(0)
    composer = Concat(D, dropout=0.0).double().train(training)
    with torch.no_grad():
        for norm in (composer.layers[0], composer.layers[3]):
            for values in (norm.weight, norm.bias, norm.running_mean):
                values += 0.5 * torch.randn_like(values)
            norm.running_var += torch.rand_like(norm.running_var)
    i = (3 * torch.randn(7, D, dtype=torch.float64)).requires_grad_()
    t = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    expected = by_hand(composer.layers, i, t, training)
    query = composer.compose(i, t)
    torch.testing.assert_close(query, expected)
    cotangent, inputs = torch.randn_like(query), (i, t, *composer.parameters())
    found = torch.autograd.grad((query * cotangent).sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad((expected * cotangent).sum(), inputs))


def test_sizes_and_dropout() -> None:
    composer = Concat(D, dropout=1.0).train()
    shapes = [tuple(m.weight.shape) for m in composer.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(2 * D, 2 * D), (D, 2 * D)]
    query = composer.compose(torch.randn(4, D), torch.randn(4, D))
    bias = composer.layers[6].bias
    torch.testing.assert_close(query, (bias / bias.norm()).expand(4, D))  # nothing hidden is left
    with pytest.raises(UserError, match="concat.*dropout"):
        Concat(D, dropout=1.5)
