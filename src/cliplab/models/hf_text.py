"""Any Hugging Face encoder as a text tower: `transformer` with the keys of transformers, `proj` on top."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from cliplab.errors import UserError
from cliplab.models.checkpoints.hub import CONFIG_FILES, WEIGHT_FILES, hub_folder
from cliplab.models.image_tower import Group, lock_groups
from cliplab.models.seen import is_watched
from cliplab.models.text_transformer import TextTower
from cliplab.models.tower_cfg import CLIPTextCfg, text_cfg_of
from cliplab.models.transformer import Indices, taken_indices
from cliplab.registry import closest

OWN_POOLERS = {"bert": "cls_pooler", "m2m_100": "cls_pooler"}  # where a config names none: open_clip's, else the mean
# Encoders whose tokens see nothing of the padding behind them: it is cut off. Others may fold, shift or pad it.
BLIND_TO_PADDING = {"albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "m2m_100", "modernbert"}
BLIND_TO_PADDING |= {"mpnet", "mt5", "roberta", "t5", "xlm-roberta"}
POOLERS = ("mean_pooler", "max_pooler", "cls_pooler", "cls_last_hidden_state_pooler")


class HFTextTower(TextTower):
    """Tokens that differ from the encoder's padding id are read, pooled and projected."""

    def __init__(self, cfg: CLIPTextCfg | Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        cfg = text_cfg_of(cfg)
        if cfg.hf_pooler_type is not None and cfg.hf_pooler_type not in POOLERS:
            hint = closest(cfg.hf_pooler_type, POOLERS)
            raise UserError(f"unknown text_cfg.hf_pooler_type '{cfg.hf_pooler_type}': {hint}")
        self.transformer, self.config, self.pooler_type = _encoder(cfg)
        self.output_dim, self.context_length = embed_dim, cfg.context_length
        self.vocab_size: int = getattr(self.config, "vocab_size", cfg.vocab_size)
        self.text_width = int(self.transformer.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        self.proj = _projection(cfg.hf_proj_type, self.config.hidden_size, embed_dim)

    def forward(self, text: Tensor) -> Tensor:
        """Token ids [B, L] -> features [B, D], not unit length."""
        return self.forward_text(text)

    def forward_text(self, text: Tensor) -> Tensor:
        """Token ids [B, L] -> features [B, D], not unit length."""
        text = self._without_padding(text)
        return self.pool(self._run(text).last_hidden_state, text)

    def _without_padding(self, text: Tensor) -> Tensor:
        """[B, L] -> [B, longest text], where that changes nothing; hooks of the encoder are to see all tokens."""
        if self.config.model_type not in BLIND_TO_PADDING or is_watched(self.transformer):
            return text
        read = self.attention_mask(text).any(dim=0).nonzero()
        return text[:, : int(read.max()) + 1] if len(read) else text

    def embed(self, text: Tensor) -> Tensor:
        """Token ids [B, L] -> token embeddings [B, L, W], without positions."""
        return self.transformer.get_input_embeddings()(text)  # type: ignore[operator]

    def encode_embeddings(self, embeddings: Tensor, text: Tensor | None = None) -> Tensor:
        """Token embeddings [B, L, W] -> contextual tokens [B, L, W]; padding is known from the ids `text` [B, L]."""
        mask = self.attention_mask(text) if text is not None else None
        return self.transformer(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state

    def attention_mask(self, text: Tensor) -> Tensor:
        """Ids [B, L] -> int64 [B, L], 0 for padding."""
        padding = self.config.pad_token_id
        return (text != padding).long() if padding is not None else torch.ones_like(text)

    def pool(self, tokens: Tensor, text: Tensor) -> Tensor:
        """Contextual tokens [B, L, W], ids [B, L] -> projected features [B, D]."""
        mask = self.attention_mask(text)[..., None]
        if self.pooler_type == "mean_pooler":
            pooled = (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)
        elif self.pooler_type == "max_pooler":
            pooled = tokens.masked_fill(mask == 0, -torch.inf).amax(1)
        elif self.pooler_type == "cls_pooler" and getattr(self.transformer, "pooler", None) is not None:
            pooler = self.transformer.pooler
            if isinstance(pooler, nn.Linear):  # ALBERT's, which leaves the choice of the token to others
                pooled = self.transformer.pooler_activation(pooler(tokens[:, 0]))  # type: ignore[operator]
            else:
                pooled = pooler(tokens)  # type: ignore[operator]
        else:
            pooled = tokens[:, 0]
        return self.proj(pooled)

    def text_intermediates(
        self,
        text: Tensor,
        indices: Indices = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
    ) -> dict[str, Tensor | list[Tensor]]:
        """As TextTower says; transformers runs all layers, and has no final norm that is applied apart."""
        output = self._run(text, output_hidden_states=True)
        layers = output.hidden_states[1:]
        taken = taken_indices(len(layers), indices)
        result: dict[str, Tensor | list[Tensor]] = {"text_intermediates": [layers[index] for index in sorted(taken)]}
        if not intermediates_only:
            result["text_features"] = self.pool(output.last_hidden_state, text)
        return result

    def text_attention_maps(self, text: Tensor) -> list[Tensor]:
        """Attention weights [B, heads, L, L] of each layer. Raises UserError unless the tower attends eagerly."""
        maps = self._run(text, output_attentions=True).attentions
        if not maps or maps[0] is None:
            raise UserError("a Hugging Face text tower gives attention maps with attention=eager only")
        return list(maps)

    def text_groups(self) -> list[Group]:
        """Embeddings and each layer of the encoder; `proj` belongs to none."""
        layers = next(module for module in self.transformer.modules() if isinstance(module, nn.ModuleList))
        embeddings = getattr(self.transformer, "embeddings", None) or self.transformer.get_input_embeddings()  # type: ignore[operator]
        return [[embeddings], *([layer] for layer in layers)]

    def lock_text(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the encoder but for its last `unlocked_layers` layers; `proj` stays trainable, as in open_clip.

        `freeze_layer_norm=False` leaves the norms of the frozen layers trainable.
        """
        modules: list[nn.Module] = [module for (module,) in self.text_groups()]  # type: ignore[misc]
        if unlocked_layers < 0:
            raise UserError(f"can't leave {unlocked_layers} layers unlocked: give 0 or more")
        locked = [self.transformer] if unlocked_layers == 0 else modules[:-unlocked_layers]
        for module in locked:
            lock_groups(module.parameters(), [], 0)
            norms = [m for m in module.modules() if "norm" in type(m).__name__.lower()] if not freeze_layer_norm else []
            for parameter in (p for norm in norms for p in norm.parameters()):
                parameter.requires_grad_(True)

    def set_text_checkpointing(self, enable: bool = True) -> None:
        """By the encoder's own method."""
        switch = "gradient_checkpointing_enable" if enable else "gradient_checkpointing_disable"
        getattr(self.transformer, switch)()

    def remove_projection(self) -> None:
        """Give the pooled vector [B, W] instead of features [B, D] from now on."""
        self.proj = nn.Identity()

    lock = lock_text
    set_grad_checkpointing = set_text_checkpointing

    def _run(self, text: Tensor, **options: Any) -> Any:
        return self.transformer(input_ids=text, attention_mask=self.attention_mask(text), **options)


def _encoder(cfg: CLIPTextCfg) -> tuple[nn.Module, Any, str]:
    """The encoder (of an encoder-decoder its encoder alone), its config and its pooler; no remote code is run."""
    assert cfg.hf_model_name is not None
    files = [*CONFIG_FILES, *(WEIGHT_FILES if cfg.hf_model_pretrained else ())]
    folder = hub_folder(cfg.hf_model_name, files, WEIGHT_FILES if cfg.hf_model_pretrained else ["config.json"])
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        pooler = cfg.hf_pooler_type or OWN_POOLERS.get(config.model_type, "mean_pooler")
        options = {"local_files_only": True} if cfg.hf_model_pretrained else {}
        build = partial(AutoModel.from_pretrained if cfg.hf_model_pretrained else AutoModel.from_config, **options)
        source = folder if cfg.hf_model_pretrained else config
        try:  # not every encoder has a pooling layer that could be left out
            model = build(source, trust_remote_code=False, add_pooling_layer=pooler == "cls_pooler")
        except TypeError:
            model = build(source, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        lines = (str(error) or type(error).__name__).splitlines()
        reason = lines[-1 if isinstance(error, StrictDataclassError) else 0].strip()
        raise UserError(
            f"can't build the text tower of {cfg.hf_model_name} (text_cfg.hf_model_name): {reason}"
        ) from error
    return (model.encoder if config.is_encoder_decoder else model), config, pooler


def _projection(kind: str | None, width: int, embed_dim: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(width, embed_dim, bias=False)
    if kind == "mlp":
        hidden = (width + embed_dim) // 2
        first, second = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, embed_dim, bias=False)
        return nn.Sequential(first, nn.GELU(), second)
    if kind:
        raise UserError(f"text_cfg.hf_proj_type must be mlp, linear or null, got '{kind}'")
    if width != embed_dim:
        raise UserError(f"text_cfg.hf_proj_type=null: the encoder's width {width} must equal embed_dim {embed_dim}")
    return nn.Identity()
