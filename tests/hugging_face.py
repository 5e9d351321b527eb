"""Tiny models of transformers as folders, the way they are published."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionModel,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 50}
VISION = {**SIZES, "hidden_size": 48, "image_size": 32, "patch_size": 8}
LONE_TOWERS = {
    "image": (CLIPVisionModel, CLIPVisionModelWithProjection, SiglipVisionModel),
    "text": (CLIPTextModel, CLIPTextModelWithProjection, SiglipTextModel),
}


def clip_config(**options: Any) -> CLIPConfig:
    return CLIPConfig(text_config=SIZES, vision_config=VISION, projection_dim=16, **options)


def siglip_config() -> SiglipConfig:
    text = {**SIZES, "hidden_size": 48, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 1}
    return SiglipConfig(text_config=text, vision_config=VISION)


def make_model(kind: type[PreTrainedModel], seed: int = 0) -> Any:
    """A random model in evaluation mode that attends eagerly, norms and biases disturbed."""
    torch.manual_seed(seed)
    config: Any = siglip_config() if kind.__name__.startswith("Siglip") else clip_config(num_labels=5)
    if kind not in (CLIPModel, SiglipModel, CLIPForImageClassification):
        config = config.text_config if "Text" in kind.__name__ else config.vision_config
    model: Any = kind(config)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def save_model(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def clip_ids(rows: int, length: int = 77, seed: int = 3) -> torch.Tensor:
    """Start, words, end token 49407, and 49407 as padding, as Hugging Face pads."""
    ids = torch.randint(1000, 40000, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 49406
    for row in range(rows):
        ids[row, 3 + 5 * row :] = 49407
    return ids
