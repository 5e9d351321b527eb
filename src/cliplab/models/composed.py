"""CLIP + composer: both sides of every retrieval task as query against target."""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cliplab.data.images import normalized
from cliplab.models.chunks import check_chunks, encode_in_chunks
from cliplab.models.clip import DualEncoder
from cliplab.models.composers import Composer, ImageOnly, Pair, TextOnly
from cliplab.models.composers.composer import unit
from cliplab.models.image_tower import layers_of
from cliplab.models.repeats import encode_once

PARTS = ("image_encoder", "text_encoder", "composer", "temperature")
COMPOSER_INPUTS = ("embed_dim", "image_width", "text_width", "text_blocks", "tokenizer")  # no options


def composer_inputs(clip: DualEncoder, tokenizer: Callable[[str], Tensor]) -> dict[str, Any]:
    """What a composer's constructor gets of COMPOSER_INPUTS, as far as it names them.

    The widths are those of features, of image tokens and of token embeddings; `text_blocks` counts the blocks of a text
    tower that can be run one by one, else None; `tokenizer`: text -> ids int64 [1, L].
    """
    tower = clip.text_tower
    sizes = (clip.embed_dim, clip.visual.width, tower.text_width, tower.text_blocks)
    return dict(zip(COMPOSER_INPUTS, (*sizes, tokenizer), strict=True))


class ComposedRetriever(nn.Module):
    """A dual encoder and, for composed queries, a composer.

    A query with an image and a text goes through the composer; with one of them it is that tower's unit feature.
    `fixed_scale` replaces the learned temperature (CLIP4Cir: 100). In training the towers take `chunk_size` pictures or
    texts at a time, and compute a chunk again for its gradients.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        clip: DualEncoder,
        composer: Composer | None,
        mean: Iterable[float],
        std: Iterable[float],
        fixed_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.clip, self.composer = clip, composer
        self.fixed_scale = fixed_scale
        self.chunk_size: int | None = None
        self.register_buffer("mean", torch.tensor(list(mean)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(3, 1, 1), persistent=False)
        self.baselines = {"image_only": ImageOnly(), "text_only": TextOnly()} if composer is not None else {}
        self._frozen: list[nn.Module] = []

    def normalize(self, images: Tensor) -> Tensor:
        """Uint8 images [B, 3, H, W] -> (x / 255 - mean) / std in the precision of the weights."""
        return normalized(images, self.mean, self.std)

    def encode_query(self, query: Mapping[str, Tensor]) -> Tensor:
        """`{image? [B, 3, H, W], text? [B, L]}` -> unit queries [B, D], or [B, P, D] of a composer that scores.

        `image_features` and `text_features` [B, D] may stand for what a frozen tower would give.
        """
        return self.encode_queries(query, {"": self.composer})[""]

    def encode_queries(
        self, query: Mapping[str, Tensor], composers: Mapping[str, Composer | None]
    ) -> dict[str, Tensor]:
        """One query per composer from a single pass through the towers."""
        if len(query) == 1:
            feature = self.encode_target(query)
            return dict.fromkeys(composers, feature)
        wanted = {name for composer in composers.values() if composer for name in composer.inputs}
        reference, text, extra = self._parts_of(query, wanted)
        assert None not in composers.values(), "a query of image and text needs a composer"
        return {name: composer.compose(reference, text, **extra) for name, composer in composers.items() if composer}

    def _parts_of(self, query: Mapping[str, Tensor], wanted: Collection[str]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """A query's features of image and text, not unit length, and what else composers take (their `inputs`)."""
        extra: dict[str, Any] = {}
        if "image_tokens" in wanted:
            encode = self.clip.visual.forward_with_tokens
            reference, extra["image_tokens"] = self._in_chunks(query["image"], encode)
        else:
            reference = self.image_features(query)
        if "text_tower" in wanted:
            extra |= {"text_tower": self.clip.text_tower, "token_ids": query["text"]}
        # The text's own feature costs a pass; a composer that puts something into the text has no use for it.
        text = self.text_features(query) if "vectors" in wanted else reference.new_empty(len(reference), 0)
        return reference, text, extra

    def encode_target(self, target: Mapping[str, Tensor]) -> Tensor:
        """`{image}` or `{text}`, or features of one -> unit features [B, D]."""
        is_image = "image" in target or "image_features" in target
        return unit(self.image_features(target) if is_image else self.text_features(target))

    def encode_negatives(self, negatives: Mapping[str, Tensor]) -> Tensor:
        """`{image [B, N, 3, H, W]}`, N images a query -> unit features [B, N, D]."""
        images = negatives["image"]
        return self.encode_target({"image": images.flatten(0, 1)}).unflatten(0, images.shape[:2])

    def training_pairs(self, query: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[Pair]:
        """What the loss compares for a training batch; images that are on both sides are encoded once."""
        composer = self.composer
        if composer is not None and composer.learns_from == "images":
            return composer.training_pairs(None, None, self.image_features(target), text_tower=self.clip.text_tower)
        if composer is not None and composer.learns_from == "texts":
            extra = {"text_tower": self.clip.text_tower, "token_ids": query["text"]}
            return composer.training_pairs(None, self.text_features(query), None, **extra)
        if composer is None or len(query) == 1:
            return [Pair(self.encode_target(query), self.encode_target(target))]
        encoded = None
        both = "image" in query and "image" in target and "image_tokens" not in composer.inputs
        if both and self.clip.visual.rows_are_independent:
            images = self._images(torch.cat([query["image"], target["image"]]))
            reference, encoded = images.tensor_split([len(query["image"])])
            query = {"image_features": reference} | {name: value for name, value in query.items() if name != "image"}
        reference, text, extra = self._parts_of(query, composer.inputs)
        encoded = self.image_features(target) if encoded is None else encoded
        return composer.training_pairs(reference, text, encoded, **extra)

    def image_features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """`{image}` or what a frozen tower gave for it, `{image_features}` -> features [B, D], not unit length."""
        return inputs["image_features"] if "image_features" in inputs else self._images(inputs["image"])

    def text_features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """`{text}` or `{text_features}` -> features [B, D], not unit length."""
        return inputs["text_features"] if "text_features" in inputs else self._texts(inputs["text"])

    def _images(self, images: Tensor) -> Tensor:
        """Uint8 images [B, 3, H, W] -> features [B, D]; equal ones are encoded once."""
        alone = self.clip.visual.rows_are_independent
        return encode_once(self._in_chunks, images) if alone else self._in_chunks(images)

    def _in_chunks(self, images: Tensor, encode: Callable[[Tensor], Any] | None = None) -> Any:
        """Uint8 images [B, 3, H, W] -> features [B, D], or what `encode` makes of normalised images."""
        encode = encode or self.clip.encode_image
        return encode_in_chunks(lambda part: encode(self.normalize(part)), images, size=self.chunk_size)

    def _texts(self, text: Tensor) -> Tensor:
        """Ids [B, L] -> features [B, D]; equal ones are encoded once."""
        tower = self.clip.text_tower
        encode = partial(encode_in_chunks, tower.forward_text, size=self.chunk_size)
        return encode_once(encode, text) if tower.rows_are_independent else encode(text)

    def score(self, query: Tensor, gallery: Tensor) -> Tensor:
        """Queries, unit gallery [G, D] -> scores_qg [Q, G]: the composer's own, or cosine."""
        if self.composer is not None and query.dim() == 3:
            weights = next(self.composer.parameters(), query)
            return self.composer.score(query.to(weights.dtype), gallery.to(weights.dtype))
        return query @ gallery.T

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale) [] or the fixed scale, which scores are multiplied by in training."""
        if self.fixed_scale is not None:
            return self.clip.logit_scale.new_tensor(self.fixed_scale)
        return self.clip.logit_scale.exp()

    def part_parameters(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each of PARTS; every parameter belongs to exactly one."""
        parts = {
            "image_encoder": list(self.clip.visual.parameters()),
            "text_encoder": self.clip.text_tower.text_parameters(),
            "composer": list(self.composer.parameters()) if self.composer is not None else [],
            "temperature": [p for p in (self.clip.logit_scale, self.clip.logit_bias) if p is not None],
        }
        counted = sum(len(parameters) for parameters in parts.values())
        assert counted == len(list(self.parameters())), "a parameter belongs to no part or to two"
        return parts

    def part_layers(self) -> dict[str, list[list[nn.Parameter]]]:
        """The parameters of each tower by layer, from its input to its output."""
        image, text = self.clip.visual, self.clip.text_tower
        return {
            "image_encoder": layers_of(image.parameters(), image.groups()),
            "text_encoder": layers_of(text.text_parameters(), text.text_groups()),
        }

    def set_chunk_size(self, size: int | None) -> None:
        """How many the towers take at a time in training, after `freeze`. UserError for BatchNorm that trains."""
        mode = self.training
        check_chunks([self.train().clip], size)  # what stays in evaluation mode then, does so in training
        self.train(mode)
        self.chunk_size = size
        if self.composer is not None:
            self.composer.chunk_size = size

    def freeze(self, parts: Iterable[str]) -> None:
        """Stop the gradients of `parts`, which then stay in evaluation mode; a fixed scale freezes the temperature."""
        frozen = {*parts, "temperature"} if self.fixed_scale is not None else set(parts)
        modules = {"image_encoder": self.clip.visual, "composer": self.composer}
        if self.clip.text_tower is not self.clip:  # else it is the whole model, and text at the root has no dropout
            modules["text_encoder"] = self.clip.text_tower
        for part in frozen:
            for parameter in self.part_parameters()[part]:
                parameter.requires_grad_(False)
            module = modules.get(part)
            if module is not None:
                self._frozen.append(module)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ComposedRetriever":
        """Frozen parts keep evaluating: no dropout, no new BatchNorm statistics."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self
