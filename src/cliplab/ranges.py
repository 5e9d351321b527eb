"""Which values the options of a run may have, beyond their types."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from cliplab.benchmark import Benchmark, Protocol, metric_names
from cliplab.config import Config
from cliplab.errors import UserError
from cliplab.models.composers import Composer
from cliplab.registry import closest

_TOWERS = ("image_encoder", "text_encoder")


def check_ranges(config: Config) -> None:
    """Raise UserError naming the first key whose value can't work."""
    for key, (fits, expected) in _RANGES.items():
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        if value is not None and not fits(value):
            raise UserError(f"{key} must be {expected}, got {value}")
    every, validated = config.zero_shot.every_n_epochs, config.trainer.check_val_every_n_epoch
    if every % validated:
        validation = f"trainer.check_val_every_n_epoch={validated}"
        raise UserError(f"zero_shot.every_n_epochs must be a multiple of {validation}, got {every}")


def check_monitor(config: Config, benchmarks: list[Benchmark], protocol: Protocol) -> None:
    """Raise UserError unless `trainer.monitor` is a metric of the validation, naming the closest one."""
    names = metric_keys("val", benchmarks, protocol)
    if config.trainer.monitor not in names:
        raise UserError(
            f"unknown metric trainer.monitor={config.trainer.monitor}: {closest(config.trainer.monitor, names)}"
        )


def check_lesson(config: Config, protocol: Protocol, composers: Mapping[str, type[Composer]]) -> None:
    """Raise UserError unless the config trains the composer the way its `learns_from` and `losses` say."""
    part, loss, frozen = config.model.composer, config.loss["name"], config.model.freeze
    if part is not None:
        name, composer = part["name"], composers[part["name"]]
        if composer.losses is not None and loss not in composer.losses:
            raise UserError(f"the composer {name} is trained with loss.name={' or '.join(composer.losses)}, not {loss}")
        if composer.learns_from != "triplets" and not {*_TOWERS} <= {*frozen}:
            raise UserError(
                f"the composer {name} learns from {composer.learns_from} alone what frozen towers make of them: set "
                f"model.freeze=[{','.join(dict.fromkeys((*frozen, *_TOWERS)))}]"
            )
    if config.trainer.early_stopping_patience is not None and not tells_epochs_apart(config, protocol):
        raise UserError(
            "trainer.early_stopping_patience: with frozen towers and queries that are not composed every validation "
            "gives the same; set it to null"
        )


def tells_epochs_apart(config: Config, protocol: Protocol) -> bool:
    """Whether the validation asks anything of what is trained: not of a composer where no query is composed."""
    return protocol.hit == "single_target" or not {*_TOWERS} <= {*config.model.freeze}


def metric_keys(prefix: str, benchmarks: list[Benchmark], protocol: Protocol) -> list[str]:
    """`val/dress/R@10`, ...: the metrics, the higher the better, that benchmarks report under a protocol."""
    kinds = metric_names(protocol.recall_at, protocol.subset_at, protocol.map_at)
    kinds += ["Avg"] if {"R@5", "Rsubset@1"} <= set(kinds) else []
    names = [f"{prefix}/{d.name}/{kind}" for benchmark in benchmarks for d in benchmark.directions for kind in kinds]
    names += [f"{prefix}/mean/{kind}" for kind in kinds]
    names += [f"{prefix}/mean/Avg"] if {"R@10", "R@50"} <= set(kinds) and not protocol.map_at else []
    return names


def _between(low: float, high: float = math.inf, open_low: bool = False) -> Callable[[float], bool]:
    return lambda value: math.isfinite(value) and (low < value if open_low else low <= value) and value <= high


def _one_of(*choices: object) -> Callable[[object], bool]:
    return lambda value: value in choices


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (_between(0, 2**31), "an integer from 0 to 2^31"),
    "model.fixed_scale": (_between(0, 100, open_low=True), "in (0, 100]"),
    "model.chunk_size": (_between(1), "1 or more"),
    "data.batch_size": (_between(1), "1 or more"),
    "data.feature_cache": (lambda folder: folder.strip() != "", "auto, a folder, or null for none"),
    "data.same_image": (_one_of("separate", "positives", "ignore"), "separate, positives or ignore"),
    "data.eval_batch_size": (_between(1), "1 or more"),
    "data.num_workers": (_between(0), "0 or more"),
    "data.categories": (lambda names: len(names) == len(set(names)), "a list without repetitions"),
    "zero_shot.split": (_one_of("train", "val", "test"), "train, val or test"),
    "zero_shot.every_n_epochs": (_between(0), "0 or more"),
    "optim.lr": (_between(0, open_low=True), "a finite number above 0"),
    "optim.weight_decay": (_between(0), "a finite number, 0 or more"),
    "optim.betas": (lambda b: len(b) == 2 and all(0 <= beta < 1 for beta in b), "two numbers in [0, 1)"),
    "optim.eps": (_between(0), "a finite number, 0 or more"),
    "model.lora.rank": (_between(0), "0 or more"),
    "model.lora.alpha": (_between(0, open_low=True), "a finite number above 0"),
    "data.hard_negatives": (_between(0), "0 or more"),
    "optim.layer_decay": (_between(0, 1, open_low=True), "in (0, 1]"),
    "optim.warmup": (lambda share: 0 <= share < 1, "a share of all steps in [0, 1)"),
    "optim.schedule": (_one_of("cosine", "linear", "constant"), "cosine, linear or constant"),
    "optim.lr_multipliers": (lambda of: all(_between(0)(value) for value in of.values()), "finite numbers, 0 or more"),
    "trainer.max_epochs": (lambda n: n == -1 or n >= 1, "1 or more"),
    "trainer.max_steps": (lambda n: n == -1 or n >= 1, "1 or more, or -1 for no limit"),
    "trainer.devices": (_between(1), "1 or more"),
    "trainer.matmul_precision": (_one_of("highest", "high", "medium"), "highest, high or medium"),
    "trainer.gradient_clip_val": (_between(0), "a finite number, 0 or more"),
    "trainer.check_val_every_n_epoch": (_between(1), "1 or more"),
    "trainer.log_every_n_steps": (_between(1), "1 or more"),
    "trainer.early_stopping_patience": (_between(0), "0 or more"),
}
