"""Tiny models of transformers, disturbed and saved as folders: the oracles of the Hugging Face readers and writers."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.oracles import perturb, sentences

TEXT = {
    "vocab_size": 99,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 13,
}
VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def clip_model(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={
            **TEXT,
            "intermediate_size": 79,
            "bos_token_id": 97,
            "eos_token_id": 98,
            "pad_token_id": 0,
            **(text or {}),
        },
        vision_config={**VISION, "intermediate_size": 90, **(vision or {})},
        projection_dim=24,
    )
    return _disturbed(transformers.CLIPModel(config))


def siglip_model(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(0)
    config = transformers.SiglipConfig(
        text_config={**TEXT, "intermediate_size": 79, "projection_size": 32, "layer_norm_eps": 1e-6, **(text or {})},
        vision_config={**VISION, "intermediate_size": 90, **(vision or {})},
    )
    return _disturbed(transformers.SiglipModel(config))


def _disturbed(model: Any) -> Any:
    perturb(model)
    model.set_attn_implementation("eager")
    return model.eval()


def features_of(model: Any, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Projected features, not unit length."""
    image, words = model.get_image_features(pixel_values=images), model.get_text_features(input_ids=text)
    return getattr(image, "pooler_output", image), getattr(words, "pooler_output", words)


def ids(batch: int = 4, vocabulary: int = 99, length: int = 13) -> Tensor:
    return sentences(batch, length, vocabulary)


def saved(model: Any, folder: Path, processor: Any = None) -> Path:
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder
