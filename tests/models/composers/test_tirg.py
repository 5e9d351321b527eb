import torch
from torch import Tensor, nn

from cliplab.models.composers.tirg import TIRG

D = 5


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """W x + b, row by row."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    return torch.stack([weight @ row + bias for row in x])


def batch_norm(layer: nn.Module, x: Tensor, training: bool) -> Tensor:
    """By the batch's own mean and biased variance, or by the running ones."""
    if training:
        mean, variance = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
    else:
        mean, variance = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
    return (x - mean) / (variance + 1e-5).sqrt() * layer.get_parameter("weight") + layer.get_parameter("bias")


def by_hand(tirg: TIRG, i: Tensor, t: Tensor, training: bool) -> Tensor:
    x, relu = torch.cat([i, t], dim=1), torch.Tensor.relu
    gate = linear(tirg.gate[2], relu(batch_norm(tirg.gate[0], x, training)))
    res = linear(tirg.residual[2], relu(batch_norm(tirg.residual[0], x, training)))
    res = linear(tirg.residual[4], relu(res))
    q = tirg.weights[0] * i / (1 + torch.exp(-gate)) + tirg.weights[1] * res
    return q / q.pow(2).sum(-1, keepdim=True).sqrt()


def make_tirg() -> TIRG:
    torch.manual_seed(0)
    tirg = TIRG(D).double()
    with torch.no_grad():
        for norm in (tirg.gate[0], tirg.residual[0]):
            for values in (norm.weight, norm.bias, norm.running_mean):
                values += 0.5 * torch.randn_like(values)
            norm.running_var += torch.rand_like(norm.running_var)
    return tirg


def test_values_and_gradients() -> None:
    for training in (True, False):
        tirg = make_tirg().train(training)
        i = (3 * torch.randn(7, D, dtype=torch.float64)).requires_grad_()
        t = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
        expected = by_hand(tirg, i, t, training)
        query = tirg.compose(i, t)
        torch.testing.assert_close(query, expected)
        cotangent, inputs = torch.randn_like(query), (i, t, *tirg.parameters())
        found = torch.autograd.grad((query * cotangent).sum(), inputs)
        wanted = torch.autograd.grad((expected * cotangent).sum(), inputs)
        torch.testing.assert_close(found, wanted)


def test_shapes_and_weights_at_the_start() -> None:
    tirg = TIRG(D)
    assert tirg.weights.tolist() == [1.0, 10.0]
    shapes = [tuple(m.weight.shape) for m in tirg.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(D, 2 * D), (2 * D, 2 * D), (D, 2 * D)]
