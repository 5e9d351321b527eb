"""OpenCLIP's pretrained tags, and its folders (open_clip_config.json beside the weights), read and written."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cliplab.errors import UserError
from cliplab.models.checkpoints.hub import hub_file
from cliplab.models.checkpoints.hugging_face import read_json
from cliplab.models.checkpoints.weights import Weights, read_file
from cliplab.registry import closest

CONFIG = "open_clip_config.json"
# What open_clip itself looks for in a folder, in its order; then any other file of weights.
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_FILES += ("open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


def check_tag(arch: str, tag: str) -> None:
    """Raise UserError unless the tag belongs to the architecture."""
    from open_clip import list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(arch)
    if tag not in tags:
        hint = closest(tag, tags) if tags else f"'{arch}' has no pretrained tags"
        raise UserError(f"unknown weights '{tag}' for {arch} (model.weights): {hint}; there is no such file either")


def read_tag(arch: str, tag: str, read: bool = True) -> Weights:
    """The weights of a tag, from the cache or the network, with its activation and preprocessing. Raises UserError.

    With `read` False no tensors, and no network.
    """
    from open_clip import get_pretrained_cfg

    check_tag(arch, tag)
    config = get_pretrained_cfg(arch, tag)
    known = {key: config[key] for key in _PREPROCESS if config.get(key) is not None}
    found = Weights(f"{arch} {tag}", {}, config.get("quick_gelu", False), known)
    if not read:
        return found
    try:
        return replace(found, state_dict=read_file(_tag_file(config)).state_dict)
    except UserError as error:
        raise UserError(
            f"can't read the weights '{tag}' of {arch}: {error}. Or give a file of weights as model.weights"
        ) from error


def _tag_file(config: Mapping[str, Any]) -> Path:
    """open_clip's rule: a repository and a file's name, or its usual names; safetensors first."""
    repository, _, name = config["hf_hub"].rpartition("/")
    wanted = [str(Path(name).with_suffix(".safetensors")), name] if name else [_FILES[0], _FILES[2]]
    return _first_file(repository, wanted)


def _first_file(repository: str, names: list[str]) -> Path:
    missing = None
    for name in dict.fromkeys(names):
        try:
            return hub_file(repository, name)
        except FileNotFoundError as error:
            missing = error
    raise UserError(f"the Hugging Face repository '{repository}' has none of {', '.join(names)}") from missing


def read_folder_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Architecture and preprocessing of an OpenCLIP folder. Raises UserError."""
    config = read_json(folder / CONFIG)
    architecture = config.get("model_cfg", config)
    if not isinstance(architecture, dict):
        raise UserError(f"{folder / CONFIG}: model_cfg must be a mapping, got {architecture!r}")
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(architecture)
    if missing:
        raise UserError(f"{folder / CONFIG} lacks {', '.join(sorted(missing))} (model_cfg)")
    for section in ("vision_cfg", "text_cfg"):
        if not isinstance(architecture[section], dict):
            raise UserError(f"{folder / CONFIG}: {section} must be a mapping, got {architecture[section]!r}")
    asked = config.get("preprocess_cfg") or {}
    if not isinstance(asked, dict):
        raise UserError(f"{folder / CONFIG}: preprocess_cfg must be a mapping, got {asked!r}")
    known = {key: asked[key] for key in (*_PREPROCESS, "crop_rounding") if asked.get(key) is not None}
    known |= {key: tuple(known[key]) for key in ("mean", "std") if isinstance(known.get(key), list)}
    if known.get("interpolation") == "random":  # a choice of training alone: open_clip evaluates bicubic then
        known["interpolation"] = "bicubic"
    return architecture, known


def folder_weights(folder: Path) -> Path:
    """The file of weights in an OpenCLIP folder. Raises UserError where there is none, or several and none by name."""
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for ending in ("*.safetensors", "*.bin", "*.pt", "*.pth") for path in folder.glob(ending))
    if len(others) == 1:
        return others[0]
    found = ", ".join(path.name for path in others) or "no file of weights"
    raise UserError(f"{folder} holds {found}: name the one to read {_FILES[0]}")


def write_folder(
    folder: Path, state_dict: Mapping[str, Tensor], architecture: Mapping[str, Any], preprocess: Mapping[str, Any]
) -> None:
    """open_clip_config.json and open_clip_model.safetensors, which open_clip loads as `local-dir:`.

    Raises UserError for an architecture that open_clip has no words for.
    """
    from safetensors.torch import save_file

    _refuse_what_open_clip_cannot_build(architecture["vision_cfg"])
    text_cfg = {key: value for key, value in architecture["text_cfg"].items() if key != "hf_model_pretrained"}
    model_cfg = {**architecture, "text_cfg": text_cfg}
    known = {key: preprocess[key] for key in ("size", *_PREPROCESS, "crop_rounding")}  # the last is ours alone
    config = {"model_cfg": model_cfg, "preprocess_cfg": {**known, "mode": "RGB", "fill_color": 0}}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(state_dict), folder / _FILES[0])
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _refuse_what_open_clip_cannot_build(vision: Mapping[str, Any]) -> None:
    extra, name = vision.get("timm_kwargs"), vision.get("timm_model_name")
    if extra:
        raise UserError(f"open_clip has no words for timm_kwargs={extra}: save in the format hugging_face")
    if name:
        import timm
        import torch

        with torch.device("meta"):
            trunk = timm.create_model(name)
        own = trunk.default_cfg["input_size"][-1]  # type: ignore[index,union-attr]
        if hasattr(trunk, "set_input_size") and vision["image_size"] != own:
            raise UserError(
                f"open_clip builds {name} for pictures of {own} alone, this one takes {vision['image_size']}: it can't "
                "be saved in the format open_clip"
            )
