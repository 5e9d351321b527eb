"""Losses by name: functions of (query [B, ...], target [B, D]) whose other parameters are their options.

Beside these a loss may take, by name: `scale` [], what scores are multiplied by (a temperature that no loss takes is
frozen); `score`, how the model compares (a loss without it compares unit vectors alone); `target_id` [B], to count
equal targets of a batch as positives (data.same_image=positives); `reference` [B, D], the unit features of the
reference images; `negatives` [B, N, D], those of each query's mined negatives, None where the data set has none; `bias`
[], the learned bias of the logits; `teacher_query`, `teacher_target` [B, D'] and `teacher_scale` [], what a teacher
(the config's `teacher`) makes of the same batch.

To add one: its file in this folder, its line below.
"""

from collections.abc import Callable

from torch import Tensor

from cliplab.losses.distillation import distillation
from cliplab.losses.hard_negative_nce import hard_negative_nce
from cliplab.losses.info_nce import info_nce
from cliplab.losses.mse import mse
from cliplab.losses.reference_negative import reference_negative
from cliplab.losses.sigmoid import sigmoid
from cliplab.losses.soft_triplet import soft_triplet

LOSSES: dict[str, Callable[..., Tensor]] = {
    "info_nce": info_nce,
    "sigmoid": sigmoid,
    "hard_negative_nce": hard_negative_nce,
    "reference_negative": reference_negative,
    "soft_triplet": soft_triplet,
    "mse": mse,
    "distillation": distillation,
}
TEACHER_INPUTS = ("teacher_query", "teacher_target", "teacher_scale")
LOSS_INPUTS = (  # of the step, no options
    *("query", "target", "scale", "score", "target_id", "reference", "negatives", "bias"),
    *TEACHER_INPUTS,
)
