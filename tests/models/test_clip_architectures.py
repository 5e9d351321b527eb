"""Published architectures against open_clip's: values and gradients of some, keys and shapes of all."""

import json
import os
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from cliplab.models.architectures import read_architecture
from cliplab.models.clip import build_clip
from tests.oracles import assert_same_model, make_pair, open_clip_model, pictures, sentences

ALL = bool(os.environ.get("CLIPLAB_TEST_ALL"))
# Text towers of one kind are compared in full once, then with fewer layers; the image towers are always whole.
COMPARED = {
    "ViT-B-32": 12,
    "ViT-B-32-quickgelu": 1,
    "ViT-B-16": 1,
    "RN50": 1,
    "RN101": 1,
    "convnext_base": 1,
    "vit_medium_patch16_gap_256": 1,
    "ViT-B-16-SigLIP": 12,
}
SHAPES = [
    "ViT-B-32-256",
    "ViT-B-16-plus-240",
    "ViT-g-14",
    "ViT-H-14-CLIPA-336",
    "RN50x64",
    "EVA02-L-14-336",
    "ViT-SO400M-14-SigLIP-384",
    "ViT-B-32-SigLIP2-256",
    "MobileCLIP2-S3",
    "PE-Core-L-14-336",
    "ViTamin-L2-384",
    "convnext_large_d_320",
    "swin_base_patch4_window7_224",
    "ViT-H-14-378-quickgelu",
]
# What the nine architectures with a Hugging Face text tower name, small.
TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "mt5": {
        "model_type": "mt5",
        "vocab_size": 99,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 2,
        "num_heads": 3,
    },
    "nllb": {"model_type": "m2m_100", "vocab_size": 99, "d_model": 24, "encoder_layers": 2, "encoder_ffn_dim": 16},
    "roberta": {"model_type": "roberta", "vocab_size": 99, "hidden_size": 24, "num_hidden_layers": 2},
    "xlm": {"model_type": "xlm-roberta", "vocab_size": 99, "hidden_size": 24, "num_hidden_layers": 2},
}
TEXT_CONFIGS["nllb"] |= {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "decoder_layers": 1}
for kind in ("roberta", "xlm"):
    TEXT_CONFIGS[kind] |= {"num_attention_heads": 3, "intermediate_size": 40, "max_position_embeddings": 80}


def names(hugging_face: bool) -> list[str]:
    found = [name for name in open_clip.list_models() if not name.startswith("coca")]
    return [name for name in found if ("hf_model_name" in config_of(name)["text_cfg"]) == hugging_face]


def config_of(name: str) -> dict[str, Any]:
    return open_clip.get_model_config(name)


def assert_same_shapes(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        ours, theirs = build_clip(config), open_clip_model(config)
    found = {key: value.shape for key, value in ours.state_dict().items()}
    assert found == {key: value.shape for key, value in theirs.state_dict().items()}
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}


@pytest.mark.parametrize("name", COMPARED)
def test_features_and_gradients_are_open_clips(name: str) -> None:
    config = read_architecture(name)
    text = config["text_cfg"] = {**config["text_cfg"], "layers": COMPARED[name]}
    ours, theirs = make_pair(config)
    size, vocabulary = config["vision_cfg"]["image_size"], text.get("vocab_size", 49408)
    assert_same_model(ours, theirs, pictures(1, size), sentences(2, text.get("context_length", 77), vocabulary))
    if name == "ViT-B-32":
        assert len(ours.state_dict()) == 302
        assert sum(parameter.numel() for parameter in ours.parameters()) == 151_277_313


@pytest.mark.parametrize("name", names(hugging_face=False) if ALL else SHAPES)
def test_keys_and_shapes_are_open_clips(name: str) -> None:
    """CLIPLAB_TEST_ALL=1 compares all 131: 40 seconds more."""
    assert_same_shapes(config_of(name))


def test_none_is_left_out() -> None:
    assert (len(names(hugging_face=False)), len(names(hugging_face=True))) == (131, 9)
    assert set(SHAPES) <= set(names(hugging_face=False))


@pytest.mark.parametrize("name", names(hugging_face=True))
def test_keys_and_shapes_with_a_text_tower_of_hugging_face_are_open_clips(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    kind = next(kind for kind in ("mt5", "nllb", "xlm", "roberta") if kind in config["text_cfg"]["hf_model_name"])
    (tmp_path / "config.json").write_text(json.dumps(TEXT_CONFIGS[kind]))
    config["text_cfg"] |= {"hf_model_name": str(tmp_path), "hf_model_pretrained": False}
    assert_same_shapes(config)
