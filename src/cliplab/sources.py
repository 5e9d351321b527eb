"""Where a model comes from: name, tag, file, folder, repository or run -> architecture, preprocessing and weights."""

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cliplab.data.images import Preprocess
from cliplab.errors import UserError
from cliplab.models.architectures import read_architecture
from cliplab.models.checkpoints import hugging_face, open_clip
from cliplab.models.checkpoints.hub import CONFIG_FILES, WEIGHT_FILES, hub_folder
from cliplab.models.checkpoints.hugging_face_keys import to_open_clip
from cliplab.models.checkpoints.weights import FILE_ENDINGS, Weights, read_file, read_state_dict
from cliplab.models.lora import merged
from cliplab.registry import closest
from cliplab.run import checkpoint_of, read_checkpoint

log = logging.getLogger(__name__)
HUB = "hf-hub:"
LOCAL = "local-dir:"
OPENAI = {
    "RN50": "RN50",
    "RN101": "RN101",
    "RN50x4": "RN50x4",
    "RN50x16": "RN50x16",
    "RN50x64": "RN50x64",
    "ViT-B/32": "ViT-B-32",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14@336px": "ViT-L-14-336",
}
TOWERS = ("image", "text")
_NUMERICS = ("act_kwargs", "norm_kwargs", "pool_type", "eos_id", "no_ln_pre", "final_ln_after_pool", "no_causal_mask")
OVERRIDES = ("image_size", "quick_gelu", "context_length", "attention")


@dataclass(frozen=True)
class Source:
    """A model that was found and not built yet: architecture in open_clip's form, preprocessing, weights or none."""

    name: str
    architecture: dict[str, Any]
    preprocess: Preprocess = field(default_factory=Preprocess)
    weights: Weights | None = None
    towers: tuple[str, ...] = TOWERS  # a Hugging Face folder may hold one alone


def find_source(
    name: str, weights: str | None = None, overrides: Mapping[str, Any] | None = None, read: bool = True
) -> Source:
    """Read what `load` describes, without building it; with `read` False all but the tensors. Raises UserError."""
    asked = {key: value for key, value in (overrides or {}).items() if value is not None}
    for key in asked:
        if key not in OVERRIDES:
            raise UserError(f"load has no option '{key}': {closest(key, OVERRIDES)}")
    source = _named(name, read and weights is None)
    if weights is not None:
        source = _with_weights(source, weights, read)
    if source.weights is not None:
        source = replace(source, architecture=_without_own_weights(source.architecture))
    return overridden(source, asked)


def _without_own_weights(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of the whole model replace those that timm or transformers have for a tower: spare reading these."""
    towers = {"vision_cfg": "timm_model_pretrained", "text_cfg": "hf_model_pretrained"}
    return {**architecture, **{tower: {**architecture[tower], key: False} for tower, key in towers.items()}}


def check_source(name: str, weights: str | None) -> None:
    """What can be said about name and weights without reading the weights. Raises UserError."""
    path = _folder_of(name)
    if path is None and not is_run(Path(name)):
        read_architecture(architecture_name(name))
    if weights is not None and _is_path(weights):
        if not Path(weights).exists():
            raise UserError(f"no weights file or folder {weights} (model.weights)")
    elif weights is not None:
        open_clip.check_tag(architecture_name(name), weights)


def architecture_name(name: str) -> str:
    """OpenAI's spelling -> open_clip's: ViT-L/14@336px -> ViT-L-14-336; a JSON file stays."""
    return OPENAI.get(name, name if name.endswith(".json") else name.replace("/", "-"))


def _is_path(weights: str) -> bool:
    return weights.endswith(FILE_ENDINGS) or Path(weights).exists()


def is_run(path: Path) -> bool:
    """Whether a path is a run directory or a checkpoint of ours."""
    return path.suffix == ".ckpt" or (path / "checkpoints").is_dir()


def _folder_of(name: str) -> Path | None:
    """The local folder or the fetched repository that `name` stands for; None for an architecture or a run."""
    if name.startswith(HUB):
        repository = name.removeprefix(HUB)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
            raise UserError(f"'{name}' names no repository: write {HUB}org/name")
        return hub_folder(repository, (*CONFIG_FILES, *WEIGHT_FILES), WEIGHT_FILES)
    path = Path(name.removeprefix(LOCAL))
    if path.is_dir() and not is_run(path):
        return path
    if path.is_file() and path.suffix not in (".json", ".ckpt"):
        raise UserError(f"{path} is a file: give an architecture as the name and the file as its weights")
    looks_like_path = name.startswith((LOCAL, "/", "./", "../", "~")) and not name.endswith((".json", ".ckpt"))
    if looks_like_path and not path.exists():
        raise UserError(f"no folder {path}: give a folder in OpenCLIP's or Hugging Face's layout, or an architecture")
    return None


def _named(name: str, read: bool) -> Source:
    folder = _folder_of(name)
    if folder is not None:
        return read_folder(folder, read)
    if is_run(Path(name)):
        return _read_run(name)
    known = architecture_name(name)
    try:
        architecture = read_architecture(known)
    except UserError as error:
        raise (
            UserError(f"{error}; a repository of the hub is {HUB}org/name") if name.count("/") == 1 else error
        ) from None
    return Source(known, architecture, Preprocess(size=image_side(architecture)))


def read_folder(folder: Path, read: bool = True) -> Source:
    """A folder in OpenCLIP's layout (open_clip_config.json) or Hugging Face's (config.json). Raises UserError."""
    if (folder / open_clip.CONFIG).is_file():
        architecture, known = open_clip.read_folder_config(folder)
        architecture = _with_local_files(architecture, folder)
        weights = _of_folder(read_file(open_clip.folder_weights(folder)), architecture) if read else None
        size = image_side(architecture)
        return Source(str(folder), architecture, Preprocess(**{**known, "size": size}), weights)
    if (folder / "config.json").is_file():
        config = hugging_face.read_config(folder)
        architecture = hugging_face.architecture_of(config)
        preprocess = Preprocess(**hugging_face.preprocess_of(folder, config))
        if config["model_type"] == "siglip" or architecture["text_cfg"].get("vocab_size", 49408) != 49408:
            architecture["text_cfg"]["hf_tokenizer_name"] = str(folder)
        weights = _of_folder(_read_parts(folder), architecture) if read else None
        towers = tuple(
            tower for tower, key in zip(TOWERS, ("vision_config", "text_config"), strict=True) if config.get(key)
        )
        return Source(str(folder), architecture, preprocess, weights, towers)
    raise UserError(
        f"{folder} is no model: it has neither {open_clip.CONFIG} (OpenCLIP), nor config.json (Hugging Face), nor "
        "checkpoints/ (a run)"
    )


def _of_folder(weights: Weights, architecture: Mapping[str, Any]) -> Weights:
    """A folder says which activation its weights were trained with."""
    return replace(weights, quick_gelu=architecture.get("quick_gelu", False))


def _read_parts(folder: Path) -> Weights:
    files = hugging_face.weight_files(folder)
    state_dict: dict[str, Tensor] = {}
    for file in files:
        state_dict |= read_state_dict(file)
    if any(key.startswith("embeddings.") for key in state_dict):  # a lone tower without a projection has no prefix
        prefix = "vision_model." if "embeddings.patch_embedding.weight" in state_dict else "text_model."
        state_dict = {f"{prefix}{key}": value for key, value in state_dict.items()}
    return Weights(str(files[0] if len(files) == 1 else folder), to_open_clip(state_dict))


def _with_local_files(architecture: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The tokenizer and the text tower's config come from the folder itself where it has them."""
    text = dict(architecture["text_cfg"])
    if text.get("hf_tokenizer_name") and (folder / "tokenizer_config.json").is_file():
        text["hf_tokenizer_name"] = str(folder)
    if text.get("hf_model_name") and (folder / "config.json").is_file():
        text["hf_model_name"] = str(folder)
    return {**architecture, "text_cfg": text}


def _read_run(name: str) -> Source:
    """The dual encoder of a run's best checkpoint; its composer is left out."""
    path = checkpoint_of(name)
    stored = read_checkpoint(path)
    built_from = stored["hyper_parameters"]["built_from"]
    prefix = "model.clip."
    state_dict = {k.removeprefix(prefix): v for k, v in stored["state_dict"].items() if k.startswith(prefix)}
    weights = Weights(str(path), merged(state_dict))
    return Source(str(path), built_from["architecture"], Preprocess(**built_from["preprocess"]), weights)


def _with_weights(source: Source, weights: str, read: bool = True) -> Source:
    """The weights of a tag, a file or a folder, with the activation and the preprocessing that belong to them."""
    architecture = source.architecture
    if not _is_path(weights):
        if Path(source.name).exists():
            raise UserError(f"weights={weights}: a tag belongs to an architecture's name, not to {source.name}")
        found = open_clip.read_tag(architecture_name(source.name), weights, read)
    elif Path(weights).is_dir():
        other = _read_run(weights) if is_run(Path(weights)) else read_folder(Path(weights), read)
        architecture = _with_numerics(architecture, other.architecture)
        preprocess = {key: value for key, value in asdict(other.preprocess).items() if key != "size"}
        found = replace(other.weights or Weights(weights, {}), preprocess=preprocess)
    elif Path(weights).is_file():
        found = read_file(Path(weights)) if read else Weights(weights, {})
    else:
        raise UserError(f"no weights file or folder {weights} (model.weights)")
    if found.quick_gelu is not None:
        architecture = {**architecture, "quick_gelu": found.quick_gelu}
    preprocess = replace(source.preprocess, **found.preprocess)
    return replace(source, architecture=architecture, preprocess=preprocess, weights=found)


def _with_numerics(architecture: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What changes features and no tensor's shape comes from where the weights come from."""
    merged = dict(architecture)
    for section in ("vision_cfg", "text_cfg"):
        own = {key: value for key, value in architecture[section].items() if key not in _NUMERICS}
        merged[section] = {**own, **{key: other[section][key] for key in _NUMERICS if key in other[section]}}
    merged |= {"init_logit_bias": other["init_logit_bias"]} if "init_logit_bias" in other else {}  # there is a tensor
    activation = (other["vision_cfg"].get("timm_kwargs") or {}).get("act_layer")
    if activation is not None and "timm_model_name" in merged["vision_cfg"]:
        options = architecture["vision_cfg"].get("timm_kwargs") or {}
        merged["vision_cfg"]["timm_kwargs"] = {**options, "act_layer": activation}
    return merged


def overridden(source: Source, asked: Mapping[str, Any]) -> Source:
    """The caller's wishes; an activation that contradicts the weights' own is an error."""
    architecture = dict(source.architecture)
    quick_gelu = asked.get("quick_gelu")
    own = source.weights.quick_gelu if source.weights is not None else None
    if quick_gelu is not None and not isinstance(quick_gelu, bool):
        raise UserError(f"quick_gelu must be True or False, got {quick_gelu!r}")
    if quick_gelu is not None and own is not None and quick_gelu != own:
        raise UserError(
            f"quick_gelu={quick_gelu} contradicts {source.weights.source}, which was trained with quick_gelu={own}: "  # type: ignore[union-attr]
            "leave it out"
        )
    if quick_gelu is not None:
        architecture["quick_gelu"] = quick_gelu
    for section, key in (("vision_cfg", "image_size"), ("text_cfg", "context_length")):
        if key in asked:
            if not isinstance(asked[key], int) or isinstance(asked[key], bool) or asked[key] < 1:
                raise UserError(f"{key} must be a number of at least 1, got {asked[key]!r}")
            architecture[section] = {**architecture[section], key: asked[key]}
    preprocess = replace(source.preprocess, size=image_side(architecture))
    return replace(source, architecture=architecture, preprocess=preprocess)


def image_side(architecture: Mapping[str, Any]) -> int:
    """The side of the pictures. Raises UserError unless they are square, which the preprocessing makes them."""
    for section in ("vision_cfg", "text_cfg"):
        if not isinstance(architecture[section], Mapping):
            raise UserError(f"{section} must be a mapping of options, got {architecture[section]!r}")
    size = architecture["vision_cfg"].get("image_size", 224)
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int) or isinstance(size, bool):
        raise UserError(f"vision_cfg.image_size={size!r}: models are loaded for square pictures, a number of pixels")
    return size
