from itertools import groupby

import pytest
import torch
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.composers.lincir import STOP_WORDS, LinCIR
from cliplab.models.dropout import Dropout
from cliplab.models.text_frame import TextFrame
from cliplab.tokenizer import Tokenizer
from tests.models.composers.test_tirg import linear
from tests.models.composers.text_towers import (
    KNOWN,
    WIDTH,
    D,
    assert_same,
    embedded,
    make_tower,
    make_words,
    plain_feature,
    to_unit,
)

TEXTS = ["a red striped photo of blue", "red", "is long that is blue long", "of a that", "a " + "long " * 20]


def make_composer(**options: object) -> LinCIR:
    torch.manual_seed(1)
    return LinCIR(D, WIDTH, make_words(), hidden_dim=7, **options).double().eval()  # type: ignore[arg-type]


def by_hand(phi: nn.Sequential, x: Tensor) -> Tensor:
    def gelu(y: Tensor) -> Tensor:
        return y / 2 * (1 + torch.erf(y / 2**0.5))

    return linear(phi[6], gelu(linear(phi[3], gelu(linear(phi[0], x)))))


def masked(text: str) -> str:
    """Each run of words that are no stop words as one sign."""
    groups = groupby(text.split()[:10], lambda word: word in STOP_WORDS)
    return " ".join(" ".join(run) if is_stop else "$" for is_stop, run in groups)


def test_keywords_are_masked() -> None:
    words, composer = make_words(), make_composer()
    assert {word for word in KNOWN.split() if word in STOP_WORDS} == {"a", "of", "that", "is"}
    assert composer.masked(words.batch(*TEXTS)).tolist() == words.batch(*map(masked, TEXTS)).tolist()
    assert masked(TEXTS[0]) == "a $ of $", "two keywords, the first of three words"


def test_keywords_of_real_captions() -> None:
    tokenizer = Tokenizer(24)
    composer, frame = LinCIR(8, 8, tokenizer), TextFrame(tokenizer)
    given = ["A black dog and a small cat sleep on the couch.", "the woman's striped dress, not red !", "in $ of 5"]
    expected = ["A $ and a $ on the $.", "the $'s $, not $ !", "in $ of $"]
    for text, wanted in zip(given, expected, strict=True):
        found = frame.words(composer.masked(tokenizer(text)))
        assert found.tolist() == frame.words(tokenizer(wanted.replace("$", " $ "))).tolist(), text


def test_it_learns_from_texts_alone() -> None:
    tower, words, composer = make_tower().requires_grad_(False), make_words(), make_composer()
    text = tower.forward_text(words.batch(*TEXTS))
    torch.manual_seed(5)
    (pair,) = composer.training_pairs(None, text, None, text_tower=tower, token_ids=words.batch(*TEXTS))
    torch.manual_seed(5)
    noise = torch.rand(5, 1, dtype=torch.float64) * torch.randn(5, D, dtype=torch.float64)
    sign, rows = words.numbers("$")[0], []
    for given, word in zip(TEXTS, by_hand(composer.phi, text + noise), strict=True):
        rows.append(plain_feature(tower, embedded(tower, [90, *words.numbers(masked(given)), 91], {sign: word})))
    assert_same(pair.query, torch.stack(rows), tuple(composer.phi.parameters()))
    assert torch.equal(pair.target, text) and pair.weight == 1, "as they are, not unit length"
    assert composer.learns_from == "texts" and composer.losses == {"mse"}


def test_it_composes_with_the_picture_as_the_word() -> None:
    tower, words, composer = make_tower(), make_words(), make_composer()
    i = (3 * torch.randn(2, D, dtype=torch.float64)).requires_grad_()
    sign, given, rows = words.numbers("$")[0], ["is long", "red"], []
    for text, word in zip(given, by_hand(composer.phi, i), strict=True):
        numbers = [90, *words.numbers(f"a photo of $ that {text}"), 91]
        rows.append(plain_feature(tower, embedded(tower, numbers, {sign: word})))
    query = composer.compose(i, torch.empty(2, 0), text_tower=tower, token_ids=words.batch(*given))
    assert_same(query, to_unit(rows), (i, *composer.phi.parameters()))


def test_the_papers_sizes() -> None:
    composer = LinCIR(640, 768, Tokenizer())
    shapes = [tuple(m.weight.shape) for m in composer.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(2560, 640), (2560, 2560), (768, 2560)]
    assert [m.p for m in composer.modules() if isinstance(m, Dropout)] == [0.5, 0.5]
    with pytest.raises(UserError, match="lincir.*hidden_dim"):
        make_composer(dropout=-1.0)
