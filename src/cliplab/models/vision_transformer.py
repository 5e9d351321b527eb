"""The ViT image tower of CLIP (Dosovitskiy et al., 2021; Radford et al., 2021), in the variants of open_clip."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.attention import AttentionMaps
from cliplab.models.image_tower import Group, ImageTower, as_map, can_resize, check_format, resize_positions
from cliplab.models.seen import draws, is_watched
from cliplab.models.tower_cfg import CLIPVisionCfg, vision_cfg_of
from cliplab.models.transformer import Indices, Transformer, activation_of, norm_of


class VisionTransformer(ImageTower):
    """Patches and a class token -> the projected class token, or the mean of the patches."""

    def __init__(self, cfg: CLIPVisionCfg | Mapping[str, Any], embed_dim: int, quick_gelu: bool = False) -> None:
        super().__init__()
        cfg = vision_cfg_of(cfg)
        assert isinstance(cfg.layers, int)
        size, width = cfg.image_size, cfg.width
        height_width = size if isinstance(size, tuple) else (size, size)
        self.image_size, self.patch_size, self.width = size, cfg.patch_size, width
        self.grid_size = (height_width[0] // cfg.patch_size, height_width[1] // cfg.patch_size)
        self.pool_type, self.final_ln_after_pool, self.output_dim = cfg.pool_type, cfg.final_ln_after_pool, embed_dim
        norm = norm_of(cfg.norm_kwargs)
        self.conv1 = nn.Conv2d(3, width, cfg.patch_size, stride=cfg.patch_size, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        positions = self.grid_size[0] * self.grid_size[1] + 1
        self.positional_embedding = nn.Parameter(scale * torch.randn(positions, width))
        self.patch_dropout = PatchDropout(cfg.patch_dropout) if cfg.patch_dropout else nn.Identity()
        self.ln_pre = nn.Identity() if cfg.no_ln_pre else norm(width)
        self.transformer = Transformer(
            width,
            cfg.layers,
            width // cfg.head_width,
            cfg.mlp_ratio,
            activation_of(quick_gelu, cfg.act_kwargs),
            norm,
            cfg.ls_init_value,
        )
        self.ln_post = norm(width)
        self.proj: nn.Parameter | None = nn.Parameter(scale * torch.randn(width, embed_dim))

    @property
    def rows_are_independent(self) -> bool:
        """As ImageTower says: only patches are drawn here, and what an adapter's dropout draws."""
        return not draws(self)

    def embed(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> the blocks' input [B, 1 + N, W]; training may leave patches out."""
        x = self.patches(images.to(self.conv1.weight.dtype))
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding.to(x.dtype)
        return self.ln_pre(self.patch_dropout(x))

    def patches(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, W]: `conv1` as one product, as its patches don't overlap; a convolution is slower."""
        (height, width), size = self.grid_size, self.patch_size
        plain = type(self.conv1) is nn.Conv2d and self.conv1.bias is None and not is_watched(self.conv1)  # no adapter
        if not plain or images.shape[-2:] != (height * size, width * size):
            return self.conv1(images).flatten(2).transpose(1, 2)  # [B, W, h, w] -> [B, N, W]
        x = images.unflatten(-1, (width, size)).unflatten(-3, (height, size))  # [B, 3, h, P, w, P]
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(len(images), height * width, -1)
        return F.linear(x, self.conv1.weight.flatten(1))

    def pool(self, tokens: Tensor) -> Tensor:
        """The blocks' output [B, 1 + N, W] -> pooled [B, W], normed by ln_post."""
        x = tokens if self.final_ln_after_pool else self.ln_post(tokens)
        if self.pool_type != "none":
            x = x[:, 0] if self.pool_type == "tok" else x[:, 1:].mean(dim=1)
        return self.ln_post(x) if self.final_ln_after_pool else x

    def project(self, pooled: Tensor) -> Tensor:
        """[B, W] -> [B, D]; unchanged without a projection."""
        return pooled if self.proj is None else pooled @ self.proj

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> features [B, D], not unit length."""
        x = self.embed(images)
        if self.pool_type != "tok" or is_watched(self.transformer, self.ln_post):
            return self.project(self.pool(self.transformer(x)))
        class_tokens = torch.arange(len(x), device=x.device) * x.shape[1]
        return self.project(self.ln_post(self.transformer.forward_at(x, class_tokens)))

    def forward_with_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] and class and patch tokens after ln_post [B, 1 + N, W]."""
        x = self.transformer(self.embed(images))
        return self.project(self.pool(x)), self.ln_post(x)

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
        """As ImageTower says; `image_intermediates` [B, W, h, w] (NCHW) or [B, N, W] (NLC), without the class token.

        `output_extra_tokens` adds the class tokens [B, 1, W] as `image_intermediates_prefix`.
        """
        check_format(output_fmt)
        stop = stop_early and intermediates_only
        last, tokens = self.transformer.forward_intermediates(self.embed(x), indices, stop)
        tokens = [self.ln_post(t) for t in tokens] if normalize_intermediates else tokens
        patches = [t[:, 1:] for t in tokens]
        output: dict[str, Tensor | list[Tensor]] = {
            "image_intermediates": [as_map(p, *self.grid_size) for p in patches] if output_fmt == "NCHW" else patches
        }
        if output_extra_tokens:
            output["image_intermediates_prefix"] = [t[:, :1] for t in tokens]
        if not intermediates_only:
            output["image_features"] = self.project(self.pool(last))
        return output

    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """Attention weights [B, heads, 1 + N, 1 + N] of each block, computed eagerly."""
        maps = AttentionMaps()
        self.transformer(self.embed(images), maps=maps)
        return maps

    def groups(self) -> list[Group]:
        """Embedding, each block but the last, the last block with ln_post, the projection: layers + 2."""
        embedding = [self.conv1, self.class_embedding, self.positional_embedding, self.ln_pre]
        blocks, top = list(self.transformer.resblocks), [self.proj] if self.proj is not None else []
        return [embedding, *([block] for block in blocks[:-1]), [blocks[-1], self.ln_post], *([top] if top else [])]

    def remove_projection(self) -> None:
        """Give the pooled vector [B, W] instead of features [B, D] from now on."""
        self.proj = None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.transformer.grad_checkpointing = enable

    def fit_positions(self, key: str, stored: Tensor) -> Tensor:
        """Positions of another image size, resized."""
        if key != "positional_embedding" or not can_resize(stored, self.positional_embedding):
            return stored
        return resize_positions(stored, self.grid_size)


class PatchDropout(nn.Module):
    """Leaves a random share of the patches out in training and keeps the class token (Li et al., 2023)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        if not 0 <= share < 1:
            raise UserError(f"vision_cfg.patch_dropout must be in [0, 1), got {share}")
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1 + N, W] -> [B, 1 + max(1, int(N (1 - share))), W], patches in random order, as open_clip draws them."""
        if not self.training or self.share == 0:
            return x
        batch, patches = len(x), x.shape[1] - 1
        kept = torch.randn(batch, patches).topk(max(1, int(patches * (1 - self.share))), dim=-1).indices
        rows = torch.arange(batch)[:, None]
        return torch.cat([x[:, :1], x[:, 1:][rows, kept]], dim=1)
