"""Losses by name: functions of (query [B, ...], target [B, D], scale, score) whose other parameters are their options.

Beside these a loss may take, by name: `target_id` [B], to count equal targets of a batch as positives
(data.same_image=positives); `reference` [B, D], the unit features of the reference images, None where there are none;
`bias` [], the learned bias of the logits.

To add one: its file in this folder, its line below.
"""

from collections.abc import Callable

from torch import Tensor

from cliplab.losses.info_nce import info_nce
from cliplab.losses.mse import mse

LOSSES: dict[str, Callable[..., Tensor]] = {"info_nce": info_nce, "mse": mse}
LOSS_INPUTS = ("query", "target", "scale", "score", "target_id", "reference", "bias")  # of the step, no options
