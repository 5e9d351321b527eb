"""Weights of any format as one state dict in open_clip's keys, and their strict loading into a model."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.checkpoints.hugging_face_keys import is_hugging_face, to_open_clip
from cliplab.models.checkpoints.torch_file import read_torch_file
from cliplab.models.image_tower import ImageTower
from cliplab.models.lora import merged
from cliplab.models.text_transformer import CLIPTextTower, resize_text_positions

log = logging.getLogger(__name__)
FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict")
# Of DistributedDataParallel, torch.compile, a run's own checkpoint, and of anyone's LightningModule.
_PREFIXES = ("module.", "_orig_mod.", "module.", "model.clip.", "model.visual.")
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")  # of OpenAI's archives, beside the weights
_TEXT_KEYS = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")


@dataclass(frozen=True)
class Weights:
    """A state dict in open_clip's keys and what belongs to it: activation and preprocessing (empty = unknown)."""

    source: str
    state_dict: Mapping[str, Tensor]
    quick_gelu: bool | None = None
    preprocess: dict[str, Any] = field(default_factory=dict)  # fields of Preprocess


def read_file(path: Path) -> Weights:
    """OpenAI's archives and state dicts, OpenCLIP's .pt, .bin and .safetensors, Hugging Face's files of weights.

    Wrappers are removed. Raises UserError naming the file.
    """
    state_dict = read_state_dict(path)
    if is_hugging_face(state_dict):
        return Weights(str(path), to_open_clip(state_dict))
    is_openai = "input_resolution" in state_dict
    kept = {k: v for k, v in state_dict.items() if k not in _OPENAI_EXTRAS and not k.endswith("attn_mask")}
    return Weights(str(path), kept, quick_gelu=True if is_openai else None)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by the file's own keys; wrappers (`state_dict`, `module.`) are removed. Raises UserError."""
    content = _read_safetensors(path) if _is_safetensors(path) else read_torch_file(path)
    for wrapper in _WRAPPERS:
        content = content.get(wrapper, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise UserError(f"{path} holds no state dict (a mapping of names to tensors)")
    for sign in _PREFIXES:
        if any(key.startswith(sign) for key in content):
            prefix = sign.removesuffix("visual.")
            content = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
    if not content:
        raise UserError(f"{path} holds an empty state dict")
    return merged(content)


def _is_safetensors(path: Path) -> bool:
    """By the ending. Raises UserError where the content, a JSON header after eight bytes of length, says otherwise."""
    if path.suffix.lower() == ".safetensors":
        return True
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False  # the reader says why
    if start[8:] == b"{":
        raise UserError(f"{path} is a safetensors file under another ending: rename it to .safetensors")
    return False


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"can't read {path}: {error}. Is the file complete?") from error


def fitted(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a dual encoder in the layout of `model`.

    Text keys with or without `text.`, scalars [] or [1], a missing logit_bias as zero, positions resized.
    """
    ours = model.state_dict()
    theirs = {key: value for key, value in state_dict.items() if not key.endswith("position_ids")}
    if "text.token_embedding.weight" in ours and "token_embedding.weight" in theirs:
        theirs = {f"text.{key}" if key.startswith(_TEXT_KEYS) else key: value for key, value in theirs.items()}
    elif "token_embedding.weight" in ours and "text.token_embedding.weight" in theirs:
        theirs = {key.removeprefix("text."): value for key, value in theirs.items()}
    if "logit_bias" in ours and "logit_bias" not in theirs and "logit_scale" in theirs:
        theirs["logit_bias"] = torch.zeros_like(ours["logit_bias"], device="cpu")
    # Files from before torch counted batches lack the counter; torch itself fills it in.
    theirs |= {k: v.cpu() for k, v in ours.items() if k.endswith("num_batches_tracked") and k not in theirs}
    for key, value in theirs.items():
        if key in ours and value.numel() == ours[key].numel() == 1:
            theirs[key] = value.reshape(ours[key].shape)
    _fit_positions(model, theirs)
    return theirs


def _fit_positions(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, ImageTower):
            for key in [key for key in state_dict if key.startswith(prefix)]:
                fitted = module.fit_positions(key.removeprefix(prefix), state_dict[key])
                state_dict[key] = _told(key, state_dict[key], fitted)
        key = f"{prefix}positional_embedding"
        if isinstance(module, CLIPTextTower) and _is_other_context(state_dict.get(key), module):
            state_dict[key] = _told(key, state_dict[key], resize_text_positions(state_dict[key], module.context_length))


def _is_other_context(stored: Tensor | None, tower: CLIPTextTower) -> bool:
    own = tower.positional_embedding
    return (
        stored is not None
        and stored.dim() == 2
        and stored.shape[1] == own.shape[1]
        and len(stored) not in (0, len(own))
    )


def _told(key: str, stored: Tensor, fitted: Tensor) -> Tensor:
    if fitted is not stored:
        log.info("%s: %d positions resized to %d", key, len(stored), len(fitted))
    return fitted


def tower_weights(state_dict: Mapping[str, Tensor], tower: str) -> dict[str, Tensor]:
    """The tensors of the image or the text tower of a dual encoder, by their keys within it."""
    prefix = "visual." if tower == "image" else "text."
    if tower == "text" and not any(key.startswith(prefix) for key in state_dict):
        return {key: value for key, value in state_dict.items() if key.startswith(_TEXT_KEYS)}
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def load_strictly(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load every key with its shape. Raises UserError that counts and names what differs."""
    ours, state_dict = model.state_dict(), fitted(model, state_dict)
    missing, unexpected = sorted(ours.keys() - state_dict.keys()), sorted(state_dict.keys() - ours.keys())
    shapes = [
        f"{key}: {tuple(state_dict[key].shape)} in the file, {tuple(ours[key].shape)} in the model"
        for key in sorted(ours.keys() & state_dict.keys())
        if ours[key].shape != state_dict[key].shape
    ]
    found = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("keys missing", missing), ("keys unexpected", unexpected), ("shapes differ", shapes))
        if names
    ]
    if found:
        raise UserError(
            f"the weights of {source} are of another architecture than this model: {'; '.join(found)}. "
            "Check the architecture (model.arch) and model.composer"
        )
    model.load_state_dict(state_dict)
