"""Config -> data set, model, data module, module: the only file that knows all parts (trainer.py has the Trainer).

Heavy packages are imported where they are used: `check` must tell about a wrong name or a missing file before seconds
go into importing lightning.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cliplab.adaptation import adapt_towers, check_adaptation
from cliplab.config import Config
from cliplab.data import DATASETS
from cliplab.data.image_folder import ImageFolderDataset
from cliplab.data.images import ImageTransform, Preprocess
from cliplab.data.karpathy import Karpathy
from cliplab.errors import UserError
from cliplab.loss_needs import check_loss, same_image, taken_by
from cliplab.losses import LOSS_INPUTS, LOSSES
from cliplab.models.attention import set_attention
from cliplab.models.compiled import compile_blocks
from cliplab.models.composed import COMPOSER_INPUTS, PARTS, ComposedRetriever, composer_inputs
from cliplab.models.composers import COMPOSERS
from cliplab.pretrained import build as build_dual_encoder
from cliplab.pretrained import build_towers, tokenizer_of
from cliplab.ranges import check_lesson, check_monitor, check_ranges
from cliplab.registry import build_part, check_part, closest, lookup
from cliplab.sources import Source, check_source, find_source, overridden
from cliplab.teaching import build_teacher, check_teacher

if TYPE_CHECKING:
    from cliplab.benchmark import Protocol
    from cliplab.data.datamodule import RetrievalDataModule
    from cliplab.data.dataset import RetrievalDataset
    from cliplab.training.module import RetrievalModule

log = logging.getLogger(__name__)


def check(
    config: Config, train: bool = True, from_checkpoint: bool = False, to_come: Collection[str] = ()
) -> RetrievalDataset:
    """Names, options, files: everything that can be wrong before a weight is loaded. Returns the checked data set.

    `from_checkpoint`: the towers come from a checkpoint of ours, which needs nothing that they were once built from.
    `to_come`: directories of runs that will be there when this one starts, as a sweep knows; they are not looked into.
    """
    check_parts(config)
    protocol = build_protocol(config)
    if train and (zero_shot := build_zero_shot(config)) is not None:
        zero_shot.check(zero_shot_protocol(config), (config.zero_shot.split,))
        zero_shot.check_headers(config.zero_shot.split)
    dataset = build_dataset(config)
    dataset.prepare()
    dataset.check(protocol, ("train", "val", dataset.test_split) if train else (dataset.test_split,))
    if config.linear_probe and isinstance(dataset, ImageFolderDataset):
        dataset.check_probe()
    if train and config.data.hard_negatives:
        dataset.check_negatives()
    if train:
        check_lesson(config, protocol, COMPOSERS)
        check_monitor(config, dataset.benchmarks(protocol, "val"), protocol)
    if not from_checkpoint and not _is_in(to_come, config.model.arch, config.model.weights):
        check_source(config.model.arch, config.model.weights)
    if train and not _is_in(to_come, config.teacher.arch):
        check_teacher(config)
    return dataset


def _is_in(folders: Collection[str], *names: str | None) -> bool:
    return any(Path(name).is_relative_to(folder) for name in names if name is not None for folder in folders)


def check_parts(config: Config) -> None:
    """The names and options of all parts; reads no file of the data set. Raises UserError."""
    model, data = config.model, config.data
    if model.composer is not None:
        check_part("composer", COMPOSERS, model.composer, COMPOSER_INPUTS)
    check_part("loss", LOSSES, config.loss, LOSS_INPUTS)
    for key, parts in (("model.freeze", model.freeze), ("optim.lr_multipliers", config.optim.lr_multipliers)):
        for part in parts:
            if part not in PARTS:
                raise UserError(f"{key}: unknown part '{part}': {closest(part, PARTS)}")
    check_ranges(config)
    check_loss(config)
    check_adaptation(config)
    if config.trainer.weight_averaging is not None:
        from cliplab.training.averaging import build_averaging

        build_averaging(config.trainer.weight_averaging)
    ImageTransform(Preprocess(), data.pad, data.crop_scale, data.flip, data.image_backend)
    if build_protocol(config).hit == "single_target" and model.composer is None:
        known = ", ".join(COMPOSERS)
        raise UserError(f"data.name={data.name} asks composed queries: set model.composer.name ({known})")
    zero_shot_protocol(config)
    if config.linear_probe and data.name != ImageFolderDataset.benchmark_name:
        raise UserError(f"linear_probe=true needs classes: data.name=image_folder, not {data.name}")


def build_dataset(config: Config) -> RetrievalDataset:
    """The data set, not yet checked. Raises UserError for an option that it does not have."""
    data = config.data
    dataset_class = lookup("data set (data.name)", DATASETS, data.name)
    options = {} if data.annotations is None else {"annotations": data.annotations}
    if options and not issubclass(dataset_class, Karpathy):
        raise UserError(f"data.annotations={data.annotations}: data.name={data.name} has files of fixed names")
    dataset = dataset_class(data.root, data.images, data.categories, **options)
    dataset.asked_split = data.split
    return dataset


def build_protocol(config: Config) -> Protocol:
    """The protocol of the config, or the data set's own; fields may be changed. Raises UserError."""
    return lookup("data set (data.name)", DATASETS, config.data.name).make_protocol(config.data.protocol or {})


def zero_shot_protocol(config: Config) -> Protocol:
    """The templates of the classification while a model trains. Raises UserError."""
    return ImageFolderDataset.make_protocol(config.zero_shot.protocol, "zero_shot.protocol")


def build_zero_shot(config: Config) -> ImageFolderDataset | None:
    """The image folder that is classified while a model trains; None where that is off."""
    options = config.zero_shot
    return ImageFolderDataset(options.root) if options.root is not None and options.every_n_epochs else None


def build_model(config: Config, stored: Mapping[str, Any] | None = None) -> tuple[ComposedRetriever, BuiltFrom]:
    """Towers with their weights and the composer, and what they were built from.

    `stored` is what a checkpoint says it was built from: it holds for the architecture of the same name, so that a lone
    checkpoint keeps the activation and the preprocessing of the weights it started from.
    """
    options = {"image_size": config.model.image_size} if config.model.image_size is not None else {}
    if stored is not None and stored["arch"] == config.model.arch:
        built_from = BuiltFrom(**stored)
        source = Source(built_from.arch, built_from.architecture, Preprocess(**built_from.preprocess))
        source = overridden(source, options)
        clip = build_towers(source)
    else:
        source = find_source(config.model.arch, config.model.weights, options)
        clip = build_dual_encoder(source)
    if "bias" in taken_by(config.loss["name"]):
        clip.add_logit_bias(is_trained=source.weights is not None)
    elif clip.logit_bias is not None:
        clip.logit_bias.requires_grad_(False)  # no gradient would reach it
    built_from = BuiltFrom(config.model.arch, clip.architecture, asdict(source.preprocess))
    set_attention(clip, config.model.attention)
    adapt_towers(config.model, clip)
    clip.set_grad_checkpointing(config.model.grad_checkpointing)
    if config.model.compile:
        compile_blocks(clip, config.trainer.accelerator)
    part, preprocess = config.model.composer, source.preprocess
    given = composer_inputs(clip, tokenizer_of(clip.architecture)) if part is not None else {}
    composer = build_part("composer", COMPOSERS, part, **given) if part is not None else None
    model = ComposedRetriever(clip, composer, preprocess.mean, preprocess.std, config.model.fixed_scale)
    # Nothing that no gradient reaches is trained: DDP would wait for it.
    model.freeze([*config.model.freeze, *([] if "scale" in taken_by(config.loss["name"]) else ["temperature"])])
    model.set_chunk_size(config.model.chunk_size)
    return model, built_from


@dataclass(frozen=True)
class BuiltFrom:
    """What a checkpoint needs to be rebuilt alone, in plain builtins: open_clip's config and the preprocessing."""

    arch: str
    architecture: dict[str, Any]
    preprocess: dict[str, Any]


def build_datamodule(
    config: Config, dataset: RetrievalDataset, model: ComposedRetriever, built_from: BuiltFrom, train: bool = True
) -> RetrievalDataModule:
    """The loaders of a checked data set; what stays as it is while a model is trained, or tested, may come cached."""
    from cliplab.data.datamodule import RetrievalDataModule

    if dataset.stand_ins:
        from cliplab.report import STAND_IN_NOTICE

        log.warning("%s", STAND_IN_NOTICE)
    empty = dataset.empty_captions()
    if any(empty.values()):
        log.info("empty captions, kept as they are: %s", empty)
    data = config.data
    datamodule = RetrievalDataModule(
        dataset,
        build_protocol(config),
        Preprocess(**built_from.preprocess),
        tokenizer_of(built_from.architecture),
        batch_size=data.batch_size,
        separate=same_image(config) == "separate",
        eval_batch_size=data.eval_batch_size,
        num_workers=data.num_workers,
        seed=config.seed,
        pad=data.pad,
        crop_scale=data.crop_scale,
        flip=data.flip,
        image_backend=data.image_backend,
        learns_from=model.composer.learns_from if model.composer is not None else "triplets",
        hard_negatives=data.hard_negatives,
    )
    towers = [each for each in ("image", "text") if not train or f"{each}_encoder" in config.model.freeze]
    if train and config.teacher.arch is not None:
        towers = []  # the teacher sees the pictures and the texts themselves
    if data.feature_cache is not None and towers:
        from cliplab.training.feature_cache import FeatureCache

        is_asked = data.feature_cache != "auto"
        folder = Path(data.feature_cache) if is_asked else Path(config.output_dir) / "feature_cache"
        precision = (config.trainer.precision, config.trainer.matmul_precision, config.model.attention)
        loading = {"batch_size": data.eval_batch_size, "num_workers": data.num_workers, "is_asked": is_asked}
        datamodule.features = FeatureCache(folder, model, datamodule.transform, precision, towers, **loading)
    return datamodule


def build_module(
    config: Config, model: ComposedRetriever, built_from: BuiltFrom, train: bool = True
) -> RetrievalModule:
    """Model, loss and optimiser settings as one LightningModule; its hyper-parameters rebuild it from a lone file.

    A teacher is built only to train.
    """
    from cliplab.training.module import RetrievalModule

    options = {key: value for key, value in config.loss.items() if key != "name"}
    loss = partial(LOSSES[config.loss["name"]], **options)
    hparams = {"config": asdict(config), "built_from": asdict(built_from)}
    module = RetrievalModule(model, loss, config.optim, config.seed, same_image(config) == "positives")
    module.save_hyperparameters(hparams, logger=False)
    if train and config.teacher.arch is not None:
        module.teacher = build_teacher(config, built_from.architecture, build_model)
    return module
