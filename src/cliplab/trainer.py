"""Config -> Trainer, with its callbacks and loggers."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from cliplab.build import build_protocol, build_zero_shot, zero_shot_protocol
from cliplab.config import Config
from cliplab.errors import UserError
from cliplab.ranges import tells_epochs_apart

if TYPE_CHECKING:
    import lightning as L

    from cliplab.run import RunDirectory


def build_trainer(config: Config, run: RunDirectory) -> L.Trainer:
    """The Trainer of a training run."""
    from lightning.pytorch import callbacks
    from lightning.pytorch.loggers import TensorBoardLogger

    from cliplab.training.averaging import build_averaging
    from cliplab.training.callbacks import ProgressBar, RetrievalPictures
    from cliplab.training.classification import Probe, ZeroShot
    from cliplab.training.loggers import continued_csv_logger

    trainer = config.trainer
    folder = run.path / "checkpoints"
    checkpoint = partial(callbacks.ModelCheckpoint, folder, enable_version_counter=False)
    used: list[Any] = [
        checkpoint("last", save_on_train_epoch_end=True),
        callbacks.LearningRateMonitor("step"),
        ProgressBar(leave=True),
        RetrievalPictures(run.path / "pictures"),
        *([Probe()] if config.linear_probe else []),
    ]
    if tells_epochs_apart(config, build_protocol(config)):
        used.insert(0, checkpoint("best", monitor=trainer.monitor, mode="max", save_on_train_epoch_end=False))
    zero_shot = build_zero_shot(config)
    if zero_shot is not None:
        options = config.zero_shot
        used.append(ZeroShot(zero_shot, zero_shot_protocol(config), options.split, options.every_n_epochs))
    if trainer.early_stopping_patience is not None:
        used.append(callbacks.EarlyStopping(trainer.monitor, patience=trainer.early_stopping_patience, mode="max"))
    if trainer.weight_averaging is not None:  # last: the others look at a validation while the average is in place
        used.append(build_averaging(trainer.weight_averaging))
    loggers = [
        TensorBoardLogger(str(run.path), name="", version="tensorboard"),
        continued_csv_logger(run.path, resumed=run.resume_from is not None),
    ]
    limits = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
    return _trainer(config, run, callbacks=used, logger=loggers, **limits)


def build_evaluator(config: Config, run: RunDirectory) -> L.Trainer:
    """A Trainer that only tests: no logger, no checkpoints."""
    from cliplab.training.callbacks import ProgressBar, RetrievalPictures
    from cliplab.training.classification import Probe

    used = [ProgressBar(leave=True), RetrievalPictures(run.path / "pictures")]
    used += [Probe()] if config.linear_probe else []
    return _trainer(config, run, callbacks=used, logger=False, enable_checkpointing=False)


def _trainer(config: Config, run: RunDirectory, **arguments: Any) -> L.Trainer:
    import lightning as L
    import torch
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # importing lightning has set it to INFO
    trainer = config.trainer
    torch.set_float32_matmul_precision(trainer.matmul_precision)
    by_slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    try:
        return L.Trainer(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            strategy=trainer.strategy,
            precision=trainer.precision,  # type: ignore[arg-type]
            gradient_clip_val=trainer.gradient_clip_val,
            check_val_every_n_epoch=trainer.check_val_every_n_epoch,
            log_every_n_steps=trainer.log_every_n_steps,
            default_root_dir=run.path,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the data module's own samplers know about epochs and repeated rows
            enable_model_summary=False,
            # A job is requeued by whoever submitted it, and continues from its last epoch; not by Lightning as well.
            plugins=[SLURMEnvironment(auto_requeue=False)] if by_slurm else None,
            **arguments,
        )
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"trainer: {error}") from error
