import pytest
import torch

from cliplab.models.clip import CLIP
from cliplab.models.composed import composer_inputs
from cliplab.models.composers import COMPOSERS
from cliplab.models.composers.composer import Composer, unit
from cliplab.registry import build_part
from cliplab.tokenizer import Tokenizer
from tests.conftest import TINY

D = 16


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
    clip, tokenizer = CLIP(**TINY).eval(), Tokenizer(32)
    composer = build_part("composer", COMPOSERS, {"name": name}, **composer_inputs(clip, tokenizer)).eval()
    assert composer.output in ("vector", "score", "rerank")
    assert composer.inputs <= {"vectors", "image_tokens", "text_tower"}
    reference, text, gallery = 3 * torch.randn(4, D), 2 * torch.randn(4, D), unit(torch.randn(7, D))
    token_ids, image_tokens = tokenizer(["is red", "", "a blue one", "longer"]), torch.randn(4, 17, 32)
    extra = {"text_tower": clip.text_tower, "token_ids": token_ids, "image_tokens": image_tokens}
    query = composer.compose(reference, text, **extra)
    assert query.shape in ((4, D), (4, query.shape[1], D))
    assert (query.dim() == 2) == (composer.output == "vector")
    torch.testing.assert_close(query.norm(dim=-1), torch.ones(query.shape[:-1]))
    scores = composer.score(query, gallery)
    assert scores.shape == (4, 7)
    for row in range(4):
        one = slice(row, row + 1)
        tokens = {"token_ids": token_ids[one], "image_tokens": image_tokens[one]}
        alone = composer.compose(reference[one], text[one], **(extra | tokens))
        torch.testing.assert_close(composer.score(alone, gallery)[0], scores[row], rtol=1e-5, atol=1e-6)
