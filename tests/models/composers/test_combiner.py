import pytest
import torch
from torch import Tensor, nn

from cliplab.models.composers.combiner import Combiner
from cliplab.models.dropout import Dropout

D, P, H = 6, 10, 14


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """W x + b, row by row."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    return torch.stack([weight @ row + bias for row in x])


def by_hand(combiner: Combiner, i: Tensor, t: Tensor) -> Tensor:
    """Equations of the paper without dropout."""
    relu = torch.Tensor.relu
    t_, i_ = relu(linear(combiner.text_projection[0], t)), relu(linear(combiner.image_projection[0], i))
    c = torch.cat([t_, i_], dim=1)
    v = linear(combiner.residual[3], relu(linear(combiner.residual[0], c)))
    gate = 1 / (1 + torch.exp(-linear(combiner.mixture[3], relu(linear(combiner.mixture[0], c)))))
    q = v + gate * t + (1 - gate) * i
    return q / q.pow(2).sum(-1, keepdim=True).sqrt()


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return (3 * torch.randn(5, D, dtype=torch.float64)).requires_grad_(), torch.randn(
        5, D, dtype=torch.float64, requires_grad=True
    )


def test_values_and_gradients(features: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    combiner = Combiner(D, projection_dim=P, hidden_dim=H).double().eval()
    query, expected = combiner.compose(*features), by_hand(combiner, *features)
    torch.testing.assert_close(query, expected)
    cotangent, inputs = torch.randn_like(query), (*features, *combiner.parameters())
    found = torch.autograd.grad((query * cotangent).sum(), inputs)
    wanted = torch.autograd.grad((expected * cotangent).sum(), inputs)
    torch.testing.assert_close(found, wanted)


def test_dropout_is_on_every_hidden_layer_in_training_only(features: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    combiner = Combiner(D, P, H, dropout=1.0).double().train()
    i, t = features
    for projection in (combiner.text_projection, combiner.image_projection):
        assert not projection(i).any()
    gate = torch.sigmoid(combiner.mixture[3].bias)  # nothing hidden is left: only the last biases speak
    q = combiner.residual[3].bias + gate * t + (1 - gate) * i
    torch.testing.assert_close(combiner.compose(i, t), q / q.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(combiner.eval().compose(i, t), by_hand(combiner, i, t))


def test_the_papers_sizes_are_the_defaults() -> None:
    combiner = Combiner(640)
    shapes = {name: tuple(p.shape) for name, p in combiner.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "text_projection.0.weight": (2560, 640),
        "image_projection.0.weight": (2560, 640),
        "residual.0.weight": (5120, 5120),
        "residual.3.weight": (640, 5120),
        "mixture.0.weight": (5120, 5120),
        "mixture.3.weight": (1, 5120),
    }
    assert [m.p for m in combiner.modules() if isinstance(m, Dropout)] == [0.5] * 4
