"""Folders of transformers' CLIPModel (BGE-VL's too) and SiglipModel: read into open_clip's form, and written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cliplab.errors import UserError

KINDS = ("clip", "clip_text_model", "clip_vision_model", "siglip", "siglip_text_model", "siglip_vision_model")
_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as Hugging Face stores them
_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_EOS_OF_OLD_CONFIGS = 2  # transformers then pools at the largest id, as OpenAI does


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a CLIP or SigLIP folder, completed by transformers' defaults. Raises UserError."""
    given = read_json(folder / "config.json")
    kind = given.get("model_type")
    if kind not in KINDS:
        raise UserError(f"{folder}/config.json is of a '{kind}' model: there are readers for {', '.join(KINDS)}")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    options = {k: v for k, v in given.items() if k not in ("model_type", "auto_map")}
    try:
        config = AutoConfig.for_model(kind, **options).to_dict()
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/config.json can't be: {str(error).splitlines()[-1].strip()}") from error
    if kind in ("clip", "siglip"):
        return config
    tower = "text_config" if "text" in kind else "vision_config"
    return {"model_type": kind.split("_")[0], tower: config, "projection_dim": config.get("projection_dim")}


def read_json(path: Path) -> dict[str, Any]:
    """A mapping. Raises UserError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping")
    return content


def architecture_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of `read_config` as an architecture in open_clip's form; a lone tower leaves the other empty."""
    try:
        return _siglip_architecture(config) if config["model_type"] == "siglip" else _clip_architecture(config)
    except (TypeError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"config.json of {config['model_type']} can't be: {type(error).__name__} {error}") from error


def _clip_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    text, vision = config.get("text_config"), config.get("vision_config")
    architecture: dict[str, Any] = {"embed_dim": config["projection_dim"], "vision_cfg": {}, "text_cfg": {}}
    quick = {tower["hidden_act"] == "quick_gelu" for tower in (text, vision) if tower}
    if len(quick) == 2:
        raise UserError("one tower uses quick_gelu and the other doesn't: open_clip's form can't say that")
    architecture["quick_gelu"] = quick.pop()
    if vision:
        heads, width = vision["num_attention_heads"], vision["hidden_size"]
        architecture["vision_cfg"] = {
            "layers": vision["num_hidden_layers"],
            "width": width,
            "head_width": width // heads,
            "patch_size": vision["patch_size"],
            "image_size": vision["image_size"],
            **_common(vision),
        }
    if text:
        pool: dict[str, Any] = {"pool_type": "argmax"}
        if not isinstance(text["eos_token_id"], int):
            raise UserError(f"text_config.eos_token_id must be a number, got {text['eos_token_id']!r}")
        if text["eos_token_id"] != _EOS_OF_OLD_CONFIGS:
            pool = {"pool_type": "eos", "eos_id": text["eos_token_id"]}
        architecture["text_cfg"] = {**_text_sizes(text), **_common(text), **pool}
    return architecture


def _siglip_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    text, vision = config.get("text_config"), config.get("vision_config")
    architecture: dict[str, Any] = {"custom_text": True, "vision_cfg": {}, "text_cfg": {}}
    architecture |= {"init_logit_scale": 2.302585092994046, "init_logit_bias": -10}
    if vision:
        width = vision["hidden_size"]
        if vision["layer_norm_eps"] != 1e-6:
            raise UserError(f"vision_config.layer_norm_eps={vision['layer_norm_eps']}: timm's SigLIP towers have 1e-6")
        architecture["embed_dim"] = width
        architecture["vision_cfg"] = {
            "image_size": vision["image_size"],
            "timm_model_name": "vit_base_patch16_siglip_224",
            "timm_pool": "map",
            "timm_proj": "none",
            "timm_kwargs": {
                "img_size": vision["image_size"],
                "patch_size": vision["patch_size"],
                "embed_dim": width,
                "depth": vision["num_hidden_layers"],
                "num_heads": vision["num_attention_heads"],
                "mlp_ratio": _mlp_ratio(vision),
                "act_layer": _timm_activation(vision),
            },
        }
    if text:
        architecture.setdefault("embed_dim", text.get("projection_size") or text["hidden_size"])
        architecture |= {"quick_gelu": True} if text["hidden_act"] == "quick_gelu" else {}
        siglip = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
        architecture["text_cfg"] = {**_text_sizes(text), **_common(text), **siglip}
    return architecture


def _timm_activation(vision: Mapping[str, Any]) -> str:
    known = {"gelu": "gelu", "quick_gelu": "quick_gelu", **dict.fromkeys(_TANH, "gelu_tanh")}
    if vision["hidden_act"] not in known:
        raise UserError(f"vision_config.hidden_act={vision['hidden_act']}: there is {', '.join(known)}")
    return known[vision["hidden_act"]]


def _text_sizes(text: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
    }


def _common(tower: Mapping[str, Any]) -> dict[str, Any]:
    """MLP, activation and norm, only where they are not open_clip's defaults."""
    options: dict[str, Any] = {}
    if tower["intermediate_size"] != 4 * tower["hidden_size"]:
        options["mlp_ratio"] = _mlp_ratio(tower)
    if tower["layer_norm_eps"] != 1e-5:
        options["norm_kwargs"] = {"eps": tower["layer_norm_eps"]}
    if tower["hidden_act"] in _TANH:
        options["act_kwargs"] = {"approximate": "tanh"}
    elif tower["hidden_act"] not in ("gelu", "quick_gelu"):
        raise UserError(f"hidden_act={tower['hidden_act']}: there is gelu, quick_gelu and {', '.join(_TANH)}")
    return options


def _mlp_ratio(tower: Mapping[str, Any]) -> float:
    """A ratio whose product with the width, rounded down, is the MLP's width."""
    width, hidden = tower["hidden_size"], tower["intermediate_size"]
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def preprocess_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Preprocess that the folder's image processor sets; its kind's own where there is no file."""
    processor, is_siglip = _processor(folder), config["model_type"] == "siglip"
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not processor.get(key, True):
            raise UserError(f"{folder}: its image processor has {key}=false; here pictures always are")
    size = (config.get("vision_config") or {}).get("image_size", 224)
    options: dict[str, Any] = {"size": size, "crop_rounding": "floor"}
    options |= {"mean": (0.5,) * 3, "std": (0.5,) * 3} if is_siglip else {}
    for field, key in (("mean", "image_mean"), ("std", "image_std")):
        if key in processor:
            if not isinstance(processor[key], list):
                raise UserError(f"{folder}: its image processor's {key} must be three numbers, got {processor[key]!r}")
            options[field] = tuple(processor[key])
    if processor.get("resample", 3) not in _FILTERS:
        raise UserError(f"{folder}: its resample={processor['resample']} is neither bilinear (2) nor bicubic (3)")
    options["interpolation"] = _FILTERS[processor.get("resample", 3)]
    options["resize_mode"] = _resize_mode(folder, processor, is_siglip)
    return options


def _resize_mode(folder: Path, processor: Mapping[str, Any], is_siglip: bool) -> str:
    asked, crop = processor.get("size") or {}, processor.get("crop_size") or {}
    sides = {"shortest_edge": asked} if isinstance(asked, int) else dict(asked)
    if "height" in sides and sides["height"] != sides.get("width"):
        raise UserError(f"{folder}: its image processor makes pictures of {sides}: they must be square")
    crop = crop if isinstance(crop, int) else crop.get("height")
    shortest = sides.get("shortest_edge")
    if processor.get("do_center_crop", not is_siglip) and crop and shortest and crop != shortest:
        raise UserError(f"{folder}: its image processor resizes to {shortest} and crops {crop}; both must be equal")
    return "squash" if "height" in sides or (is_siglip and not shortest) else "shortest"


def _processor(folder: Path) -> dict[str, Any]:
    """preprocessor_config.json, or processor_config.json's image_processor; empty where neither is there."""
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        return read_json(folder / "processor_config.json").get("image_processor") or {}
    return {}


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors or pytorch_model.bin, or their parts. Raises UserError where there are none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = [folder / part for part in sorted(set(read_json(index).get("weight_map", {}).values()))]
            missing = [part.name for part in parts if not part.is_file()]
            if missing or not parts:
                raise UserError(f"{index} names parts that are not there: {', '.join(missing)}")
            return parts
    raise UserError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin")
