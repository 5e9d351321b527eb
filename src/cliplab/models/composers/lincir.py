"""LinCIR (Gu et al., CVPR 2024): the picture as a word, learned from captions alone."""

from typing import Any

import torch
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.composers.composer import Pair
from cliplab.models.composers.pseudo_word import PseudoWord, single_words
from cliplab.models.dropout import Dropout
from cliplab.models.text_frame import Tokenize

# Words that are no keywords. The paper takes runs of adjectives and nouns as a part-of-speech tagger finds them.
STOP_WORDS = tuple(
    """a an the this that these those some any each every all both no not and or but nor so as than then if while when
    where which who whose what how of in on at by for from with without within to into onto out off over under up down
    above below behind beside between among across along around through near next about against after before during
    i me my we us our you your he him his she her hers it its they them their theirs there here is are was were be been
    being am has have had having do does did done doing can could will would shall should may might must get gets got
    also very too more most less least just only same other another such own instead rather
    's 't . , : ; ! ? ' " ( ) - /
    """.split()  # noqa: SIM905 - a list of literals would take a line for each
)


class LinCIR(PseudoWord):
    """phi = Lin(h, W) . Drop . GELU . Lin(h, h) . Drop . GELU . Lin(d, h), h = `hidden_dim`, 4 d by default (SEARLE's).

    Learns with frozen towers from texts T alone, e(T) being their un-normalised features:
    L = MSE(text(T with each keyword as $), e(T)), $ = phi(e(T) + u z), u ~ U(0, 1) per text, z ~ N(0, 1) per entry.

    Both sides of that pair are not unit length, so the loss must be `mse`. Departure: the paper's keywords are runs of
    adjectives and nouns by spaCy; here they are runs of tokens that are none of STOP_WORDS, so that verbs and adverbs
    are keywords too, and a token is known by its id alone.
    """

    learns_from = "texts"
    losses = frozenset({"mse"})
    stops: Tensor

    def __init__(
        self,
        embed_dim: int,
        text_width: int,
        tokenizer: Tokenize,
        hidden_dim: int | None = None,
        dropout: float = 0.5,
        prompt: str = "a photo of $ that {}",
    ) -> None:
        hidden = 4 * embed_dim if hidden_dim is None else hidden_dim
        if hidden < 1 or not 0 <= dropout <= 1:
            raise UserError(
                f"composer 'lincir' needs hidden_dim of 1 or more and dropout in [0, 1], got {hidden}, {dropout}"
            )
        phi = nn.Sequential(
            *(nn.Linear(embed_dim, hidden), nn.GELU(), Dropout(dropout)),
            *(nn.Linear(hidden, hidden), nn.GELU(), Dropout(dropout)),
            nn.Linear(hidden, text_width),
        )
        super().__init__(phi, prompt, tokenizer)
        self.register_buffer("stops", single_words(STOP_WORDS, self.frame, tokenizer), persistent=False)

    def training_pairs(
        self, reference: Tensor | None, text: Tensor | None, target: Tensor | None, **extra: Any
    ) -> list[Pair]:
        """Features `text` [B, D], with `text_tower` and `token_ids` [B, L] -> the pair (text(masked T), e(T))."""
        assert text is not None
        noise = torch.rand_like(text[:, :1]) * torch.randn_like(text)
        return [Pair(self.read(extra["text_tower"], self.masked(extra["token_ids"]), self.phi(text + noise)), text)]

    def masked(self, ids: Tensor) -> Tensor:
        """Ids [B, L] -> ids [B, L] with one placeholder for each run of keywords."""
        keywords = self.frame.inside(ids) & ~torch.isin(ids, self.stops)
        goes_on = torch.zeros_like(keywords)
        goes_on[:, 1:] = keywords[:, 1:] & keywords[:, :-1]
        return self.frame.packed(ids.where(~keywords, self.placeholders[0]), ~goes_on)
