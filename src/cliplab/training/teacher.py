"""A trained model that another one learns from: what it makes of the same batch, without gradients."""

from typing import Any

import torch
from torch import Tensor

from cliplab.errors import UserError
from cliplab.models.composed import ComposedRetriever


class Teacher:
    """A frozen model in evaluation mode. No module of the run's own: in no state dict, no optimiser and no average."""

    def __init__(self, model: ComposedRetriever) -> None:
        self.model = model.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self  # weight averaging copies the module; one teacher is enough

    def outputs(self, batch: dict[str, Any], pairs: int) -> list[dict[str, Tensor]]:
        """The batch as the student sees it -> per pair that the student compares what a loss takes of the teacher.

        Raises UserError where teacher and student make different numbers of pairs of a batch.
        """
        with torch.no_grad():
            device = next(iter(batch["target"].values())).device
            if self.model.mean.device != device:
                self.model.to(device)
            found = self.model.training_pairs(batch["query"], batch["target"])
            scale = self.model.scale
        if len(found) != pairs:
            raise UserError(
                f"teacher: its composer compares {len(found)} pair(s) a sample and model.composer {pairs}; teach one "
                "that compares as many"
            )
        return [{"teacher_query": pair.query, "teacher_target": pair.target, "teacher_scale": scale} for pair in found]
