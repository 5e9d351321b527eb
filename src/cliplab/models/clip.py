"""The dual encoder of CLIP (Radford et al., 2021), with open_clip's constructor and state-dict keys."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliplab.models.text_transformer import TextTower
from cliplab.models.transformer import QuickGELU
from cliplab.models.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class CLIPVisionCfg:
    """The image tower, in open_clip's words."""

    layers: int = 12
    width: int = 768
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: int = 16
    image_size: int = 224


@dataclass(frozen=True)
class CLIPTextCfg:
    """The text tower, in open_clip's words."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0


class CLIP(TextTower):
    """An image tower `visual` and a text tower at the root. Features are not unit length unless `normalize`."""

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: CLIPVisionCfg | Mapping[str, Any],
        text_cfg: CLIPTextCfg | Mapping[str, Any],
        quick_gelu: bool = False,
        init_logit_scale: float = math.log(1 / 0.07),
    ) -> None:
        super().__init__()
        vision = vision_cfg if isinstance(vision_cfg, CLIPVisionCfg) else CLIPVisionCfg(**vision_cfg)
        text = text_cfg if isinstance(text_cfg, CLIPTextCfg) else CLIPTextCfg(**text_cfg)
        sizes = (
            embed_dim,
            vision.width,
            vision.head_width,
            vision.patch_size,
            text.width,
            text.heads,
            text.context_length,
        )
        if min(sizes) < 1 or vision.image_size < vision.patch_size or text.vocab_size < 1:
            raise ValueError(f"sizes must be 1 or more, and the image at least a patch: {vision}, {text}")
        activation = QuickGELU if quick_gelu else nn.GELU
        self.embed_dim, self.quick_gelu = embed_dim, quick_gelu
        self.visual = VisionTransformer(
            vision.image_size,
            vision.patch_size,
            vision.width,
            vision.layers,
            vision.width // vision.head_width,
            embed_dim,
            activation,
            vision.mlp_ratio,
        )
        self.build_text(
            text.context_length,
            text.vocab_size,
            text.width,
            text.heads,
            text.layers,
            embed_dim,
            activation,
            text.mlp_ratio,
        )
        self.logit_scale = nn.Parameter(torch.tensor(init_logit_scale))

    @property
    def text_tower(self) -> TextTower:
        """The module that handles text; here the model itself."""
        return self

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Normalised images [B, 3, H, W] -> features [B, D]."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Token ids [B, L] -> features [B, D]."""
        features = self.text_tower.forward_text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit image features [B, D], unit text features [B, D], exp(logit_scale) []."""
        return self.encode_image(image, True), self.encode_text(text, True), self.logit_scale.exp()
