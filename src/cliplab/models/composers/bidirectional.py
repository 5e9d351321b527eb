"""BLIP4CIR+Bi (Liu et al., WACV 2024): a token says which way a text is meant, and queries are asked both ways."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.chunks import encode_in_chunks
from cliplab.models.composers.combiner import Combiner
from cliplab.models.composers.composer import Composer, Pair, unit
from cliplab.models.composers.sum import Sum
from cliplab.models.text_frame import TextFrame, Tokenize
from cliplab.models.text_transformer import TextTower

FORWARD, BACKWARD = 0, 1


class Bidirectional(Composer):
    """q = base(i, t), t the feature of the text with a learned token behind its words: [FORWARD], or [BACKWARD].

    Training adds `reverse_weight` times the loss of the reversed query, base(target, text [BACKWARD]) -> reference: 0.4
    for FashionIQ, 0.1 for CIRR in the paper. `base`: its first stage is `sum` (of raw features), its second `combiner`.
    Evaluation asks forward. A text that fills the context loses its last token to the direction.
    """

    inputs = frozenset({"text_tower"})
    stand_in: Tensor

    def __init__(
        self,
        embed_dim: int,
        text_width: int,
        tokenizer: Tokenize,
        base: Literal["sum", "combiner"] = "sum",
        reverse_weight: float = 0.4,
    ) -> None:
        super().__init__()
        if not 0 <= reverse_weight < math.inf:
            raise UserError(
                f"composer 'bidirectional' needs a finite reverse_weight of 0 or more, got {reverse_weight}"
            )
        self.base = Sum() if base == "sum" else Combiner(embed_dim)
        self.reverse_weight = reverse_weight
        self.directions = nn.Parameter(0.02 * torch.randn(2, text_width))  # as token embeddings start
        self.frame = TextFrame(tokenizer)
        # The id that towers see of the token: of any word, as only its embedding is replaced.
        self.register_buffer("stand_in", self.frame.words(tokenizer("a"))[:1], persistent=False)

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """[B, D], with `text_tower` and `token_ids` [B, L] -> [B, D]; `text` is not used."""
        return self.base.compose(reference, self.directed(extra["text_tower"], extra["token_ids"], FORWARD))

    def training_pairs(
        self, reference: Tensor | None, text: Tensor | None, target: Tensor | None, **extra: Any
    ) -> list[Pair]:
        """The forward pair and, with its weight, the reversed one."""
        assert reference is not None and target is not None
        forward, backward = (
            self.directed(extra["text_tower"], extra["token_ids"], direction) for direction in (FORWARD, BACKWARD)
        )
        source, goal = unit(reference), unit(target)
        return [
            Pair(self.base.compose(reference, forward), goal, reference=source),
            Pair(self.base.compose(target, backward), source, self.reverse_weight, is_reversed=True, reference=goal),
        ]

    def directed(self, text_tower: TextTower, ids: Tensor, direction: int) -> Tensor:
        """Ids [B, L] -> the features [B, D] of the texts with a direction's token behind their words."""

        def features(ids: Tensor) -> Tensor:
            embeddings = text_tower.embed(ids)
            places = torch.arange(ids.shape[1], device=ids.device) == self.frame.ends(ids)[:, None] - 1
            token = self.directions[direction].to(embeddings.dtype)
            return text_tower.features(torch.where(places[..., None], token, embeddings), ids)

        ids = self.frame.around(ids, self.stand_in[:0], self.stand_in)
        return encode_in_chunks(features, ids, size=self.chunk_size)
