import math

import pytest
import torch

from cliplab.errors import UserError
from cliplab.models.composers.weighted_sum import WeightedSum


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("weight", [0.2, 0.5, 0.9])
def test_values_and_gradients(weight: float, learned: bool) -> None:
    torch.manual_seed(0)
    composer = WeightedSum(weight, learned).double()
    i = (3 * torch.randn(5, 7, dtype=torch.float64)).requires_grad_()
    t = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    parameters = list(composer.parameters())
    assert len(parameters) == learned
    if learned:
        assert parameters[0].item() == pytest.approx(math.log(weight / (1 - weight)), abs=1e-7)
        with torch.no_grad():
            parameters[0] += 0.3
    w = 1 / (1 + torch.exp(-parameters[0])) if learned else weight
    rows = [
        w * text / text.square().sum().sqrt() + (1 - w) * image / image.norm() for image, text in zip(i, t, strict=True)
    ]
    expected = torch.stack([row / row.norm() for row in rows])
    query = composer.compose(i, t)
    torch.testing.assert_close(query, expected)
    cotangent, inputs = torch.randn_like(query), (i, t, *parameters)
    found = torch.autograd.grad((query * cotangent).sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad((expected * cotangent).sum(), inputs))


@pytest.mark.parametrize(("weight", "learned"), [(0.0, True), (1.0, True), (1.2, False), (-0.1, True)])
def test_weights_that_cant_be(weight: float, learned: bool) -> None:
    with pytest.raises(UserError, match="weighted_sum.*text_weight"):
        WeightedSum(weight, learned)


def test_the_ends_of_a_fixed_weight_are_the_baselines() -> None:
    i, t = torch.eye(3), torch.eye(3).flip(0)
    assert torch.equal(WeightedSum(1.0, learned=False).compose(i, t), t)
    assert torch.equal(WeightedSum(0.0, learned=False).compose(i, t), i)
