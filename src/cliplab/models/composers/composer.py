"""What a composer is: reference image + modification text -> query."""

from typing import Any, ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

Inputs = Literal["vectors", "image_tokens", "text_tower"]
Output = Literal["vector", "score", "rerank"]
Lesson = Literal["triplets", "images", "texts"]


class Pair(NamedTuple):
    """What a loss compares: row i of `query` belongs to row i of `target`; the step adds `weight` times its loss.

    Of unit length, but where the composer names its `losses`.
    """

    query: Tensor  # [B, D], or [B, P, D] of a composer that scores
    target: Tensor  # [B, D]
    weight: float = 1.0
    is_reversed: bool = False  # asks from the target for the reference: ids and hard negatives are the other side's
    reference: Tensor | None = None  # [B, D], the reference images as targets are encoded, of unit length


class Composer(nn.Module):
    """Base of all composers. To add one: a subclass in its own file, its name in `composers/__init__.py`.

    `inputs` says what `compose` takes beside the reference and the text (caching reads it): `vectors` nothing,
    `image_tokens` the keyword `image_tokens` [B, 1 + N, W], `text_tower` the keywords `text_tower` and `token_ids`
    [B, L].
    `output` says how a query is compared (indexing and evaluation read it): `vector` by its cosine with the target,
    `score` by the composer's own `score`.
    The constructor may name what the builder gives beside the options: COMPOSER_INPUTS in models/composed.py.
    `learns_from` says what a training batch has to give: `triplets` of reference, text and target, or only `images` or
    only `texts` of any data set (zero-shot composers); `training_pairs` makes of it what the loss compares.
    `losses` names those that fit its pairs where they are not unit vectors; None: any loss of unit vectors.
    """

    inputs: ClassVar[frozenset[Inputs]] = frozenset({"vectors"})
    output: ClassVar[Output] = "vector"
    learns_from: ClassVar[Lesson] = "triplets"
    losses: ClassVar[frozenset[str] | None] = None
    chunk_size: int | None = None  # rows that a composer takes through the text tower at a time, as the model says

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """Un-normalised features [B, D] of image and text -> unit query [B, D] (or [B, P, D] with output `score`)."""
        raise NotImplementedError

    def training_pairs(
        self, reference: Tensor | None, text: Tensor | None, target: Tensor | None, **extra: Any
    ) -> list[Pair]:
        """Un-normalised features [B, D] of a training batch, those that `learns_from` does not name are None.

        `extra` as `compose` takes it. Unless overridden: the composed query against its target.
        """
        assert reference is not None and text is not None and target is not None
        return [Pair(self.compose(reference, text, **extra), unit(target), reference=unit(reference))]

    def score(self, query: Tensor, gallery: Tensor) -> Tensor:
        """Queries [Q, ...], unit gallery [G, D] -> scores_qg [Q, G], higher is better; cosine unless overridden."""
        return query @ gallery.T


def unit(x: Tensor) -> Tensor:
    """Unit length along the last axis."""
    return F.normalize(x, dim=-1)
