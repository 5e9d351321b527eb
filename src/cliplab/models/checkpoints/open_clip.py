"""OpenCLIP weights: a pretrained tag or a file (.safetensors or a state dict); pickled code is never run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.checkpoints.torch_file import read_torch_file
from cliplab.registry import closest

FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_PREFIXES = ("module.", "model.clip.")  # of DistributedDataParallel, and of a run's own checkpoint


@dataclass(frozen=True)
class Weights:
    """A state dict in open_clip's keys and what belongs to it: activation and preprocessing (empty = unknown)."""

    source: str
    state_dict: Mapping[str, Tensor]
    quick_gelu: bool | None = None
    preprocess: dict[str, Any] = field(default_factory=dict)  # mean, std, interpolation, resize_mode


def is_file(weights: str) -> bool:
    """Whether `model.weights` names a file and no tag."""
    return weights.endswith(FILE_ENDINGS) or Path(weights).exists()


def check_weights(arch: str, weights: str) -> None:
    """Raise UserError unless the file exists or the tag belongs to the architecture; reads no weights."""
    if is_file(weights):
        if not Path(weights).is_file():
            raise UserError(f"no weights file {weights} (model.weights)")
        return
    from open_clip import list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(arch)
    if weights not in tags:
        hint = closest(weights, tags) if tags else f"'{arch}' has no pretrained tags"
        raise UserError(f"unknown weights '{weights}' for {arch} (model.weights): {hint}")


def read_weights(arch: str, weights: str) -> Weights:
    """Read a file or download a tag. Raises UserError naming file or tag."""
    check_weights(arch, weights)
    if is_file(weights):
        return Weights(weights, read_state_dict(Path(weights)))
    from open_clip import download_pretrained, get_pretrained_cfg

    config = get_pretrained_cfg(arch, weights)
    try:
        file = download_pretrained(config)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"can't download the weights '{weights}' of {arch}: {error}. Without a network, put the file on this "
            "machine and give its path as model.weights"
        ) from error
    known = {key: config[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in config}
    return Weights(f"{arch} {weights}", read_state_dict(Path(file)), config.get("quick_gelu", False), known)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by open_clip key; wrappers (`state_dict`, `module.`) are removed. Raises UserError naming the file."""
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise UserError(f"{path} holds no state dict (a mapping of names to tensors)")
    for prefix in _PREFIXES:
        if any(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"can't read {path}: {error}. Is the file complete?") from error


def load_strictly(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load every key with its shape. Raises UserError that counts and names what differs."""
    ours = model.state_dict()
    scalars = {key for key, value in ours.items() if value.numel() == 1} & state_dict.keys()
    scalars = {key: state_dict[key].reshape(ours[key].shape) for key in scalars if state_dict[key].numel() == 1}
    state_dict = {**state_dict, **scalars}  # logit_scale is [] in some files and [1] in others
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
            "Check model.arch and model.composer"
        )
    model.load_state_dict(state_dict)
