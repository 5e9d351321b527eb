"""Text -> token ids [B, L], by open_clip's tokenizers, built at the first call (importing them takes seconds)."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

from torch import Tensor

from cliplab.errors import UserError

_FILES = ("*.json", "*.txt", "*.model")


class Tokenizer:
    """CLIP's byte-pair tokenizer, or a Hugging Face one: `source` is a repository of the hub or a local folder.

    CLIP's: 49406 text 49407, padded with 0, cut to `context_length` with 49407 kept last. A Hugging Face tokenizer pads
    to `context_length` with its own id; `mode` and `options` are open_clip's (`tokenizer_mode`, `tokenizer_kwargs`).
    Its files are looked for at the first call: in the folder, in the cache, then once over the network.
    """

    def __init__(
        self,
        context_length: int = 77,
        source: str | None = None,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.context_length, self.source, self.mode, self.options = context_length, source, mode, dict(options or {})

    @cached_property
    def _tokenize(self) -> Callable[[list[str], int], Tensor]:
        if self.source is None:
            from open_clip.tokenizer import SimpleTokenizer

            return SimpleTokenizer(context_length=self.context_length, **self.options)
        return self._from_hugging_face(self.source)

    def _from_hugging_face(self, source: str) -> Callable[[list[str], int], Tensor]:
        from open_clip.tokenizer import HFTokenizer

        from cliplab.models.checkpoints.hub import hub_folder

        folder = hub_folder(source, _FILES, ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*"))
        options = {"context_length": self.context_length, "tokenizer_mode": self.mode, **self.options}
        try:
            return HFTokenizer(str(folder), local_files_only=True, trust_remote_code=False, **options)
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"can't build the tokenizer '{source}' from {folder}: {reason}. The folder needs the tokenizer's files "
                "(tokenizer.json, or vocabulary and tokenizer_config.json)"
            ) from error

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Int64 ids [B, context_length]. Raises UserError where the files of a Hugging Face tokenizer are not there."""
        return self._tokenize([texts] if isinstance(texts, str) else list(texts), context_length or self.context_length)

    def length(self, text: str) -> int:
        """The number of ids of a text before it is cut, start and end included."""
        if self.source is None:
            return len(self._tokenize.encode(text)) + 2  # type: ignore[attr-defined]
        return len(self._tokenize.tokenizer(text).input_ids)  # type: ignore[attr-defined]

    def is_cut(self, text: str, ids: Tensor) -> bool:
        """Whether a text was too long; `ids` [L] are what became of it."""
        padding = 0 if self.source is None else self._tokenize.tokenizer.pad_token_id  # type: ignore[attr-defined]
        return bool(ids[-1] != padding) and self.length(text) > self.context_length


def tokenize(texts: str | Sequence[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """OpenAI's `clip.tokenize`: int64 ids [B, context_length] of CLIP's vocabulary.

    Raises UserError naming a text that is too long, unless `truncate`: then it is cut and its end token kept.
    """
    listed = [texts] if isinstance(texts, str) else list(texts)
    tokenizer = _clip_tokenizer(context_length)
    for text in () if truncate else listed:
        if tokenizer.length(text) > context_length:
            raise UserError(
                f"'{text}' has {tokenizer.length(text)} tokens, more than {context_length}: truncate=True cuts it"
            )
    return tokenizer(listed)


@cache
def _clip_tokenizer(context_length: int) -> Tokenizer:
    return Tokenizer(context_length)
