"""The dual encoder of CLIP (Radford et al., 2021), with open_clip's constructors, methods and state-dict keys."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.image_tower import ImageTower, check_format
from cliplab.models.text_transformer import CLIPTextTower, TextTower, TextTransformer
from cliplab.models.tower_cfg import CLIPTextCfg, CLIPVisionCfg, mapping_of, text_cfg_of, vision_cfg_of
from cliplab.models.transformer import Indices
from cliplab.models.vision_transformer import VisionTransformer

VisionCfg = CLIPVisionCfg | Mapping[str, Any]
TextCfg = CLIPTextCfg | Mapping[str, Any]
SIGLIP_BIAS, SIGLIP_SCALE = -10.0, 10.0  # initially (Zhai et al., 2023)


class DualEncoder(nn.Module):
    """An image tower `visual` and a text tower. Features are not unit length unless `normalize`."""

    visual: ImageTower
    text_cfg: CLIPTextCfg
    logit_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: VisionCfg,
        quick_gelu: bool = False,
        init_logit_scale: float = math.log(1 / 0.07),
        init_logit_bias: float | None = None,
        nonscalar_logit_scale: bool = False,
        output_dict: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(embed_dim, int) or embed_dim < 1 or not isinstance(quick_gelu, bool):
            raise UserError(f"embed_dim must be 1 or more and quick_gelu a bool, got {embed_dim!r} and {quick_gelu!r}")
        self.embed_dim, self.quick_gelu, self.output_dict = embed_dim, quick_gelu, output_dict
        self.vision_cfg = vision_cfg_of(vision_cfg)
        self.visual = image_tower(self.vision_cfg, embed_dim, quick_gelu)
        shape = [1] if nonscalar_logit_scale else []
        self.logit_scale = nn.Parameter(torch.full(shape, float(init_logit_scale)))
        bias = nn.Parameter(torch.full(shape, float(init_logit_bias))) if init_logit_bias is not None else None
        self.register_parameter("logit_bias", bias)
        self._scalars: dict[str, Any] = {"init_logit_bias": init_logit_bias} if init_logit_bias is not None else {}
        self._scalars |= {"nonscalar_logit_scale": True} if nonscalar_logit_scale else {}

    @property
    def text_tower(self) -> TextTower:
        """The module that handles text: the model itself, or its `text`."""
        raise NotImplementedError

    @property
    def architecture(self) -> dict[str, Any]:
        """What rebuilds this model, in open_clip's form: the content of a model_cfg."""
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": mapping_of(replace(self.vision_cfg, timm_model_pretrained=False)),
            "text_cfg": mapping_of(replace(self.text_cfg, hf_model_pretrained=False)),
            **({"quick_gelu": True} if self.quick_gelu else {}),
            **({"custom_text": True} if isinstance(self, CustomTextCLIP) else {}),
            **self._scalars,
        }

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Normalised images [B, 3, H, W] -> features [B, D]."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Token ids [B, L] -> features [B, D]."""
        features = self.text_tower.forward_text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W], ids [C, L] -> logits per image [B, C] and per text [C, B]: scale * cosine + bias."""
        logits = self.logits(self.encode_image(image, True), self.encode_text(text, True))
        return logits, logits.T

    def forward(
        self, image: Tensor | None = None, text: Tensor | None = None
    ) -> dict[str, Tensor | None] | tuple[Tensor | None, ...]:
        """Unit image features [B, D], unit text features [B, D], exp(logit_scale), and logit_bias where there is one.

        A tuple, or with `output_dict` a mapping; None for what was not given.
        """
        image_features = self.encode_image(image, True) if image is not None else None
        text_features = self.encode_text(text, True) if text is not None else None
        scale = self.logit_scale.exp()
        if self.output_dict:
            output = {"image_features": image_features, "text_features": text_features, "logit_scale": scale}
            return output if self.logit_bias is None else {**output, "logit_bias": self.logit_bias}
        outputs = (image_features, text_features, scale)
        return outputs if self.logit_bias is None else (*outputs, self.logit_bias)

    def forward_intermediates(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        image_indices: Indices = None,
        text_indices: Indices = None,
        stop_early: bool = False,
        normalize: bool = True,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        image_output_fmt: str = "NCHW",
        image_output_extra_tokens: bool = False,
        text_output_fmt: str = "NLC",
        text_output_extra_tokens: bool = False,
        output_logits: bool = False,
        output_logit_scale_bias: bool = False,
    ) -> dict[str, Tensor | list[Tensor]]:
        """Block outputs of both towers, and their features unless `intermediates_only`.

        Keys: `image_intermediates` (see `ImageTower.forward_intermediates`), `image_intermediates_prefix`,
        `image_features` [B, D], `text_intermediates` (each [B, L, W]), `text_features` [B, D], `image_logits`,
        `text_logits`, `logit_scale`, `logit_bias`. Indices: None all blocks, n the last n, a list those. Text has no
        extra tokens: the end token is one of its tokens.
        """
        check_format(text_output_fmt, ("NLC",))
        output: dict[str, Any] = {}
        shared = (stop_early, normalize_intermediates, intermediates_only)
        if output_logits and not intermediates_only and (image is None or text is None):
            raise UserError("output_logits needs both image and text")
        if image is not None:
            fmt = (image_output_fmt, image_output_extra_tokens)
            output |= self.visual.forward_intermediates(image, image_indices, *shared, *fmt)
        if text is not None:
            output |= self.text_tower.text_intermediates(text, text_indices, *shared)
        for key in ("image_features", "text_features") if normalize else ():
            if key in output:
                output[key] = F.normalize(output[key], dim=-1)
        if output_logits and not intermediates_only:
            output["image_logits"] = self.logits(output["image_features"], output["text_features"])
            output["text_logits"] = output["image_logits"].T
        if output_logit_scale_bias:
            output["logit_scale"] = self.logit_scale.exp()
            output |= {"logit_bias": self.logit_bias} if self.logit_bias is not None else {}
        return output

    def add_logit_bias(self, is_trained: bool) -> None:
        """SigLIP's learned bias of the logits where there is none, initially -10; the architecture then says so.

        A model that is not trained yet also gets SigLIP's scale, initially 10.
        """
        if self.logit_bias is not None:
            return
        self.logit_bias = nn.Parameter(torch.full_like(self.logit_scale.detach(), SIGLIP_BIAS))
        self._scalars["init_logit_bias"] = SIGLIP_BIAS
        if not is_trained:
            nn.init.constant_(self.logit_scale, math.log(SIGLIP_SCALE))

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the image tower but for its last groups (LiT, Zhai et al., 2022)."""
        self.visual.lock(unlocked_groups, freeze_bn_stats)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the text tower but for its last groups; temperature and bias stay trainable."""
        self.text_tower.lock_text(unlocked_layers, freeze_layer_norm)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of both towers in the backward pass instead of keeping them."""
        self.visual.set_grad_checkpointing(enable)
        self.text_tower.set_text_checkpointing(enable)

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Unit features [B, D], [C, D] -> scale * cosine + bias [B, C]."""
        logits = self.logit_scale.exp().to(image_features.dtype) * image_features @ text_features.T
        return logits if self.logit_bias is None else logits + self.logit_bias


class CLIP(DualEncoder, CLIPTextTower):
    """The text tower's parameters lie at the root: OpenAI's layout.

    `cast_dtype` is open_clip's and needs nothing here: norms always compute in the precision of their weights.
    """

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: VisionCfg,
        text_cfg: TextCfg,
        quick_gelu: bool = False,
        init_logit_scale: float = math.log(1 / 0.07),
        init_logit_bias: float | None = None,
        nonscalar_logit_scale: bool = False,
        cast_dtype: torch.dtype | None = None,
        output_dict: bool = False,
    ) -> None:
        options = (init_logit_scale, init_logit_bias, nonscalar_logit_scale, output_dict)
        super().__init__(embed_dim, vision_cfg, quick_gelu, *options)
        self.text_cfg = text_cfg_of(text_cfg)
        if self.text_cfg.hf_model_name:
            raise UserError("a Hugging Face text tower (text_cfg.hf_model_name) needs CustomTextCLIP")
        self.build_text(self.text_cfg, embed_dim, quick_gelu)

    @property
    def text_tower(self) -> TextTower:
        """The model itself."""
        return self


class CustomTextCLIP(DualEncoder):
    """The text tower is the module `text`: CLIP's, SigLIP's or one of Hugging Face."""

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: VisionCfg,
        text_cfg: TextCfg,
        quick_gelu: bool = False,
        init_logit_scale: float = math.log(1 / 0.07),
        init_logit_bias: float | None = None,
        nonscalar_logit_scale: bool = False,
        cast_dtype: torch.dtype | None = None,
        output_dict: bool = False,
    ) -> None:
        options = (init_logit_scale, init_logit_bias, nonscalar_logit_scale, output_dict)
        super().__init__(embed_dim, vision_cfg, quick_gelu, *options)
        self.text_cfg = text_cfg_of(text_cfg)
        self.text = text_tower(self.text_cfg, embed_dim, quick_gelu)
        self.context_length, self.vocab_size = self.text.context_length, self.text.vocab_size

    @property
    def text_tower(self) -> TextTower:
        """The module `text`."""
        return self.text


def image_tower(vision_cfg: VisionCfg, embed_dim: int, quick_gelu: bool) -> ImageTower:
    """The image tower that `vision_cfg` describes."""
    cfg = vision_cfg_of(vision_cfg)
    if cfg.timm_model_name:
        from cliplab.models.timm_tower import TimmTower  # importing timm takes a second: only where it is used

        return TimmTower(cfg, embed_dim)
    if isinstance(cfg.layers, tuple):
        from cliplab.models.modified_resnet import ModifiedResNet

        return ModifiedResNet(cfg, embed_dim)
    return VisionTransformer(cfg, embed_dim, quick_gelu)


def text_tower(text_cfg: TextCfg, embed_dim: int, quick_gelu: bool) -> TextTower:
    """The text tower that `text_cfg` describes, as a module of its own."""
    cfg = text_cfg_of(text_cfg)
    if cfg.hf_model_name:
        from cliplab.models.hf_text import HFTextTower  # as above, for transformers

        return HFTextTower(cfg, embed_dim)
    return TextTransformer(cfg, embed_dim, quick_gelu)


def build_clip(architecture: Mapping[str, Any]) -> CLIP | CustomTextCLIP:
    """The model of an architecture in open_clip's form. Raises UserError for CoCa and for options that can't be."""
    architecture = dict(architecture)
    custom = architecture.pop("custom_text", False) or bool(architecture["text_cfg"].get("hf_model_name"))
    if "multimodal_cfg" in architecture:
        raise UserError("CoCa (multimodal_cfg) isn't built here: it needs a text decoder; use a dual encoder")
    return (CustomTextCLIP if custom else CLIP)(**architecture)
