"""Pictures and texts -> vectors, and search among one's own pictures: the interface of BGE-VL (Zhou et al., 2025)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cliplab.data.images import ImagePreprocess
from cliplab.data.inputs import Picture, Pictures, Texts, paired, pictures_below
from cliplab.errors import UserError
from cliplab.evaluation.nearest import top_k
from cliplab.evaluation.scoring import CosineScorer
from cliplab.models.architectures import architecture_names
from cliplab.models.clip import CLIP, CustomTextCLIP
from cliplab.models.encoding import evaluating, progress
from cliplab.pretrained import load
from cliplab.sources import HUB, LOCAL, architecture_name
from cliplab.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPOutput

THREADS = 4  # that decode and resize pictures of a batch; Pillow leaves the interpreter while it works


class SearchResult(NamedTuple):
    """The best pictures of one query, best first."""

    paths: list[str]
    scores: list[float]  # cosines


class Encoder(nn.Module):
    """A dual encoder with its preprocessing and tokenizer.

    `encode` chooses by what is given: pictures, texts, or composed queries of both. All vectors are unit length, fp32.
    """

    def __init__(self, model: CLIP | CustomTextCLIP, preprocess: ImagePreprocess, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model, self.preprocess, self.tokenizer = model, preprocess, tokenizer
        self._paths: list[str] = []
        self._gallery: Tensor | None = None

    @classmethod
    def from_pretrained(cls, name: str | Path, weights: str | Path | None = None, **options: Any) -> Encoder:
        """Whatever `cliplab.load` takes; a name `org/name` that is neither folder nor architecture is a repository."""
        return cls(*load(_repository_or(str(name)), weights, **options))

    def set_processor(self, name: str | Path) -> None:
        """Take preprocessing and tokenizer from another model: a folder, a repository, an architecture."""
        loaded = load(_repository_or(str(name)), device="meta")
        self.preprocess, self.tokenizer = loaded.preprocess, loaded.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.model.logit_scale.device

    def encode(self, images: Pictures | None = None, text: Texts | None = None, batch_size: int = 64) -> Tensor:
        """Pictures, texts or both -> unit vectors [N, D] on the CPU, without gradient; one input gives N = 1.

        Read and encoded batch by batch, texts of similar length together, with a progress bar above a few batches.
        Raises UserError for inputs of different types or lengths and for unreadable pictures.
        """
        images, text, _ = paired(images, text)
        if batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}")
        given = images if images is not None else text
        assert given is not None
        vectors, cut = torch.empty(len(given), self.model.embed_dim), []
        order = sorted(range(len(given)), key=lambda number: len(text[number])) if text else range(len(given))
        with evaluating(self):
            for start in progress(range(0, len(given), batch_size), "encoding", len(given) > 4 * batch_size):
                part = list(order[start : start + batch_size])
                pixels = self._pixels([images[number] for number in part]) if images else None
                ids = self._ids([text[number] for number in part], cut) if text else None
                vectors[part] = self._encode_processed(pixels, ids).float().cpu()
        self._warn_of(cut)
        return vectors

    def encode_image(self, images: Pictures | Tensor) -> Tensor:
        """Pictures, or their input [N, 3, H, W] -> unit vectors [N, D]; with gradient where it is enabled."""
        pixels = images if isinstance(images, Tensor) else self.data_process(images)[0]
        assert pixels is not None
        return F.normalize(self.get_image_features(pixels).float(), dim=-1)

    def encode_text(self, text: Texts | Mapping[str, Tensor] | Tensor) -> Tensor:
        """Texts, or their ids [N, L], or a mapping with input_ids -> unit vectors [N, D]."""
        return F.normalize(self.get_text_features(**self._tokens(text)).float(), dim=-1)

    def encode_multimodal(self, images: Pictures | Tensor, text: Texts | Mapping[str, Tensor] | Tensor) -> Tensor:
        """Composed queries: n(text features + image features), of features that are not normalised before -> [N, D]."""
        if not isinstance(images, Tensor) and isinstance(text, str | list | tuple):
            paired(images, text)
        pixels = images if isinstance(images, Tensor) else self.data_process(images)[0]
        assert pixels is not None
        tokens = self._tokens(text)
        if len(pixels) != len(tokens["input_ids"]):
            raise UserError(
                f"{len(pixels)} images and {len(tokens['input_ids'])} texts: each picture goes with its text"
            )
        features = self.get_text_features(**tokens) + self.get_image_features(pixels)
        return F.normalize(features.float(), dim=-1)

    def data_process(
        self, images: Pictures | None = None, text: Texts | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor] | None, str]:
        """Inputs as the model takes them: pixels [N, 3, H, W], {input_ids [N, L]}, and images, text or multimodal.

        Texts longer than the context are cut, with one warning. Raises UserError for inputs of different types or
        lengths.
        """
        pictures, texts, kind = paired(images, text)
        pixels = self._pixels(pictures) if pictures is not None else None
        return pixels, self._tokens(texts) if texts is not None else None, kind

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] -> projected features [N, D], not unit length."""
        return self.model.encode_image(pixel_values.to(self.device))

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Ids [N, L], mask [N, L] with 0 for tokens that may not be looked at -> features [N, D], not unit length."""
        from cliplab.hugging_face_outputs import text_output

        if attention_mask is None and position_ids is None:
            return self.model.encode_text(input_ids.to(self.device))
        ids = input_ids.to(self.device)
        features = text_output(self.model.text_tower, ids, attention_mask, position_ids).pooler_output
        assert features is not None
        return features

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> CLIPOutput:
        """Ids [C, L] and pixels [B, 3, H, W] -> transformers' CLIPOutput.

        logits_per_image [B, C], logits_per_text [C, B], unit text_embeds [C, D] and image_embeds [B, D]; loss: CLIP's,
        or SigLIP's where the model has a logit_bias; text_model_output and vision_model_output with hidden_states and
        attentions where they are asked for (computed eagerly then).
        """
        from transformers.models.clip.modeling_clip import CLIPOutput

        from cliplab.hugging_face_outputs import contrastive_loss, image_output, text_output

        if input_ids is None or pixel_values is None:
            raise UserError("forward needs input_ids and pixel_values; encode takes pictures or texts alone")
        asked = {"hidden_states": output_hidden_states, "attentions": output_attentions}
        vision = image_output(self.model.visual, pixel_values, **asked)
        text = text_output(self.model.text_tower, input_ids, attention_mask, position_ids, **asked)
        assert vision.pooler_output is not None and text.pooler_output is not None
        image_embeds = F.normalize(vision.pooler_output, dim=-1)
        text_embeds = F.normalize(text.pooler_output, dim=-1)
        logits = self.model.logits(image_embeds, text_embeds)
        loss = contrastive_loss(logits, self.model.logit_bias is not None) if return_loss else None
        return CLIPOutput(
            loss=loss,  # type: ignore[arg-type]
            logits_per_image=logits,  # type: ignore[arg-type]
            logits_per_text=logits.T,  # type: ignore[arg-type]
            text_embeds=text_embeds,  # type: ignore[arg-type]
            image_embeds=image_embeds,  # type: ignore[arg-type]
            text_model_output=text,
            vision_model_output=vision,
        )

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.model.set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations."""
        self.model.set_grad_checkpointing(False)

    def index(self, folder: str | Path, batch_size: int = 64) -> int:
        """Encode all pictures in a folder and below for `search`; how many. Raises UserError if there are none."""
        paths = pictures_below(folder)
        self._gallery, self._paths = self.encode(images=paths, batch_size=batch_size), paths
        return len(paths)

    def search(
        self, images: Pictures | None = None, text: Texts | None = None, k: int = 10
    ) -> SearchResult | list[SearchResult]:
        """The k best indexed pictures by cosine, for one query, or a list of results for a list of queries.

        Raises UserError before `index`.
        """
        if self._gallery is None:
            raise UserError("there is nothing to search: call index(folder) first")
        if not isinstance(k, int) or k < 1:
            raise UserError(f"k must be 1 or more, got {k}")
        queries, k = self.encode(images, text), min(k, len(self._paths))
        rows = top_k(queries, self._gallery, k, [[] for _ in queries], CosineScorer())
        scores = torch.einsum("qd,qkd->qk", queries, self._gallery[rows])
        results = [
            SearchResult([self._paths[row] for row in best], values)
            for best, values in zip(rows.tolist(), scores.tolist(), strict=True)
        ]
        is_one = all(given is None or isinstance(given, str | Path | Image.Image) for given in (images, text))
        return results[0] if is_one else results

    def _tokens(self, text: Texts | Mapping[str, Tensor] | Tensor) -> dict[str, Tensor]:
        if isinstance(text, Mapping):
            known = ("input_ids", "attention_mask", "position_ids")  # others' tokenizers give more
            return {key: value.to(self.device) for key, value in text.items() if key in known}
        if isinstance(text, Tensor):
            return {"input_ids": text.to(self.device)}
        cut: list[str] = []
        ids = self._ids(paired(None, text)[1] or [], cut)
        self._warn_of(cut)
        return {"input_ids": ids}

    def _pixels(self, pictures: Sequence[Picture]) -> Tensor:
        with ThreadPoolExecutor(THREADS) as pool:
            return torch.stack(list(pool.map(self.preprocess, pictures))).to(self.device)

    def _ids(self, texts: list[str], cut: list[str]) -> Tensor:
        """Ids [N, L]; the texts that were too long are added to `cut`."""
        ids = self.tokenizer(texts)
        cut += [text for text, row in zip(texts, ids, strict=True) if self.tokenizer.is_cut(text, row)]
        return ids.to(self.device)

    def _warn_of(self, cut: list[str]) -> None:
        if cut:
            shown = cut[0] if len(cut[0]) <= 60 else f"{cut[0][:60]}..."
            length = self.tokenizer.context_length
            warnings.warn(f"{len(cut)} text(s) longer than {length} tokens were cut: '{shown}'", stacklevel=3)

    def _encode_processed(self, pixels: Tensor | None, ids: Tensor | None) -> Tensor:
        if pixels is None:
            assert ids is not None
            return self.encode_text(ids)
        return self.encode_image(pixels) if ids is None else self.encode_multimodal(pixels, ids)


def _repository_or(name: str) -> str:
    """`org/name` as a repository of the hub, unless it is a folder, an architecture or already says so."""
    if Path(name).exists() or name.count("/") != 1 or name.startswith((HUB, LOCAL, ".", "/")) or name.endswith(".json"):
        return name
    return name if architecture_name(name) in architecture_names() else f"{HUB}{name}"
