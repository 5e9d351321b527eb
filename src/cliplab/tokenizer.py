"""Text -> token ids [B, L], by open_clip's CLIP tokenizer, built at the first call (importing it takes seconds)."""

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor


class Tokenizer:
    """CLIP's byte-pair tokenizer: 49406 text 49407, padded with 0, cut to `context_length` with 49407 kept last."""

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length

    @cached_property
    def _tokenize(self):  # noqa: ANN202 - open_clip's class, imported only when text is tokenized
        from open_clip.tokenizer import SimpleTokenizer

        return SimpleTokenizer(context_length=self.context_length)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Int64 ids [B, context_length]."""
        return self._tokenize([texts] if isinstance(texts, str) else list(texts))
