"""Where the words of a text stand among its ids, and how other words are put beside them."""

from collections.abc import Callable

import torch
from torch import Tensor

Tokenize = Callable[[str], Tensor]  # text -> ids int64 [1, L]


class TextFrame:
    """What a tokenizer puts around words: `starts` tokens before them, `end` behind them, then `padding`.

    CLIP: 49406 words 49407 0 0 ...; BERT: [CLS] words [SEP] [PAD] ...; SigLIP: words 1 1 ..., where the end is padding.
    """

    def __init__(self, tokenize: Tokenize) -> None:
        empty, word = tokenize("")[0].tolist(), tokenize("a")[0].tolist()
        self.starts = next(place for place, (x, y) in enumerate(zip(empty, word, strict=True)) if x != y)
        self.end, self.padding, self.length = empty[self.starts], empty[-1], len(empty)

    def ends(self, ids: Tensor) -> Tensor:
        """Ids [B, L] -> where the end token stands, int64 [B].

        The last token that is no padding: CLIP pads with 0, which is also the id of "!".
        """
        places = torch.arange(ids.shape[1], device=ids.device)
        last = places.where(ids != self.padding, places.new_tensor(-1)).amax(dim=1)
        return (last + int(self.end == self.padding)).clamp(max=ids.shape[1] - 1)

    def inside(self, ids: Tensor) -> Tensor:
        """Ids [B, L] -> bool [B, L], True for the words."""
        places = torch.arange(ids.shape[1], device=ids.device)
        return (places >= self.starts) & (places < self.ends(ids)[:, None])

    def words(self, ids: Tensor) -> Tensor:
        """The ids of one text [1, L] -> those of its words alone [N]."""
        return ids[self.inside(ids)]

    def around(self, ids: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Ids [B, L] -> ids [B, L] with `before` [N] and `after` [M] around the words.

        Where there is no room the last of the words give way. Before and after must have room.
        """
        length = ids.shape[1]
        room = length - self.starts - len(before) - len(after) - 1
        assert room >= 0, "no room for what is put around the words"
        head, rest = ids.split([self.starts, length - self.starts], dim=1)
        counts = (self.ends(ids) - self.starts).clamp(max=room)
        kept = torch.arange(rest.shape[1], device=ids.device) < counts[:, None]
        end = ids.new_full((len(ids), 1), self.end)
        fixed = [part.expand(len(ids), -1) for part in (before, after)]
        wide = torch.cat([head, fixed[0], rest, fixed[1], end], dim=1)
        always = [torch.ones_like(part, dtype=torch.bool) for part in (head, fixed[0], fixed[1], end)]
        return self.packed(wide, torch.cat([*always[:2], kept, *always[2:]], dim=1))[:, :length]

    def packed(self, ids: Tensor, kept: Tensor) -> Tensor:
        """Ids [B, L], bool [B, L] -> ids [B, L]: those that are kept, in their order, then padding."""
        order = (~kept).int().argsort(dim=1, stable=True)
        return ids.masked_fill(~kept, self.padding).gather(1, order)
