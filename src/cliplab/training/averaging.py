"""Averages of the weights over the steps, by Lightning's callback: what is validated, kept and tested."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cliplab.errors import UserError
from cliplab.registry import build_part


class Averaging(WeightAveraging):
    """Lightning's, with the average in place until the validation is over.

    Joint scores are computed when its last batch is through, and so is a zero-shot classification beside it; Lightning
    itself swaps the weights back before. A checkpoint holds the average as its weights, and what training goes on from.
    From the optimiser step `start_step` on every `every_n_steps`-th is averaged; until then the average is the weights.
    """

    def __init__(self, every_n_steps: int, start_step: int, multi_avg_fn: Callable[..., None] | None = None) -> None:
        if every_n_steps < 1 or start_step < 0:
            raise UserError(
                "trainer.weight_averaging needs every_n_steps of 1 or more and start_step of 0 or more, got "
                f"{every_n_steps}, {start_step}"
            )
        super().__init__(multi_avg_fn=multi_avg_fn)
        self.every_n_steps, self.start_step = every_n_steps, start_step

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After these optimiser steps, counted from 0."""
        if step_idx is None:
            return False
        return step_idx < self.start_step or (step_idx - self.start_step) % self.every_n_steps == 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update; an average of which nothing is counted becomes the next weights as they are."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        assert self._average_model is not None
        if trainer.global_step <= self.start_step:
            self._average_model.n_averaged.zero_()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Not yet: see above."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The training's own weights come back, before the checkpoint callbacks, which Lightning calls last."""
        super().on_validation_epoch_end(trainer, pl_module)


def ema(decay: float = 0.999, every_n_steps: int = 1, start_step: int = 0) -> Averaging:
    """Exponential moving average: average = decay * average + (1 - decay) * weights. Raises UserError."""
    if not 0 <= decay < 1:
        raise UserError(f"trainer.weight_averaging 'ema': decay must be in [0, 1), got {decay}")
    return Averaging(every_n_steps, start_step, multi_avg_fn=get_ema_multi_avg_fn(decay))


def swa(every_n_steps: int = 1, start_step: int = 0) -> Averaging:
    """Equal weights for all averaged steps (Izmailov et al., 2018). Raises UserError."""
    return Averaging(every_n_steps, start_step)


AVERAGES: dict[str, Callable[..., Averaging]] = {"ema": ema, "swa": swa}


def build_averaging(part: Mapping[str, Any]) -> Averaging:
    """The callback that `{name: ema | swa, option: value}` asks for. Raises UserError."""
    return build_part("average (trainer.weight_averaging)", AVERAGES, part)
