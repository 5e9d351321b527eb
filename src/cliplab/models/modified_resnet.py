"""CLIP's ResNet (Radford et al., 2021): three-convolution stem, average pooling before strides, attention pooling."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from cliplab.models.attention import Implementation, attend
from cliplab.models.image_tower import Group, ImageTower, can_resize, channels_last, check_format, resize_positions
from cliplab.models.tower_cfg import CLIPVisionCfg, vision_cfg_of
from cliplab.models.transformer import Indices, taken_indices

EXPANSION = 4  # channels out of a bottleneck / channels within


class Pointwise(nn.Conv2d):
    """A 1x1 convolution; with the channels last it is one product, whose backward pass in bf16 is faster on a CPU."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, D, h, w]."""
        places = input.permute(0, 2, 3, 1)
        if not (input.is_cpu and places.is_contiguous()):
            return super().forward(input)
        return F.linear(places, self.weight.flatten(1)).permute(0, 3, 1, 2)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 at stride 1; a stride is an average pooling after the 3x3 and in the shortcut."""

    def __init__(self, channels: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = Pointwise(channels, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = Pointwise(planes, planes * EXPANSION)
        self.bn3 = nn.BatchNorm2d(planes * EXPANSION)
        nn.init.zeros_(self.bn3.weight)  # each block starts as its shortcut
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels != planes * EXPANSION:
            shortcut = [
                ("-1", nn.AvgPool2d(stride)),
                ("0", Pointwise(channels, planes * EXPANSION)),
                ("1", nn.BatchNorm2d(planes * EXPANSION)),
            ]
            self.downsample = nn.Sequential(OrderedDict(shortcut))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 4 planes, h / stride, w / stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.avgpool(self.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    """One query, the mean of the map, attends to the mean and all places of the map."""

    def __init__(self, grid: tuple[int, int], width: int, heads: int, output_dim: int) -> None:
        super().__init__()
        self.grid, self.heads = grid, heads
        self.attention_implementation: Implementation = "sdpa"
        self.positional_embedding = nn.Parameter(torch.randn(grid[0] * grid[1] + 1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        output = nn.Linear(width, output_dim)
        self.c_proj: nn.Module = output
        for projection in (self.q_proj, self.k_proj, self.v_proj, output):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, h, w] -> [B, D]."""
        tokens = x.flatten(2).transpose(1, 2)  # [B, hw, C]
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        q, k, v = self.q_proj(tokens[:, :1]), self.k_proj(tokens), self.v_proj(tokens)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, H, L, C/H]
        pooled = attend(q, k, v, self.attention_implementation)
        return self.c_proj(pooled.transpose(1, 2).flatten(2))[:, 0]


class ModifiedResNet(ImageTower):
    """RN50, RN101, RN50x4, RN50x16, RN50x64."""

    def __init__(self, cfg: CLIPVisionCfg | Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        cfg = vision_cfg_of(cfg)
        assert isinstance(cfg.layers, tuple)
        self.image_size, self.output_dim = cfg.image_size, embed_dim
        size, width = cfg.image_size if isinstance(cfg.image_size, tuple) else (cfg.image_size,) * 2, cfg.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)
        self.width = width * 32
        channels = [width, *(width * 2**stage * EXPANSION for stage in range(4))]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            _stage(channels[stage], width * 2**stage, blocks, stride=1 if stage == 0 else 2)
            for stage, blocks in enumerate(cfg.layers)
        )
        heads = width * 32 // cfg.head_width
        self.attnpool = AttentionPool2d((size[0] // 32, size[1] // 32), width * 32, heads, embed_dim)
        self.grad_checkpointing = False

    def stem(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> [B, width, H/4, W/4]."""
        x = self.relu(self.bn1(self.conv1(channels_last(images.to(self.conv1.weight.dtype)))))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.avgpool(self.relu(self.bn3(self.conv3(x))))

    def forward_with_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] and the places of the last map [B, hw, C]."""
        last, _ = self._stages(images, taken=set(), stop_early=False)
        return self.attnpool(last), last.flatten(2).transpose(1, 2)

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
        """As ImageTower says, for the stem and the four layers; there is no final norm and no extra token."""
        check_format(output_fmt)
        taken = taken_indices(5, indices)
        last, maps = self._stages(x, taken, stop_early and intermediates_only)
        output: dict[str, Tensor | list[Tensor]] = {
            "image_intermediates": maps if output_fmt == "NCHW" else [m.flatten(2).transpose(1, 2) for m in maps]
        }
        if not intermediates_only:
            output["image_features"] = self.attnpool(last)
        return output

    def _stages(self, images: Tensor, taken: set[int], stop_early: bool) -> tuple[Tensor, list[Tensor]]:
        x, maps = images, []
        stages: tuple[Callable[[Tensor], Tensor], ...] = (self.stem, self.layer1, self.layer2, self.layer3, self.layer4)
        for index, stage in enumerate(stages):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    stage, x, use_reentrant=False, context_fn=lambda: (nullcontext(), self._statistics_kept())
                )
            else:
                x = stage(x)
            if index in taken:
                maps.append(x)
            if stop_early and index == max(taken):
                break
        return x, maps

    @contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """While activations are computed again, batch norms count in copies: no batch is counted twice."""
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm)]
        kept = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
        for norm, name, buffer in kept:
            setattr(norm, name, buffer.clone())
        try:
            yield
        finally:
            for norm, name, buffer in kept:
                setattr(norm, name, buffer)

    def groups(self) -> list[Group]:
        """Stem, the four layers, the attention pooling: 6."""
        stem = [self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3]
        return [stem, [self.layer1], [self.layer2], [self.layer3], [self.layer4], [self.attnpool]]

    def remove_projection(self) -> None:
        """Give the attention-pooled vector [B, 32 width] instead of features [B, D] from now on."""
        self.attnpool.c_proj = nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stem and each layer in the backward pass; batch norms count their statistics once."""
        self.grad_checkpointing = enable

    def fit_positions(self, key: str, stored: Tensor) -> Tensor:
        """Positions of another image size, resized: open_clip leaves them and fails."""
        if key != "attnpool.positional_embedding" or not can_resize(stored, self.attnpool.positional_embedding):
            return stored
        return resize_positions(stored, self.attnpool.grid)


def _stage(channels: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    rest = [Bottleneck(planes * EXPANSION, planes) for _ in range(1, blocks)]
    return nn.Sequential(Bottleneck(channels, planes, stride), *rest)
