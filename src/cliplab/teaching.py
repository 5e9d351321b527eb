"""The teacher of a config: checked before anything slow, built where a run learns from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cliplab.config import Config
from cliplab.errors import UserError
from cliplab.models.checkpoints.weights import load_strictly
from cliplab.run import checkpoint_of, config_of
from cliplab.sources import check_source, is_run

if TYPE_CHECKING:
    from cliplab.models.composed import ComposedRetriever
    from cliplab.training.teacher import Teacher

# (config, what a run was built from) -> (model, what it was built from)
ModelBuilder = Callable[[Config, Mapping[str, Any]], "tuple[ComposedRetriever, Any]"]
# Of an architecture's text_cfg: what token ids depend on.
_TOKENIZER = (
    "context_length",
    "vocab_size",
    "hf_tokenizer_name",
    "hf_model_name",
    "tokenizer_mode",
    "tokenizer_kwargs",
)


def check_teacher(config: Config) -> None:
    """What can be said of the teacher without reading weights. Raises UserError."""
    teacher = config.teacher
    if teacher.arch is None:
        return
    if is_run(Path(teacher.arch)) and teacher.weights is not None:
        raise UserError(f"teacher.arch={teacher.arch} is a run and has weights of its own: leave teacher.weights out")
    if config.model.composer is not None and not is_run(Path(teacher.arch)):
        raise UserError(
            f"teacher.arch={teacher.arch}: composed queries are taught by a run with a composer, a directory or .ckpt"
        )
    check_source(teacher.arch, teacher.weights)


def build_teacher(config: Config, student: dict[str, Any], build_model: ModelBuilder) -> Teacher:
    """The teacher with its weights. `student`: the architecture that learns from it; `build_model` builds a run's.

    Raises UserError for another image size, tokenizer or task than the student's.
    """
    from cliplab.training.teacher import Teacher

    is_of_run = is_run(Path(str(config.teacher.arch)))
    model = _of_run(config, build_model) if is_of_run else _of_source(config)
    theirs = model.clip.architecture
    pairs = {
        "image size": [each["vision_cfg"].get("image_size", 224) for each in (theirs, student)],
        "tokenizer": [{key: each["text_cfg"].get(key) for key in _TOKENIZER} for each in (theirs, student)],
    }
    for what, (own, other) in pairs.items():
        if own != other:
            raise UserError(
                f"teacher.arch={config.teacher.arch} has another {what} than model.arch={config.model.arch}, and sees "
                f"the same batches: {own} against {other}"
            )
    composer = model.composer
    if (composer is None) != (config.model.composer is None) or (composer is not None and composer.output != "vector"):
        found = "no composer" if composer is None else f"a composer that gives a {composer.output}"
        raise UserError(
            f"teacher.arch={config.teacher.arch} has {found}: composed queries are taught by a run whose composer "
            "gives vectors, single ones by a model without composer"
        )
    return Teacher(model)


def _of_run(config: Config, build_model: ModelBuilder) -> ComposedRetriever:
    path = checkpoint_of(str(config.teacher.arch))
    own, stored = config_of(path, None, [])
    model, _ = build_model(own, stored["hyper_parameters"]["built_from"])
    state_dict = {key: value for key, value in stored["state_dict"].items() if key.startswith("model.")}
    load_strictly(model, {key.removeprefix("model."): value for key, value in state_dict.items()}, str(path))
    return model


def _of_source(config: Config) -> ComposedRetriever:
    from cliplab.models.composed import ComposedRetriever
    from cliplab.pretrained import build
    from cliplab.sources import find_source

    source = find_source(str(config.teacher.arch), config.teacher.weights)
    if source.weights is None:
        raise UserError(f"teacher.arch={config.teacher.arch} has no weights: set teacher.weights")
    return ComposedRetriever(build(source), None, source.preprocess.mean, source.preprocess.std)
