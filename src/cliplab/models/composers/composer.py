"""What a composer is: reference image + modification text -> query."""

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

Inputs = Literal["vectors", "image_tokens", "text_tower"]
Output = Literal["vector", "score", "rerank"]


class Composer(nn.Module):
    """Base of all composers. To add one: a subclass in its own file, its name in `composers/__init__.py`.

    `inputs` says what `compose` takes beside the reference and the text (caching reads it): `vectors` nothing,
    `image_tokens` the keyword `image_tokens` [B, 1 + N, W], `text_tower` the keywords `text_tower` and `token_ids`
    [B, L].
    `output` says how a query is compared (indexing and evaluation read it): `vector` by its cosine with the target,
    `score` by the composer's own `score`.
    """

    inputs: ClassVar[frozenset[Inputs]] = frozenset({"vectors"})
    output: ClassVar[Output] = "vector"

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """Un-normalised features [B, D] of image and text -> unit query [B, D] (or [B, P, D] with output `score`)."""
        raise NotImplementedError

    def score(self, query: Tensor, gallery: Tensor) -> Tensor:
        """Queries [Q, ...], unit gallery [G, D] -> scores_qg [Q, G], higher is better; cosine unless overridden."""
        return query @ gallery.T


def unit(x: Tensor) -> Tensor:
    """Unit length along the last axis."""
    return F.normalize(x, dim=-1)
