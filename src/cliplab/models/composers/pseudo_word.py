"""What Pic2Word and LinCIR share: the reference image as a word of the text."""

from typing import Any

import torch
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.chunks import encode_in_chunks
from cliplab.models.composers.composer import Composer, unit
from cliplab.models.text_frame import TextFrame, Tokenize
from cliplab.models.text_transformer import TextTower

PLACEHOLDERS = ("$", "*")  # SEARLE and LinCIR write $, Pic2Word writes *


class PseudoWord(Composer):
    """q = n(text tower of the text, with phi(i) [W] in place of the embedding of the placeholder `$` or `*`).

    A text with a placeholder, as the protocols searle, lincir and pic2word make it, is read as it is; any other is put
    into `prompt` in place of {}, token by token; where the context is too short its last words give way. The tower
    pools and masks by the ids of the prompted text, in which the placeholder keeps its own id.
    """

    inputs = frozenset({"text_tower"})
    placeholders: Tensor
    before: Tensor
    after: Tensor
    alone: Tensor

    def __init__(self, phi: nn.Module, prompt: str, tokenizer: Tokenize) -> None:
        super().__init__()
        self.phi = phi
        self.frame = TextFrame(tokenizer)
        buffers = {"placeholders": single_words(PLACEHOLDERS, self.frame, tokenizer)}
        buffers |= _parts_of(prompt, self.frame, tokenizer, buffers["placeholders"])
        for name, ids in buffers.items():
            self.register_buffer(name, ids, persistent=False)

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """[B, D], with `text_tower` and `token_ids` [B, L] -> [B, D]; `text` is not used."""
        return unit(self.read(extra["text_tower"], self.prompted(extra["token_ids"]), self.phi(reference)))

    def prompted(self, ids: Tensor) -> Tensor:
        """Ids [B, L] -> ids [B, L] that all hold a placeholder."""
        has_one = torch.isin(ids, self.placeholders).any(dim=1, keepdim=True)
        return ids.where(has_one, self.frame.around(ids, self.before, self.after))

    def read(self, text_tower: TextTower, ids: Tensor, words: Tensor) -> Tensor:
        """Ids [B, L] and what stands for their placeholders [B, W] -> the tower's features [B, D], not unit length."""

        def features(ids: Tensor, words: Tensor) -> Tensor:
            embeddings = text_tower.embed(ids)
            places = torch.isin(ids, self.placeholders)[..., None]
            return text_tower.features(torch.where(places, words[:, None].to(embeddings.dtype), embeddings), ids)

        return encode_in_chunks(features, ids, words, size=self.chunk_size)


def single_words(words: tuple[str, ...], frame: TextFrame, tokenizer: Tokenize) -> Tensor:
    """The ids [N] of those words that are one token, at the start of a text or behind another word."""
    first = frame.words(tokenizer("a"))
    found: set[int] = set()
    for word in words:
        alone, behind = frame.words(tokenizer(word)), frame.words(tokenizer(f"a {word}"))[len(first) :]
        found |= {int(ids[0]) for ids in (alone, behind) if len(ids) == 1}
    return torch.tensor(sorted(found), dtype=torch.int64)


def _parts_of(prompt: str, frame: TextFrame, tokenizer: Tokenize, placeholders: Tensor) -> dict[str, Tensor]:
    """The ids `before` and `after` the {} of a prompt, and those of the prompt up to its placeholder `alone` [1, L]."""
    head, braces, tail = prompt.partition("{}")
    known = " or ".join(PLACEHOLDERS)
    places = [place for word in PLACEHOLDERS if (place := prompt.find(word)) >= 0]
    if not braces or len(places) != 1:
        raise UserError(f"prompt='{prompt}' needs one {{}} for the text and one placeholder, {known}")
    before, after = (frame.words(tokenizer(part)) for part in (head, tail))
    if not torch.isin(torch.cat([before, after]), placeholders).any():
        raise UserError(
            f"prompt='{prompt}': the tokenizer of this text tower does not make one token of its placeholder; put "
            "spaces around it, or take a model with CLIP's tokenizer"
        )
    if frame.starts + len(before) + len(after) + 1 >= frame.length:
        raise UserError(f"prompt='{prompt}' leaves no room for a text within {frame.length} tokens: make it shorter")
    return {"before": before, "after": after, "alone": tokenizer(prompt[: places[0] + 1].replace("{}", ""))}
