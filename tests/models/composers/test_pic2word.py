import pytest
import torch
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.composers.pic2word import Pic2Word
from cliplab.models.dropout import Dropout
from cliplab.tokenizer import Tokenizer
from tests.models.composers.test_tirg import linear
from tests.models.composers.text_towers import (
    WIDTH,
    D,
    assert_same,
    embedded,
    make_tower,
    make_words,
    plain_feature,
    to_unit,
)

TEXTS = ["is long", "", "is red * long", "blue and striped"]


def make_composer(**options: object) -> Pic2Word:
    torch.manual_seed(1)
    return Pic2Word(D, WIDTH, make_words(), hidden_dim=7, **options).double().eval()  # type: ignore[arg-type]


def by_hand(phi: nn.Sequential, x: Tensor) -> Tensor:
    return linear(phi[6], linear(phi[3], linear(phi[0], x).relu()).relu())


def test_values_and_gradients() -> None:
    tower, words, composer = make_tower(), make_words(), make_composer()
    i = (3 * torch.randn(4, D, dtype=torch.float64)).requires_grad_()
    rows = []
    for text, word in zip(TEXTS, by_hand(composer.phi, i), strict=True):
        read = text if "*" in text else f"a photo of $ that {text}"
        numbers = [90, *words.numbers(read), 91]
        replaced = {words.numbers(sign)[0]: word for sign in ("$", "*")}
        rows.append(plain_feature(tower, embedded(tower, numbers, replaced)))
    query = composer.compose(i, torch.empty(4, 0), text_tower=tower, token_ids=words.batch(*TEXTS))
    assert_same(query, to_unit(rows), (i, *composer.phi.parameters(), *tower.parameters()))


def test_it_learns_from_pictures_alone() -> None:
    tower, words, composer = make_tower().requires_grad_(False), make_words(), make_composer()
    i = 3 * torch.randn(4, D, dtype=torch.float64)
    (pair,) = composer.training_pairs(None, None, i, text_tower=tower)
    numbers, sign = [90, *words.numbers("a photo of $"), 91], words.numbers("$")[0]
    rows = [plain_feature(tower, embedded(tower, numbers, {sign: word})) for word in by_hand(composer.phi, i)]
    assert_same(pair.query, to_unit(rows), tuple(composer.phi.parameters()))
    torch.testing.assert_close(pair.target, to_unit(list(i)))
    assert pair.weight == 1 and pair.reference is None and composer.learns_from == "images"


def test_the_training_prompt_ends_at_the_placeholder() -> None:
    words = make_words()
    composer = Pic2Word(D, WIDTH, words, prompt="{} like * that")
    assert composer.alone.tolist() == words("like *").tolist()


def test_dropout_in_training_and_the_papers_sizes() -> None:
    composer = Pic2Word(640, 768, Tokenizer())
    shapes = [tuple(m.weight.shape) for m in composer.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(512, 640), (512, 512), (768, 512)]
    assert [m.p for m in composer.modules() if isinstance(m, Dropout)] == [0.1, 0.1]
    blind = make_composer(dropout=1.0).train()
    torch.testing.assert_close(blind.phi(torch.ones(2, D, dtype=torch.float64)), blind.phi[6].bias.expand(2, -1))
    with pytest.raises(UserError, match="pic2word.*hidden_dim"):
        make_composer(dropout=2.0)
