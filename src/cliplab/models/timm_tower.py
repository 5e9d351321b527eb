"""Any backbone of timm as an image tower: the trunk by its timm name, and open_clip's pooling and projection."""

import inspect
import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from timm.layers.mlp import Mlp
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import group_parameters
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.checkpoints.hub import CONFIG_FILES, WEIGHT_FILES, hub_folder
from cliplab.models.image_tower import Group, ImageTower, channels_last, check_format
from cliplab.models.tower_cfg import CLIPVisionCfg, vision_cfg_of
from cliplab.models.transformer import Indices
from cliplab.registry import closest

log = logging.getLogger(__name__)
_ATTENTION_POOLS = {"abs_attn": AttentionPool2d, "rot_attn": RotAttentionPool2d}


class TimmTower(ImageTower):
    """`trunk` (timm) and `head` (pooling by attention and projection, where the trunk has none of its own).

    The activation is the trunk's own, whatever `quick_gelu` says.
    """

    trunk: Any  # timm's models share methods, not a class

    def __init__(self, cfg: CLIPVisionCfg | Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        cfg = vision_cfg_of(cfg)
        self.image_size = cfg.image_size
        self.trunk = _trunk(cfg, embed_dim)
        self.width = int(self.trunk.num_features)
        self.head = nn.Sequential(_head_layers(cfg, embed_dim, self.trunk))
        if cfg.image_size != (cfg.timm_kwargs or {}).get("img_size", self.trunk.default_cfg["input_size"][-1]):
            self.set_input_size(cfg.image_size)

    def set_input_size(self, image_size: int | tuple[int, int]) -> None:
        """Resize positions and windows to another image size; convolutional trunks take any."""
        self.image_size = image_size
        if hasattr(self.trunk, "set_input_size"):
            self.trunk.set_input_size(img_size=image_size)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> features [B, D], not unit length."""
        return self.head(self.trunk(self._cast(images)))

    def forward_with_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] and the trunk's last tokens or places [B, N, W]."""
        last = self.trunk.forward_features(self._cast(images))
        tokens = last
        if last.dim() == 4:  # [B, W, h, w], or [B, h, w, W] for the trunks that say so
            is_nhwc = getattr(self.trunk, "output_fmt", "NCHW") == "NHWC"
            tokens = last.flatten(1, 2) if is_nhwc else last.flatten(2).transpose(1, 2)
        return self.head(self.trunk.forward_head(last)), tokens

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
        """As ImageTower says, by timm's own method; class and register tokens only from trunks that have them."""
        check_format(output_fmt)
        if not hasattr(self.trunk, "forward_intermediates"):
            raise UserError(f"timm's {type(self.trunk).__name__} gives no intermediates")
        known = inspect.signature(self.trunk.forward_intermediates).parameters
        extra = {"return_prefix_tokens": True} if output_extra_tokens and "return_prefix_tokens" in known else {}
        result = self.trunk.forward_intermediates(
            self._cast(x),
            indices=list(indices) if indices is not None and not isinstance(indices, int) else indices,
            norm=normalize_intermediates,
            stop_early=stop_early and intermediates_only,
            output_fmt="NCHW" if _only_maps(self.trunk) else output_fmt,
            intermediates_only=intermediates_only,
            **extra,
        )
        last, intermediates = (None, result) if intermediates_only else result
        output: dict[str, Tensor | list[Tensor]] = {}
        if intermediates and isinstance(intermediates[0], tuple):
            output["image_intermediates_prefix"] = [prefix for _, prefix in intermediates]
            intermediates = [patches for patches, _ in intermediates]
        if output_fmt == "NLC":
            intermediates = [m.flatten(2).transpose(1, 2) if m.dim() == 4 else m for m in intermediates]
        output["image_intermediates"] = intermediates
        if last is not None:
            output["image_features"] = self.head(self.trunk.forward_head(last))
        return output

    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """Attention weights [B, heads, N, N] of each block, computed eagerly. Raises UserError where there are none."""
        layers: list[Any] = [getattr(block, "attn", None) for block in getattr(self.trunk, "blocks", ())]
        layers = [layer for layer in layers if hasattr(layer, "attn_drop") and hasattr(layer, "fused_attn")]
        if not layers:
            return super().attention_maps(images)
        maps: list[Tensor] = []
        fused = [layer.fused_attn for layer in layers]
        hooks = [layer.attn_drop.register_forward_hook(lambda *given: maps.append(given[-1])) for layer in layers]
        try:
            for layer in layers:
                layer.fused_attn = False
            self.trunk.forward_features(self._cast(images))
        finally:
            for layer, hook, was_fused in zip(layers, hooks, fused, strict=True):
                layer.fused_attn = was_fused
                hook.remove()
        return maps

    def groups(self) -> list[Group]:
        """timm's own groups of the trunk; the projection of `head` is always trained, as in open_clip."""
        named = dict(self.trunk.named_parameters())
        groups = group_parameters(self.trunk, self.trunk.group_matcher())
        return [[named[name] for name in groups[key]] for key in sorted(groups)]

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the trunk but for its last `unlocked_groups` groups; `head` stays trainable."""
        trainable = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        super().lock(unlocked_groups)
        for parameter in trainable:
            parameter.requires_grad_(True)
        if freeze_bn_stats:
            self.freeze_norms([module for module in self.trunk.modules() if _is_locked_norm(module)])

    def remove_projection(self) -> None:
        """Give the trunk's pooled vector [B, W] from now on; attention pooling projects within and stays."""
        self.head = nn.Sequential(OrderedDict((name, m) for name, m in self.head.named_children() if name == "pool"))
        self.trunk.reset_classifier(0)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """By the trunk's own method. Raises UserError where it has none."""
        if not enable and not hasattr(self.trunk, "set_grad_checkpointing"):
            return
        try:
            self.trunk.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError) as error:
            raise UserError(f"timm's {type(self.trunk).__name__} has no gradient checkpointing") from error

    def fit_positions(self, key: str, stored: Tensor) -> Tensor:
        """Absolute positions [1, N, W] of another image size, resized by timm's rule."""
        own = getattr(self.trunk, "pos_embed", None)
        grid = getattr(getattr(self.trunk, "patch_embed", None), "grid_size", None)
        if key != "trunk.pos_embed" or own is None or grid is None or stored.shape == own.shape or stored.dim() != 3:
            return stored
        prefix = 0 if getattr(self.trunk, "no_embed_class", False) else self.trunk.num_prefix_tokens
        return resample_abs_pos_embed(stored, new_size=list(grid), num_prefix_tokens=prefix)

    def _cast(self, images: Tensor) -> Tensor:
        return channels_last(images.to(next(self.trunk.parameters()).dtype))


def _trunk(cfg: CLIPVisionCfg, embed_dim: int) -> Any:
    """open_clip's rule: without a projection of its own the tower projects by the trunk's classifier."""
    name = cfg.timm_model_name
    assert name is not None
    options: dict[str, Any] = {"pretrained": cfg.timm_model_pretrained, **(cfg.timm_kwargs or {})}
    if name.startswith("hf-hub:"):
        patterns = (*CONFIG_FILES, *(WEIGHT_FILES if cfg.timm_model_pretrained else ()))
        name = f"local-dir:{hub_folder(name.removeprefix('hf-hub:'), patterns, ['config.json'])}"
    elif not timm.is_model(name):
        raise UserError(f"timm has no model '{name}' (vision_cfg.timm_model_name): {closest(name, timm.list_models())}")
    elif cfg.timm_model_pretrained:
        options["pretrained_cfg_overlay"] = {"file": str(_pretrained_file(name))}
    if cfg.timm_drop_path is not None:
        options["drop_path_rate"] = cfg.timm_drop_path
    if cfg.patch_dropout > 0:
        options["patch_drop_rate"] = cfg.patch_dropout
    pooled_in_head = cfg.timm_pool in _ATTENTION_POOLS
    if cfg.timm_proj in ("linear", "mlp") or pooled_in_head:
        trunk: Any = timm.create_model(name, **options)
        pool = "" if pooled_in_head else cfg.timm_pool
        trunk.reset_classifier(0, **({"global_pool": pool} if pool or pooled_in_head else {}))
        return trunk
    classes = 0 if cfg.timm_proj == "none" else embed_dim
    return timm.create_model(name, num_classes=classes, global_pool=cfg.timm_pool, **options)


def _pretrained_file(name: str) -> Path:
    """timm's own weights of a trunk, from the cache or the hub. Raises UserError within seconds without a network."""
    found = timm.get_pretrained_cfg(name)
    if found is None or not found.hf_hub_id:
        raise UserError(f"timm has no pretrained weights for '{name}' (vision_cfg.timm_model_pretrained)")
    folder = hub_folder(found.hf_hub_id, WEIGHT_FILES, WEIGHT_FILES)
    return next(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))


def _head_layers(cfg: CLIPVisionCfg, embed_dim: int, trunk: Any) -> "OrderedDict[str, nn.Module]":
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width: int = trunk.num_features
    if cfg.timm_pool in _ATTENTION_POOLS:
        sizes = {"feat_size": trunk.default_cfg["pool_size"]} if cfg.timm_pool == "abs_attn" else {}
        layers["pool"] = _ATTENTION_POOLS[cfg.timm_pool](width, out_features=embed_dim, **sizes)
        width = embed_dim
    if cfg.timm_proj == "linear":
        layers["drop"] = nn.Dropout(cfg.timm_drop)
        layers["proj"] = nn.Linear(width, embed_dim, bias=cfg.timm_proj_bias)
    elif cfg.timm_proj == "mlp":
        bias = (True, cfg.timm_proj_bias)
        layers["mlp"] = Mlp(width, 2 * embed_dim, embed_dim, drop=(cfg.timm_drop, 0), bias=bias)
    return layers


def _is_locked_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) and not any(p.requires_grad for p in module.parameters())


def _only_maps(trunk: Any) -> bool:
    """Convolutional trunks give maps only; we flatten them where tokens are asked for."""
    return "return_prefix_tokens" not in inspect.signature(trunk.forward_intermediates).parameters
