"""The placeholder in a text, for towers and tokenizers of all kinds."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.composers.bidirectional import Bidirectional
from cliplab.models.composers.composer import unit
from cliplab.models.composers.pic2word import Pic2Word
from cliplab.models.composers.pseudo_word import PseudoWord
from cliplab.models.hf_text import HFTextTower
from cliplab.models.text_transformer import TextTower
from cliplab.tokenizer import Tokenizer
from tests.models.composers.text_towers import KNOWN, LENGTH, SIZES, D, make_tower, make_words
from tests.models.test_hf_text import folder_of
from tests.words import FRAMES, Words

TOWERS = ["clip", "eos", "siglip", "bert", "roberta"]


class Constant(nn.Module):
    """Every picture is the same word."""

    def __init__(self, word: Tensor) -> None:
        super().__init__()
        self.word = word

    def forward(self, reference: Tensor) -> Tensor:
        return self.word.expand(len(reference), -1)


def make(kind: str, tmp_path: Path) -> tuple[TextTower, Words]:
    if kind in ("bert", "roberta"):
        frame = {"bert": (2, 3, 0), "roberta": (0, 2, 1)}[kind]
        cfg = {"hf_model_name": folder_of(kind, tmp_path), "hf_model_pretrained": False, "context_length": LENGTH}
        torch.manual_seed(0)
        return HFTextTower({**cfg, "hf_proj_type": "linear"}, D).double().eval(), Words(KNOWN, LENGTH, frame)
    if kind == "siglip":
        return make_tower(pool_type="last", no_causal_mask=True), Words(KNOWN, LENGTH, FRAMES["siglip"])
    options = {"pool_type": "eos", "eos_id": 91} if kind == "eos" else {}
    return make_tower(**options), make_words()


@pytest.mark.parametrize("kind", TOWERS)
def test_a_picture_whose_word_is_red_reads_as_red(kind: str, tmp_path: Path) -> None:
    """Towers pool and mask as if the word stood there; also where the text fills the context, or is empty."""
    tower, words = make(kind, tmp_path)
    composer = PseudoWord(
        Constant(tower.embed(words("red"))[0, words("red")[0] == 12][0]), "a $ that {}", words
    ).double()
    texts = ["is long", "", "a photo of $ long", "* blue", "is " * 20, "$ and $"]
    readable = ["a red that is long", "a red that", "a photo of red long", "red blue", "a red that" + " is" * 20]
    query = composer.compose(torch.ones(6, D), torch.empty(6, 0), text_tower=tower, token_ids=words.batch(*texts))
    expected = unit(tower.forward_text(words.batch(*readable, "red and red")))
    torch.testing.assert_close(query, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", TOWERS)
def test_a_direction_that_is_red_reads_as_red(kind: str, tmp_path: Path) -> None:
    tower, words = make(kind, tmp_path)
    composer = Bidirectional(D, tower.text_width, words).double()
    with torch.no_grad():
        composer.directions[1] = tower.embed(words("red"))[0, words("red")[0] == 12][0]
    room = LENGTH - composer.frame.starts - 1
    ids = words.batch("is long", "", "is " * 20)
    expected = tower.forward_text(words.batch("is long red", "red", "is " * (room - 1) + "red"))
    torch.testing.assert_close(composer.directed(tower, ids, 1), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_the_width_of_the_words_is_that_of_the_embeddings(kind: str, tmp_path: Path) -> None:
    cfg = {"hf_model_name": folder_of(kind, tmp_path), "hf_model_pretrained": False, "hf_proj_type": "linear"}
    tower = HFTextTower(cfg, D)
    assert tower.text_width == tower.embed(torch.tensor([[3]])).shape[-1]
    assert tower.text_blocks is None and make_tower().text_blocks == SIZES["layers"]
    assert make_tower().text_width == SIZES["width"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a photo of $", "needs one {}"),
        ("a photo that {}", "needs one {} for the text and one placeholder"),
        ("* like $ {}", "one placeholder"),
        ("a photo of $, {}", "spaces around it"),
        ("a " * 74 + "$ {}", "no room"),
    ],
)
def test_prompts_that_cant_be(prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pic2Word(8, 8, Tokenizer(), prompt=prompt)


def test_a_tokenizer_without_the_placeholder_is_refused() -> None:
    """SigLIP's drop punctuation."""
    with pytest.raises(UserError, match="does not make one token"):
        Pic2Word(8, 8, Tokenizer(options={"clean": "canonicalize"}))


def test_the_published_wordings_are_read_as_they_are() -> None:
    composer, tokenizer = Pic2Word(8, 8, Tokenizer()), Tokenizer()
    texts = ["a photo of $ that is red", "a photo of * , is red", "is red"]
    found = composer.prompted(tokenizer(texts))
    assert torch.equal(found, tokenizer([*texts[:2], texts[0]]))
    assert sorted(composer.placeholders.tolist()) == sorted(tokenizer("$ *")[0, 1:3].tolist())
    assert not composer.state_dict().keys() & {"placeholders", "before", "after", "alone"}, "the tokenizer has them"
