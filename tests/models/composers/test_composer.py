import pytest
import torch

from cliplab.models.composers import COMPOSERS
from cliplab.models.composers.composer import Composer, unit
from cliplab.registry import build_part

D = 10


def test_unit_divides_by_the_norm_of_the_last_axis() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, D, dtype=torch.float64)
    expected = [[(row / sum(v * v for v in row.tolist()) ** 0.5).tolist() for row in rows] for rows in x]
    torch.testing.assert_close(unit(x), torch.tensor(expected, dtype=torch.float64))
    assert not unit(torch.zeros(2, D)).any(), "a zero vector stays zero"


def test_the_score_is_cosine_unless_overridden() -> None:
    torch.manual_seed(0)
    query, gallery = unit(torch.randn(3, D)), unit(torch.randn(4, D))
    expected = [[sum(a * b for a, b in zip(q, y, strict=True)) for y in gallery.tolist()] for q in query.tolist()]
    torch.testing.assert_close(Composer().score(query, gallery), torch.tensor(expected))


def test_a_composer_must_compose() -> None:
    with pytest.raises(NotImplementedError):
        Composer().compose(torch.ones(1, D), torch.ones(1, D))


@pytest.mark.parametrize("name", COMPOSERS)
def test_every_composer_keeps_the_contract(name: str) -> None:
    torch.manual_seed(0)
    composer = build_part("composer", COMPOSERS, {"name": name}, embed_dim=D).eval()
    assert composer.output in ("vector", "score", "rerank")
    assert composer.inputs <= {"vectors", "image_tokens", "text_tower"}
    reference, text, gallery = 3 * torch.randn(4, D), 2 * torch.randn(4, D), unit(torch.randn(7, D))
    query = composer.compose(reference, text, image_tokens=None, text_tower=None, token_ids=None)
    assert query.shape in ((4, D), (4, query.shape[1], D))
    assert (query.dim() == 2) == (composer.output == "vector")
    torch.testing.assert_close(query.norm(dim=-1), torch.ones(query.shape[:-1]))
    scores = composer.score(query, gallery)
    assert scores.shape == (4, 7)
    for row in range(4):
        alone = composer.compose(reference[row : row + 1], text[row : row + 1])
        torch.testing.assert_close(composer.score(alone, gallery)[0], scores[row], rtol=1e-5, atol=1e-6)
