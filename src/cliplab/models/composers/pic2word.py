"""Pic2Word (Saito et al., CVPR 2023): the picture as a word, learned from pictures alone."""

from typing import Any

from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.composers.composer import Pair, unit
from cliplab.models.composers.pseudo_word import PseudoWord
from cliplab.models.dropout import Dropout
from cliplab.models.text_frame import Tokenize


class Pic2Word(PseudoWord):
    """phi = Lin(h, W) . ReLU . Drop . Lin(h, h) . ReLU . Drop . Lin(d, h), h = `hidden_dim`, on the un-normalised i.

    Learns with frozen towers from the pictures of any data set: the query is n(text("a photo of $")), which is `prompt`
    up to its placeholder, the target n(i); the paper's loss is the symmetric InfoNCE. Its own prompt for captions that
    do not go on from "that" is "a photo of * , {}".
    """

    learns_from = "images"

    def __init__(
        self,
        embed_dim: int,
        text_width: int,
        tokenizer: Tokenize,
        hidden_dim: int = 512,
        dropout: float = 0.1,
        prompt: str = "a photo of $ that {}",
    ) -> None:
        if hidden_dim < 1 or not 0 <= dropout <= 1:
            raise UserError(
                f"composer 'pic2word' needs hidden_dim of 1 or more and dropout in [0, 1], got {hidden_dim}, {dropout}"
            )
        phi = nn.Sequential(
            *(nn.Linear(embed_dim, hidden_dim), Dropout(dropout), nn.ReLU()),
            *(nn.Linear(hidden_dim, hidden_dim), Dropout(dropout), nn.ReLU()),
            nn.Linear(hidden_dim, text_width),
        )
        super().__init__(phi, prompt, tokenizer)

    def training_pairs(
        self, reference: Tensor | None, text: Tensor | None, target: Tensor | None, **extra: Any
    ) -> list[Pair]:
        """The features of pictures `target` [B, D], and `text_tower` -> the pair (n(text("a photo of $")), n(i))."""
        assert target is not None
        ids = self.alone.expand(len(target), -1)
        return [Pair(unit(self.read(extra["text_tower"], ids, self.phi(target))), unit(target))]
