"""Load any CLIP by name, tag, file, folder or run, one tower of it, and save it for others."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from cliplab.data.images import ImagePreprocess, Preprocess
from cliplab.errors import UserError
from cliplab.models.architectures import architecture_names
from cliplab.models.attention import set_attention
from cliplab.models.checkpoints import hugging_face_save, open_clip
from cliplab.models.checkpoints.weights import load_strictly, tower_weights
from cliplab.models.clip import CLIP, CustomTextCLIP, build_clip, image_tower, text_tower
from cliplab.models.image_tower import ImageTower
from cliplab.models.lora import merged
from cliplab.models.precision import cast
from cliplab.models.text_transformer import TextTower
from cliplab.registry import closest
from cliplab.sources import OPENAI, TOWERS, Source, find_source, image_side
from cliplab.tokenizer import Tokenizer

log = logging.getLogger(__name__)
_FILES_OF = {
    "open_clip": ("open_clip_config.json", "open_clip_model.safetensors"),
    "hugging_face": ("config.json", "model.safetensors", "preprocessor_config.json"),
}


class Loaded(NamedTuple):
    """What `load` gives: the model in evaluation mode, a picture -> tensor [3, H, W], texts -> ids [B, L]."""

    model: CLIP | CustomTextCLIP
    preprocess: ImagePreprocess
    tokenizer: Tokenizer


def available_models() -> list[str]:
    """OpenAI's nine, under OpenAI's names."""
    return list(OPENAI)


def supported_architectures() -> list[str]:
    """Names that `load` can build: open_clip's but for CoCa, and ours. Hugging Face text towers need their config."""
    return [name for name in architecture_names() if not name.startswith("coca")]


def load(
    name: str | Path,
    weights: str | Path | None = None,
    *,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    **overrides: Any,
) -> Loaded:
    """A dual encoder with its preprocessing and tokenizer.

    `name`: an architecture of open_clip or OpenAI (ViT-B-32, ViT-L/14@336px) or a JSON file in open_clip's form,
    `hf-hub:org/name`, a local folder in OpenCLIP's or Hugging Face's layout, or a run directory or checkpoint of ours.
    `weights`: a tag, file or folder; None: what the folder holds, random for an architecture. `precision`: fp32, bf16,
    fp16 (products in half precision, norms and embeddings in fp32, as OpenAI stores them), pure_bf16, pure_fp16.
    `overrides`: image_size, quick_gelu, context_length, attention (eager, sdpa, flash). `device="meta"` takes no
    memory. A local path causes no network access. Raises UserError.
    """
    is_meta = str(device) == "meta"
    source = find_source(str(name), str(weights) if weights is not None else None, overrides, read=not is_meta)
    with torch.device("meta" if is_meta else "cpu"):
        model = build(source)
    set_attention(model, overrides.get("attention") or "sdpa")
    cast(model, precision)
    _move(model, device)
    return Loaded(model, ImagePreprocess(source.preprocess), tokenizer_of(source.architecture))


class LoadedTower(NamedTuple):
    """What `load_tower` gives: a tower in evaluation mode, and the preprocessing or the tokenizer of its input."""

    model: ImageTower | TextTower
    preprocess: ImagePreprocess | None
    tokenizer: Tokenizer | None


def load_tower(
    name: str | Path,
    weights: str | Path | None = None,
    *,
    tower: Literal["image", "text"],
    projection: bool = True,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    **overrides: Any,
) -> LoadedTower:
    """One tower alone; the other is never built. `tower(x)` -> features [B, D], or [B, W] without the projection.

    Names, weights and overrides as in `load`; also Hugging Face folders of a lone tower (CLIPVisionModel,
    CLIPTextModelWithProjection, ...). Raises UserError.
    """
    if tower not in TOWERS:
        raise UserError(f"unknown tower '{tower}': {closest(str(tower), TOWERS)}")
    is_meta = str(device) == "meta"
    source = find_source(str(name), str(weights) if weights is not None else None, overrides, read=not is_meta)
    with torch.device("meta" if is_meta else "cpu"):
        model = build_tower(source, tower, projection, read=not is_meta)
    set_attention(model, overrides.get("attention") or "sdpa")
    cast(model, precision)
    _move(model, device)
    if isinstance(model, ImageTower):
        return LoadedTower(model, ImagePreprocess(source.preprocess), None)
    return LoadedTower(model, None, tokenizer_of(source.architecture))


def _move(model: nn.Module, device: str | torch.device) -> None:
    try:
        model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device} can't be used: {str(error).splitlines()[0]}") from error


def build_tower(source: Source, tower: str, projection: bool, read: bool = True) -> ImageTower | TextTower:
    """One tower of a source with its weights, on the current default device."""
    if tower not in source.towers:
        raise UserError(f"{source.name} holds the {source.towers[0]} tower alone, not the {tower} tower")
    a = source.architecture
    options = (a["embed_dim"], a.get("quick_gelu", False))
    model = image_tower(a["vision_cfg"], *options) if tower == "image" else text_tower(a["text_cfg"], *options)
    keys = set(model.state_dict())
    if not projection:
        model.remove_projection()
    if source.weights is None:
        log.info("%s: no weights are given, the tower starts from random ones", source.name)
    elif read:
        dropped = keys - set(model.state_dict())
        own = {k: v for k, v in tower_weights(source.weights.state_dict, tower).items() if k not in dropped}
        load_strictly(model, own, source.weights.source)
    return model


def build(source: Source) -> CLIP | CustomTextCLIP:
    """The model of a source with its weights, on the current default device."""
    if source.towers != TOWERS:
        raise UserError(f"{source.name} holds the {source.towers[0]} tower alone: load it by cliplab.load_tower")
    model = build_towers(source)
    if source.weights is None:
        log.info("%s: no weights are given, the model starts from random ones", source.name)
    elif not model.logit_scale.is_meta:
        load_strictly(model, source.weights.state_dict, source.weights.source)
    model.visual.preprocess_cfg = asdict(source.preprocess)  # open_clip's place for it
    return model


def build_towers(source: Source) -> CLIP | CustomTextCLIP:
    """The model of a source without weights. Raises UserError for an architecture that can't be built."""
    try:
        return build_clip(source.architecture)
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from error
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{source.name} (model.arch) has towers that can't be built: {reason}") from error


def tokenizer_of(architecture: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that an architecture's text tower was trained with; its files are looked for at the first call."""
    text = architecture["text_cfg"]
    return Tokenizer(
        text.get("context_length", 77),
        text.get("hf_tokenizer_name") or text.get("hf_model_name"),
        text.get("tokenizer_mode"),
        text.get("tokenizer_kwargs"),
    )


def save(model: nn.Module, folder: str | Path, format: Literal["open_clip", "hugging_face"] = "open_clip") -> Path:
    """Write a dual encoder as a folder that open_clip loads (`local-dir:FOLDER`) or transformers (`from_pretrained`).

    `model` is what `load` gave, also after fine-tuning. An existing model there is replaced. Raises UserError for what
    the format has no words for.
    """
    writers = {"open_clip": open_clip.write_folder, "hugging_face": hugging_face_save.write_folder}
    if format not in writers:
        raise UserError(f"unknown format '{format}': {closest(str(format), writers)}")
    if not isinstance(model, CLIP | CustomTextCLIP):
        raise UserError(f"save writes CLIP and CustomTextCLIP, got {type(model).__name__}; of a run: load(RUN).model")
    if model.logit_scale.is_meta:
        raise UserError("a model on the device meta has no weights to save")
    folder, architecture = Path(folder), model.architecture
    preprocess = model.visual.preprocess_cfg or asdict(Preprocess(size=image_side(architecture)))
    state_dict = {key: value.detach().cpu().contiguous() for key, value in merged(model.state_dict()).items()}
    try:
        writers[format](folder, state_dict, architecture, preprocess)
        for name in _FILES_OF[next(other for other in writers if other != format)]:
            (folder / name).unlink(missing_ok=True)  # of an earlier model in the other format
        _copy_tokenizer(architecture["text_cfg"].get("hf_tokenizer_name"), folder)
        if hasattr(model.text_tower, "config"):  # a Hugging Face text tower is built from its config
            model.text_tower.config.save_pretrained(folder)  # type: ignore[operator,union-attr]
    except OSError as error:
        raise UserError(f"can't write {folder}: {error}") from error
    return folder


def _copy_tokenizer(source: str | None, folder: Path) -> None:
    """The files of a tokenizer that lies in a local folder go with the model."""
    if source is None or not Path(source).is_dir() or Path(source).resolve() == folder.resolve():
        return
    names = ("tokenizer*.json", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")
    for path in (path for name in names for path in Path(source).glob(name)):
        shutil.copy(path, folder / path.name)
