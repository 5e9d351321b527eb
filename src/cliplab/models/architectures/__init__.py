"""Architectures by name: an architecture is one JSON file in open_clip's form, ours beside this module."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from cliplab.errors import UserError
from cliplab.registry import closest


def architecture_names() -> list[str]:
    """Ours and open_clip's."""
    from open_clip import list_models

    return sorted({*_own(), *list_models()})


def read_architecture(name: str) -> dict[str, Any]:
    """`{embed_dim, vision_cfg, text_cfg, quick_gelu?}` of a name or of a JSON file. Raises UserError."""
    if name.endswith(".json"):
        return _read(Path(name))
    if name in _own():
        return json.loads(_own()[name].read_text(encoding="utf-8"))
    from open_clip import get_model_config  # takes half a second: only where one of its names is asked for

    config = get_model_config(name)
    if config is None:
        raise UserError(f"unknown architecture '{name}' (model.arch): {closest(name, architecture_names())}")
    return config


def _own() -> dict[str, Any]:
    return {file.name[: -len(".json")]: file for file in files(__name__).iterdir() if file.name.endswith(".json")}


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"can't read the architecture file {path} (model.arch): {error}") from error
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config if isinstance(config, dict) else ())
    if missing:
        raise UserError(f"{path} (model.arch) lacks {', '.join(sorted(missing))}; it must be in open_clip's form")
    return config
