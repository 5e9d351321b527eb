"""What features depend on, as hashes: the tower and its inputs, the tokenizer, the identity of a picture or a text."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cliplab.data.images import ImageTransform
from cliplab.errors import UserError
from cliplab.models.clip import DualEncoder

# Token ids of these tell tokenizers apart.
PROBES = ("", "a photo of a dog", "Is RED, with long-sleeves & 2 buttons!", "naïve  $ * 日本 😀", "word " * 200)


def identity(modality: str, name: str) -> bytes:
    """16 bytes: a picture is its path, size and time of change, a text itself. Raises UserError for a missing file."""
    if modality == "text":
        return _digest(name)
    try:
        status = os.stat(name)
    except OSError as error:
        raise UserError(f"can't read the image {name}: {error}") from error
    return _digest(f"{os.path.realpath(name)}\0{status.st_size}\0{status.st_mtime_ns}")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def tower_tensors(clip: DualEncoder, modality: str) -> dict[str, Tensor]:
    """The parameters and buffers that a modality's features depend on, by key."""
    state = clip.state_dict(keep_vars=True)
    if modality == "image":
        return {key: value for key, value in state.items() if key.startswith("visual.")}
    others = ("visual.", "logit_scale", "logit_bias")
    return {key: value for key, value in state.items() if not key.startswith(others)}


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, precisions and bytes."""
    found = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        found.update(f"{key} {list(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def tower_settings(clip: DualEncoder, modality: str) -> dict[str, Any]:
    """The tower as plain builtins: architecture, hash of its weights, where it computes and with which torch."""
    other = "text_cfg" if modality == "image" else "vision_cfg"
    architecture = {key: value for key, value in clip.architecture.items() if key != other}
    return {
        "architecture": json.loads(json.dumps(architecture, default=str)),
        "weights": weights_hash(tower_tensors(clip, modality)),
        "device": clip.logit_scale.device.type,
        "torch": torch.__version__,
    }


def transform_settings(transform: ImageTransform) -> dict[str, Any]:
    """How pictures of an evaluation become inputs."""
    preprocess = {key: str(value) for key, value in vars(transform.preprocess).items()}
    return {"preprocess": preprocess, "pad": transform.pad, "backend": transform.backend}


def tokenizer_settings(tokenize: Callable[[str], Tensor]) -> dict[str, Any]:
    """What a tokenizer makes of a few texts."""
    return {"token_ids": [hashlib.sha256(tokenize(text).numpy().tobytes()).hexdigest() for text in PROBES]}
