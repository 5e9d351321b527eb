import pytest
import torch

from cliplab.models.dropout import Dropout


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_drops_and_scales_as_torch_does(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(999, 1001, dtype=dtype, requires_grad=True)
    y = Dropout(p)(x)
    kept = y != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=2e-3)
    for side in (0, 1):  # no row and no column is favoured
        assert float(kept.float().mean(side).std()) < 2.5 * (p * (1 - p) / 999) ** 0.5 + 1e-6
    torch.testing.assert_close(
        y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=1e-4 if dtype.itemsize == 4 else 0.01, atol=0
    )
    y.sum().backward()
    assert torch.equal(x.grad, y.detach()), "the gradient passes where the entry did"


def test_the_seed_decides_and_evaluation_changes_nothing():
    x, dropout = torch.randn(5, 7), Dropout(0.3)
    torch.manual_seed(1)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first) and not torch.equal(first, second)
    assert dropout.eval()(x) is x
    assert Dropout(1.0)(x).count_nonzero() == 0 and repr(dropout) == "Dropout(p=0.3)"


def test_entries_are_dropped_independently():
    torch.manual_seed(0)
    dropped = (Dropout(0.5)(torch.ones(400_000)) == 0).float() - 0.5
    for shift in (1, 2, 3, 4, 8):
        assert abs(float((dropped[:-shift] * dropped[shift:]).mean())) < 4 * 0.25 / 400_000**0.5
