"""LoRA (Hu et al., ICLR 2022) as a parametrisation of the packed attention weights; merged, keys are open_clip's."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cliplab.errors import UserError
from cliplab.models.transformer import Attention

TARGETS = ("q", "k", "v")
_WEIGHT = "in_proj_weight"
_KEY = f"parametrizations.{_WEIGHT}."


class LowRank(nn.Module):
    """W + alpha / rank * up down, on some of the rows q, k, v of a packed weight W [3 D, D].

    `down` [T, rank, D] and `up` [T, D, rank] for T targets; up starts at 0, so that nothing changes at first.
    """

    scaling: Tensor
    rows: Tensor

    def __init__(self, width: int, rank: int, alpha: float, targets: Iterable[str] = TARGETS) -> None:
        super().__init__()
        places = [place for place, name in enumerate(TARGETS) if name in set(targets)]
        self.down = nn.Parameter(torch.empty(len(places), rank, width))
        self.up = nn.Parameter(torch.zeros(len(places), width, rank))
        # Buffers: what merges the weights must know them, and a checkpoint may be all that there is.
        self.register_buffer("scaling", torch.tensor(alpha / rank))
        self.register_buffer("rows", torch.tensor(places))
        for each in self.down:
            nn.init.kaiming_uniform_(each, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """[3 D, D] -> [3 D, D]."""
        return updated(weight, self.down, self.up, self.scaling, self.rows)


def updated(weight: Tensor, down: Tensor, up: Tensor, scaling: Tensor, rows: Tensor) -> Tensor:
    """The packed weight [3 D, D] with its low-rank updates, in its own precision, autocast or not."""
    with torch.autocast(weight.device.type, enabled=False):
        update = (scaling * up @ down).to(weight.dtype)
        packed = weight.unflatten(0, (len(TARGETS), -1))
        return packed.index_add(0, rows, update).flatten(0, 1)


def adapt(tower: nn.Module, parameters: Iterable[nn.Parameter], rank: int, alpha: float, targets: list[str]) -> None:
    """Freeze `parameters`, those of a tower, and let low-rank updates of its attention weights learn in their place.

    Raises UserError for a tower whose attention isn't ours (timm, transformers, ResNet).
    """
    layers = [module for module in tower.modules() if isinstance(module, Attention)]
    if not layers:
        raise UserError(
            f"model.lora: {type(tower).__name__} has no packed attention of ours; leave it out of model.lora.parts, or "
            "choose an architecture without timm, ResNet and Hugging Face towers"
        )
    for parameter in parameters:
        parameter.requires_grad_(False)
    for layer in layers:
        width = layer.out_proj.in_features
        update = LowRank(width, rank, alpha, targets).to(layer.in_proj_weight)
        parametrize.register_parametrization(layer, _WEIGHT, update)


def merged(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which every low-rank update is added to its weight, under the weight's plain key."""
    found = {key: value for key, value in state_dict.items() if _KEY not in key}
    for key, weight in state_dict.items():
        if key.endswith(f"{_KEY}original"):
            prefix = key.removesuffix("original")
            parts = (state_dict[f"{prefix}0.{name}"] for name in ("down", "up", "scaling", "rows"))
            found[key.replace(f"{_KEY}original", _WEIGHT)] = updated(weight, *parts)
    return found
