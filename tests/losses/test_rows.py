import pytest
import torch

from cliplab.losses import rows
from cliplab.losses.rows import is_large, positives, sum_over_rows


@pytest.mark.parametrize(("chunk", "pieces"), [(1, 7), (14, 4), (21, 3), (100, 1)])
def test_chunks_have_the_value_and_the_gradients_of_one_piece(
    chunk: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(7, 7, dtype=torch.float64, requires_grad=True)
    asked: list[slice] = []

    def loss_of(part: slice) -> torch.Tensor:
        asked.append(part)
        return weight[part].exp().sum()

    expected = weight.exp().sum()
    torch.testing.assert_close(sum_over_rows(loss_of, 7), expected)
    assert asked == [slice(0, 7)] and not is_large(7)
    asked.clear()
    monkeypatch.setattr(rows, "KEPT", 48)
    monkeypatch.setattr(rows, "CHUNK", chunk)
    assert is_large(7) and not is_large(6)
    found = sum_over_rows(loss_of, 7)
    assert len(asked) == pieces and [row for part in asked for row in range(part.start, part.stop)] == list(range(7))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, weight), torch.autograd.grad(expected, weight))


def test_positives_are_the_diagonal_or_equal_ids() -> None:
    like = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(positives(slice(1, 3), None, 4, like), torch.eye(4, dtype=torch.float64)[1:3])
    found = positives(slice(0, 2), torch.tensor([5, 2, 5, 2]), 4, like)
    assert found.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]] and found.dtype == torch.float64
