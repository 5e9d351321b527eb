"""Write a dual encoder as a folder that transformers' CLIPModel or SiglipModel loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cliplab.errors import UserError
from cliplab.models.checkpoints.hugging_face_keys import from_open_clip

_RESAMPLE = {"bilinear": 2, "bicubic": 3}


def write_folder(
    folder: Path, state_dict: Mapping[str, Tensor], architecture: Mapping[str, Any], preprocess: Mapping[str, Any]
) -> None:
    """config.json, model.safetensors, preprocessor_config.json, and CLIP's vocabulary where the model uses it.

    Raises UserError, and writes nothing, for what transformers' models have no words for.
    """
    from safetensors.torch import save_file

    is_siglip = "visual.trunk.attn_pool.latent" in state_dict
    if not is_siglip and "visual.proj" not in state_dict:
        raise UserError("the format hugging_face knows CLIP's ViT and SigLIP: save this model as open_clip")
    flat = {key.removeprefix("text.") if not is_siglip else key: value for key, value in state_dict.items()}
    config = _siglip_config(flat, architecture) if is_siglip else _clip_config(flat, architecture)
    squashed = preprocess["resize_mode"] == "squash"
    processor = _processor(preprocess, "SiglipImageProcessor" if is_siglip and squashed else "CLIPImageProcessor")
    converted = from_open_clip(flat, is_siglip)
    scalars = {"logit_scale", "logit_bias"} & converted.keys()
    converted |= {key: converted[key].reshape([1] if is_siglip else []) for key in scalars}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(converted, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if not is_siglip and config["text_config"]["vocab_size"] == 49408:
        _write_vocabulary(folder, config["text_config"]["max_position_embeddings"])


def _clip_config(state_dict: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> dict[str, Any]:
    vision, text, quick = architecture["vision_cfg"], architecture["text_cfg"], architecture.get("quick_gelu", False)
    _refuse(vision, "vision_cfg", pool_type="tok", no_ln_pre=False, final_ln_after_pool=False, ls_init_value=None)
    _refuse(text, "text_cfg", no_causal_mask=False, proj_bias=False, proj_type="linear", ls_init_value=None)
    pool = text.get("pool_type", "argmax")
    if pool not in ("argmax", "eos"):
        raise UserError(f"text_cfg.pool_type={pool}: transformers' CLIPModel pools at the end token only")
    if pool == "eos" and text.get("eos_id", 2) == 2:
        raise UserError("text_cfg.eos_id=2 with pool_type=eos: transformers takes 2 for a pooling at the largest id")
    width = vision["width"]
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": architecture["embed_dim"],
        "logit_scale_init_value": 2.6592,
        "vision_config": {
            "model_type": "clip_vision_model",
            "num_attention_heads": width // vision.get("head_width", 64),
            "patch_size": vision.get("patch_size", 16),
            "image_size": _side(vision),
            "projection_dim": architecture["embed_dim"],
            **_sizes(state_dict, "visual.transformer.resblocks", vision, quick),
        },
        "text_config": {
            "model_type": "clip_text_model",
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "projection_dim": architecture["embed_dim"],
            # 2 is what makes transformers pool at the largest id, as OpenAI's own configs have it
            **({"bos_token_id": 0, "eos_token_id": 2} if pool == "argmax" else {"eos_token_id": text.get("eos_id", 2)}),
            **_sizes(state_dict, "transformer.resblocks", text, quick),
        },
    }


def _siglip_config(state_dict: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> dict[str, Any]:
    text, trunk = architecture["text_cfg"], "visual.trunk"
    required = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    for key, value in required.items():
        if text.get(key) != value:
            raise UserError(f"text_cfg.{key}={text.get(key)}: transformers' SiglipModel has {key}={value}")
    patches = state_dict[f"{trunk}.patch_embed.proj.weight"]
    heads, activation = _trunk_options(architecture["vision_cfg"])
    vision = {
        "model_type": "siglip_vision_model",
        "num_attention_heads": heads,
        "patch_size": patches.shape[-1],
        "image_size": _side(architecture["vision_cfg"]),
        "hidden_size": len(patches),
        "intermediate_size": len(state_dict[f"{trunk}.blocks.0.mlp.fc1.weight"]),
        "num_hidden_layers": _layers(state_dict, f"{trunk}.blocks"),
        "hidden_act": activation,
        "layer_norm_eps": 1e-6,
    }
    sizes = _sizes(state_dict, "text.transformer.resblocks", text, quick=architecture.get("quick_gelu", False))
    written = {
        "model_type": "siglip_text_model",
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "vocab_size": text["vocab_size"],
        "projection_size": architecture["embed_dim"],
        **sizes,
    }
    return {"architectures": ["SiglipModel"], "model_type": "siglip", "vision_config": vision, "text_config": written}


def _trunk_options(vision: Mapping[str, Any]) -> tuple[int, str]:
    """Heads and activation of a SigLIP trunk, as timm builds it."""
    import timm

    with torch.device("meta"):
        options = vision.get("timm_kwargs") or {}
        trunk: Any = timm.create_model(vision["timm_model_name"], num_classes=0, global_pool="map", **options)
    block = trunk.blocks[0]
    name = type(block.mlp.act).__name__
    tanh = getattr(block.mlp.act, "approximate", None) == "tanh" or "Tanh" in name
    return block.attn.num_heads, "quick_gelu" if "Quick" in name else "gelu_pytorch_tanh" if tanh else "gelu"


def _sizes(state_dict: Mapping[str, Tensor], blocks: str, cfg: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    tanh = (cfg.get("act_kwargs") or {}).get("approximate") == "tanh"
    hidden, width = state_dict[f"{blocks}.0.mlp.c_fc.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": _layers(state_dict, blocks),
        "hidden_act": "quick_gelu" if quick else "gelu_pytorch_tanh" if tanh else "gelu",
        "layer_norm_eps": (cfg.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def _layers(state_dict: Mapping[str, Tensor], blocks: str) -> int:
    return len({key.removeprefix(f"{blocks}.").split(".")[0] for key in state_dict if key.startswith(f"{blocks}.")})


def _side(vision: Mapping[str, Any]) -> int:
    side = vision["image_size"]
    if not isinstance(side, int):
        raise UserError(f"vision_cfg.image_size={side}: transformers' models have square pictures")
    return side


def _refuse(cfg: Mapping[str, Any], section: str, **allowed: Any) -> None:
    for key, value in allowed.items():
        if cfg.get(key, value) != value:
            raise UserError(f"{section}.{key}={cfg[key]}: transformers' CLIPModel can't say that; save as open_clip")


def _processor(preprocess: Mapping[str, Any], kind: str) -> dict[str, Any]:
    size = preprocess["size"]
    if preprocess["resize_mode"] == "longest":
        raise UserError("resize_mode=longest: Hugging Face's image processors have no words for it; save as open_clip")
    squash = preprocess["resize_mode"] == "squash"
    return {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"height": size, "width": size} if squash else {"shortest_edge": size},
        "resample": _RESAMPLE[preprocess["interpolation"]],
        "do_center_crop": not squash,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def _write_vocabulary(folder: Path, context_length: int) -> None:
    """vocab.json and merges.txt of CLIP's byte-pair vocabulary, which CLIPTokenizer reads."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    names = {"<start_of_text>": start, "<end_of_text>": end}
    vocabulary = {names.get(token, token): number for token, number in tokenizer.encoder.items()}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
