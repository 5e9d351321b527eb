import math

import pytest
import torch
from torch import Tensor

from cliplab.errors import UserError
from cliplab.models.composers.slerp import Slerp

D = 6


def by_hand(alpha: float, i: Tensor, t: Tensor) -> Tensor:
    """The paper's two branches, row by row."""
    rows = []
    for image, text in zip(i / i.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True), strict=True):
        c = image @ text
        if abs(c) <= 0.9995:
            theta = torch.acos(c)
            q = (
                torch.sin((1 - alpha) * theta) * image / torch.sin(theta)
                + torch.sin(alpha * theta) * text / theta.sin()
            )
        else:
            q = image + alpha * (text - image)
        rows.append(q / q.norm())
    return torch.stack(rows)


def features() -> tuple[Tensor, Tensor]:
    """Angles of all sizes: two rows just on either side of the threshold, one that coincides, one that opposes."""
    i = 3 * torch.randn(12, D, dtype=torch.float64)
    t = torch.randn(12, D, dtype=torch.float64)
    for row, c in ((0, 0.99951), (1, 0.99949), (2, -0.99951), (3, -0.99949)):
        image = i[row] / i[row].norm()
        side = t[row] - (t[row] @ image) * image
        t[row] = 2 * (c * image + math.sqrt(1 - c * c) * side / side.norm())
    t[4], t[5] = 0.5 * i[4], -0.3 * i[5]
    return i.requires_grad_(), t.requires_grad_()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_values_and_gradients(alpha: float) -> None:
    torch.manual_seed(0)
    given = features()
    query, expected = Slerp(alpha).compose(*given), by_hand(alpha, *given)
    torch.testing.assert_close(query, expected)
    cotangent = torch.randn_like(query)
    found = torch.autograd.grad((query * cotangent).sum(), given)
    wanted = torch.autograd.grad((expected * cotangent).sum(), given)
    torch.testing.assert_close(found, wanted)
    assert all(bool(gradient.isfinite().all()) for gradient in found)


def test_equal_and_opposite_vectors_have_finite_gradients_in_single_precision() -> None:
    """With `where` behind the division they are NaN, at an angle of 0 and of pi."""
    torch.manual_seed(0)
    i = torch.randn(4, D)
    for t in (i.clone(), -i, 2 * i, i + 1e-8):
        given = i.clone().requires_grad_(), t.requires_grad_()
        query = Slerp().compose(*given)
        for gradient in torch.autograd.grad(query.square().sum() + query[:, 0].sum(), given):
            assert bool(gradient.isfinite().all())


def test_a_share_is_a_share() -> None:
    with pytest.raises(UserError, match="slerp.*alpha in .0, 1., got 1.5"):
        Slerp(1.5)
    assert not list(Slerp().parameters())
