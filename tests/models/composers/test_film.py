import pytest
import torch

from cliplab.errors import UserError
from cliplab.models.composers.film import FiLM
from tests.models.composers.test_tirg import linear

D = 5


@pytest.mark.parametrize("hidden", [None, 9])
def test_values_and_gradients(hidden: int | None) -> None:
    torch.manual_seed(0)
    composer = FiLM(D, hidden).double()
    i = (3 * torch.randn(7, D, dtype=torch.float64)).requires_grad_()
    t = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    both = linear(composer.layers[2], linear(composer.layers[0], t).relu())
    rows = [row[:D] * image + row[D:] for row, image in zip(both, i, strict=True)]
    expected = torch.stack([row / row.norm() for row in rows])
    query = composer.compose(i, t)
    torch.testing.assert_close(query, expected)
    assert composer.layers[0].weight.shape == (hidden or D, D)
    cotangent, inputs = torch.randn_like(query), (i, t, *composer.parameters())
    found = torch.autograd.grad((query * cotangent).sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad((expected * cotangent).sum(), inputs))


def test_it_starts_near_the_image() -> None:
    assert FiLM(3).layers[2].bias.tolist() == [1, 1, 1, 0, 0, 0]
    with pytest.raises(UserError, match="film.*hidden_dim"):
        FiLM(3, hidden_dim=0)
