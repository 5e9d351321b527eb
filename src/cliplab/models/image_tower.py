"""What every image tower offers beside its forward pass: locking, intermediates, tokens, another image size."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cliplab.errors import UserError
from cliplab.models.transformer import Indices

Group = Sequence[nn.Module | nn.Parameter]


def channels_last(images: Tensor) -> Tensor:
    """[B, 3, H, W] in the order that convolutions are fast in: on a CPU, and on a GPU in half precision.

    The maps behind it keep that order.
    """
    half = images.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(images.device.type)
    fast = images.device.type == "cpu" or half
    return images.contiguous(memory_format=torch.channels_last) if fast else images


class ImageTower(nn.Module):
    """Normalised images [B, 3, H, W] -> features [B, D], not unit length."""

    image_size: int | tuple[int, int]
    width: int  # of the tokens
    preprocess_cfg: dict[str, Any] | None = None  # how pictures become its input; set by `load`, kept by `save`

    def __init__(self) -> None:
        super().__init__()
        self._frozen_norms: list[nn.Module] = []

    @property
    def rows_are_independent(self) -> bool:
        """Whether equal images always get equal features: no dropout, no statistics of the batch."""
        return not any(module.training for module in self.modules())

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> features [B, D], not unit length."""
        return self.forward_with_tokens(images)[0]

    def forward_with_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, H, W] -> features [B, D] and the tokens that they were pooled from [B, N, W]."""
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> dict[str, Tensor | list[Tensor]]:
        """`image_intermediates`: outputs of the blocks `indices`; and `image_features` unless `intermediates_only`.

        `stop_early` spares the blocks above the last wanted one where no features are wanted: those of a cut tower
        would be other features under the same name.
        """
        raise NotImplementedError

    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """Attention weights [B, heads, N, N] of each block, computed eagerly. Raises UserError where there are none."""
        raise UserError(f"{type(self).__name__} has no blocks of self-attention that give maps")

    def groups(self) -> list[Group]:
        """Modules and parameters from the input to the output: what `lock` leaves open, counted from the end."""
        raise NotImplementedError

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze all but the last `unlocked_groups` groups (LiT, Zhai et al., 2022).

        `freeze_bn_stats`: the batch norms of frozen groups keep their statistics in training too.
        """
        groups = self.groups()
        lock_groups(self.parameters(), groups, unlocked_groups)
        if freeze_bn_stats:
            locked = groups[: max(len(groups) - unlocked_groups, 0)]
            modules = [
                module for group in locked for part in group if isinstance(part, nn.Module) for module in part.modules()
            ]
            self.freeze_norms([module for module in modules if isinstance(module, _BatchNorm)])

    def freeze_norms(self, norms: list[nn.Module]) -> None:
        """Batch norms that stay in evaluation mode from now on; their keys and values remain as they are."""
        self._frozen_norms = norms
        self.train(self.training)

    def train(self, mode: bool = True) -> "ImageTower":
        """Batch norms with frozen statistics stay in evaluation mode."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    def remove_projection(self) -> None:
        """Give the pooled vector [B, W] instead of features [B, D] from now on."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        raise NotImplementedError

    def fit_positions(self, key: str, stored: Tensor) -> Tensor:
        """A stored tensor of this tower's `key`, resized where it holds positions of another image size."""
        return stored


def lock_groups(parameters: object, groups: Sequence[Group], unlocked: int) -> None:
    """Freeze `parameters` but for those of the last `unlocked` groups; more than there are: all are trained."""
    if unlocked < 0:
        raise UserError(f"can't leave {unlocked} groups unlocked: this tower has {len(groups)}, give 0 or more")
    for parameter in parameters:  # type: ignore[attr-defined]
        parameter.requires_grad_(False)
    for part in (part for group in groups[max(len(groups) - unlocked, 0) :] for part in group):
        for parameter in [part] if isinstance(part, nn.Parameter) else part.parameters():
            parameter.requires_grad_(True)


def layers_of(parameters: Iterable[nn.Parameter], groups: Sequence[Group]) -> list[list[nn.Parameter]]:
    """`parameters` by the group that they first stand in, from the input on; those of no group are the last layer."""
    left = {id(parameter): parameter for parameter in parameters}
    layers = []
    for group in groups:
        own = [p for part in group for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]
        layers.append([left.pop(id(parameter)) for parameter in dict.fromkeys(own) if id(parameter) in left])
    return [*layers, list(left.values())] if left else layers


def can_resize(stored: Tensor, own: Tensor) -> bool:
    """Whether stored positions [1 + h * w, W] are those of a square grid of another size than our `own`."""
    if stored.dim() != 2 or stored.shape[1:] != own.shape[1:] or len(stored) in (0, len(own)):
        return False
    return math.isqrt(len(stored) - 1) ** 2 + 1 == len(stored) and len(stored) > 1


def resize_positions(stored: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions [1 + h * w, W] of a square grid -> [1 + grid_h * grid_w, W]: bicubic with antialias, open_clip's rule.

    The position of the class (or mean) token is kept.
    """
    old = math.isqrt(len(stored) - 1)
    patches = stored[1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(patches, size=grid, mode="bicubic", antialias=True, align_corners=False)
    resized = resized.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1).to(stored.dtype)
    return torch.cat([stored[:1], resized])


def as_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """Patch tokens [B, N, W], row by row -> [B, W, height, width]."""
    return tokens.reshape(len(tokens), height, width, -1).permute(0, 3, 1, 2).contiguous()


def check_format(output_fmt: str, known: tuple[str, ...] = ("NCHW", "NLC")) -> None:
    """Raise UserError for a layout of intermediates that there isn't."""
    if output_fmt not in known:
        raise UserError(f"the output format of intermediates must be {' or '.join(known)}, got '{output_fmt}'")
