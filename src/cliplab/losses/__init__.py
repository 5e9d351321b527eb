"""Losses by name: functions of (query [B, ...], target [B, D], scale, score) whose other parameters are their options.

One that takes `target_id` [B] as well can count equal targets of a batch as positives (data.same_image=positives).

To add one: its file in this folder, its line below.
"""

from collections.abc import Callable

from torch import Tensor

from cliplab.losses.info_nce import info_nce

LOSSES: dict[str, Callable[..., Tensor]] = {"info_nce": info_nce}
LOSS_INPUTS = ("query", "target", "scale", "score", "target_id")  # given by the training step, no options
