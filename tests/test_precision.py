import pytest
import torch

from cliplab.precision import exact_fp32


@pytest.fixture(autouse=True)
def restore():
    yield
    torch.set_float32_matmul_precision("highest")


def test_products_inside_are_those_of_full_fp32():
    a, b = torch.randn(64, 512), torch.randn(512, 64)
    expected = a @ b
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16), exact_fp32(a.device):
        assert torch.equal(a @ b, expected)
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "medium"


def test_the_precision_comes_back_after_an_error():
    torch.set_float32_matmul_precision("high")
    with pytest.raises(ZeroDivisionError), exact_fp32(torch.device("cpu")):
        1 / 0  # noqa: B018
    assert torch.get_float32_matmul_precision() == "high"
