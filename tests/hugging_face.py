"""Tiny models of transformers, disturbed and saved as folders: the oracles of all that reads and writes their form."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
)

from tests.oracles import perturb, sentences

Options = dict[str, Any]
TEXT = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 79,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 13,
}
CLIP_TEXT = {**TEXT, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 0}
SIGLIP_TEXT = {**TEXT, "projection_size": 32, "layer_norm_eps": 1e-6}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 90,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
# With the vocabulary and the length of the real tokenizers, where texts are tokenized.
REAL_CLIP_TEXT = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}
REAL_SIGLIP_TEXT = {"vocab_size": 300, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1}


def clip_config(text: Options | None = None, vision: Options | None = None, **options: Any) -> CLIPConfig:
    text, vision = {**CLIP_TEXT, **(text or {})}, {**VISION, **(vision or {})}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=24, **options)


def siglip_config(text: Options | None = None, vision: Options | None = None) -> SiglipConfig:
    return SiglipConfig(text_config={**SIGLIP_TEXT, **(text or {})}, vision_config={**VISION, **(vision or {})})


def clip_model(text: Options | None = None, vision: Options | None = None) -> Any:
    return _disturbed(CLIPModel, clip_config(text, vision))


def siglip_model(text: Options | None = None, vision: Options | None = None) -> Any:
    return _disturbed(SiglipModel, siglip_config(text, vision))


def make_model(kind: type[PreTrainedModel], seed: int = 0) -> Any:
    """A model of any kind, lone towers and classifiers too, that takes what the real tokenizers give."""
    clip = clip_config(REAL_CLIP_TEXT, num_labels=5)
    config: Any = siglip_config(REAL_SIGLIP_TEXT) if kind.__name__.startswith("Siglip") else clip
    if kind not in (CLIPModel, SiglipModel, CLIPForImageClassification):
        config = config.text_config if "Text" in kind.__name__ else config.vision_config
    return _disturbed(kind, config, seed)


def _disturbed(kind: type[PreTrainedModel], config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model: Any = kind(config)
    perturb(model)
    model.set_attn_implementation("eager")
    return model.eval()


def features_of(model: Any, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Projected features, not unit length."""
    image, words = model.get_image_features(pixel_values=images), model.get_text_features(input_ids=text)
    return getattr(image, "pooler_output", image), getattr(words, "pooler_output", words)


def ids(batch: int = 4, vocabulary: int = 99, length: int = 13) -> Tensor:
    return sentences(batch, length, vocabulary)


def clip_ids(rows: int, length: int = 77, seed: int = 3) -> Tensor:
    """Start, words, end token 49407, and 49407 as padding, as Hugging Face pads."""
    ids = torch.randint(1000, 40000, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 49406
    for row in range(rows):
        ids[row, 3 + 5 * row :] = 49407
    return ids


def saved(model: Any, folder: Path, processor: Any = None) -> Path:
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder
