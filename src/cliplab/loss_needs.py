"""What a loss needs of the rest of a config: references, a teacher, one vector a query, targets that count as equal."""

import inspect

from cliplab.config import Config
from cliplab.data import DATASETS
from cliplab.errors import UserError
from cliplab.losses import LOSSES, TEACHER_INPUTS
from cliplab.models.composers import COMPOSERS
from cliplab.registry import lookup


def taken_by(loss: str) -> frozenset[str]:
    """The names of a loss's parameters, its options and what the step gives it."""
    return frozenset(inspect.signature(LOSSES[loss]).parameters)


def check_loss(config: Config) -> None:
    """Raise UserError where the composer, the data set or the teacher can't give what the loss needs."""
    name, part = config.loss["name"], config.model.composer
    taken, composer = taken_by(name), COMPOSERS[part["name"]] if part is not None else None
    same_image(config)
    if "reference" in taken and (composer is None or composer.learns_from != "triplets"):
        found = "model.composer is null" if composer is None else f"{part and part['name']} learns without them"
        raise UserError(
            f"loss '{name}' needs reference images and {found}: set a composer of triplets, as sum, or use info_nce"
        )
    if "score" not in taken and composer is not None and composer.output == "score":
        raise UserError(
            f"loss '{name}' compares vectors, and the composer {part and part['name']} scores jointly: use "
            f"one of {_that_take('score')}"
        )
    if config.data.hard_negatives and "negatives" not in taken:
        raise UserError(
            f"data.hard_negatives={config.data.hard_negatives}: the loss {name} takes none; use "
            f"{_that_take('negatives')}"
        )
    is_taught = TEACHER_INPUTS[0] in taken
    if is_taught and config.teacher.arch is None:
        raise UserError(f"loss '{name}' needs a teacher: set teacher.arch, a run or what model.arch takes")
    if config.teacher.arch is not None and not is_taught:
        raise UserError(
            f"teacher.arch={config.teacher.arch}: the loss {name} has no teacher; use {_that_take(TEACHER_INPUTS[0])}"
        )


def same_image(config: Config) -> str:
    """What becomes of equal targets in a training batch: separate, positives or ignore. Raises UserError."""
    chosen = config.data.same_image or lookup("data set (data.name)", DATASETS, config.data.name).same_image
    name = config.loss["name"]
    if chosen == "positives" and "target_id" not in taken_by(name):
        raise UserError(
            f"data.same_image=positives: the loss {name} has one positive a query; use {_that_take('target_id')}"
        )
    return chosen


def _that_take(parameter: str) -> str:
    return ", ".join(name for name in LOSSES if parameter in taken_by(name))
