"""AdamW with parameter groups by part and by layer, warm-up and a schedule."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from cliplab.errors import UserError

NO_DECAY_NAMES = ("positional_embedding", "class_embedding", "pos_embed", "cls_token", "logit_scale", "logit_bias")


@dataclass(frozen=True)
class ParameterGroup:
    """The trainable parameters of one part that share a learning rate and a weight decay."""

    part: str
    lr: float
    weight_decay: float
    parameters: list[nn.Parameter]
    name: str = ""

    def as_group(self) -> dict[str, Any]:
        """For torch.optim."""
        return {"params": self.parameters, "lr": self.lr, "weight_decay": self.weight_decay, "name": self.name}


def parameter_groups(
    model: nn.Module,
    parts: Mapping[str, Sequence[nn.Parameter]],
    lr: float,
    weight_decay: float,
    multipliers: Mapping[str, float],
) -> list[ParameterGroup]:
    """Per part one group with decay and one without (norms, biases, embeddings of position and class, temperature)."""
    undecayed = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim < 2 or name.rsplit(".", 1)[-1] in NO_DECAY_NAMES
    }
    groups = []
    for part, parameters in parts.items():
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        decayed = [parameter for parameter in trainable if id(parameter) not in undecayed]
        kept = [parameter for parameter in trainable if id(parameter) in undecayed]
        part_lr = lr * multipliers.get(part, 1.0)
        groups.append(ParameterGroup(part, part_lr, weight_decay, decayed, part))
        groups.append(ParameterGroup(part, part_lr, 0.0, kept, f"{part}/no_decay"))
    groups = [group for group in groups if group.parameters]
    if not groups:
        raise UserError("nothing to train: every part with parameters is frozen (model.freeze) or has none")
    return groups


def decayed_by_layer(
    groups: Sequence[ParameterGroup], layers: Mapping[str, Sequence[Sequence[nn.Parameter]]], decay: float
) -> list[ParameterGroup]:
    """Split the groups of the parts in `layers`, and slow the learning rate down towards the input (BEiT, Bao et al.).

    `layers`: per part its parameters from the input to the output, every one in one layer. The top layer keeps the lr,
    the one d below it gets lr * decay^d. Groups are named PART/layer_N, counted from the input.
    """
    if decay == 1:
        return list(groups)
    found = []
    for group in groups:
        if group.part not in layers:
            found.append(group)
            continue
        for number, layer in enumerate(layers[group.part]):
            own = {id(parameter) for parameter in layer}
            kept = [parameter for parameter in group.parameters if id(parameter) in own]
            lr = group.lr * decay ** (len(layers[group.part]) - 1 - number)
            name = group.name.replace(group.part, f"{group.part}/layer_{number}", 1)
            found.append(replace(group, lr=lr, parameters=kept, name=name))
    return [group for group in found if group.parameters]


def warmup_then(schedule: str, warmup: float, total_steps: int) -> Callable[[int], float]:
    """Step -> factor on the lr: linear from 1/n to 1 over the share `warmup` of the steps, then `schedule`.

    cosine and linear end at 0, constant stays at 1.
    """
    warmup_steps = int(warmup * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if schedule == "linear":
            return 1 - min(1.0, progress)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def adamw(
    groups: Sequence[ParameterGroup], betas: Sequence[float], eps: float, factor: Callable[[int], float]
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimiser and its schedule per step; fused: one pass over the weights, on a CPU a quarter of the time."""
    parameters = [group.as_group() for group in groups]
    optimizer = torch.optim.AdamW(parameters, betas=(betas[0], betas[1]), eps=eps, fused=True)
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined] - gradients are unscaled before clipping
    return optimizer, LambdaLR(optimizer, factor)


def not_finite(module: nn.Module) -> str:
    """Names the parameters that hold NaN or infinity, and what helps."""
    names = [name for name, parameter in module.named_parameters() if not torch.isfinite(parameter).all()]
    return f"parameters that are not finite: {names[:5] or 'none'}; lower optim.lr or use trainer.precision=32-true"
