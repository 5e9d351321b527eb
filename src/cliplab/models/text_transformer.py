"""CLIP's text tower; also as a mixin, as open_clip's CLIP keeps its parameters at the root, others under `text.`."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.attention import AttentionMaps
from cliplab.models.image_tower import Group, lock_groups
from cliplab.models.ragged import Ragged
from cliplab.models.seen import draws, is_watched
from cliplab.models.tower_cfg import CLIPTextCfg, text_cfg_of
from cliplab.models.transformer import Indices, Transformer, activation_of, norm_of


class TextTower(nn.Module):
    """Everything that handles text: `embed`, `encode_embeddings`, `pool`. Reached through `model.text_tower`.

    The three steps are apart so that a composer can put a pseudo-word in place of a token embedding (Pic2Word).
    """

    context_length: int
    vocab_size: int
    text_width: int  # of token embeddings
    text_blocks: int | None = None  # how many can be run one by one

    @property
    def rows_are_independent(self) -> bool:
        """Whether equal texts always get equal features: no dropout."""
        return not any(module.training for module in self.modules())

    def embed(self, text: Tensor) -> Tensor:
        """Token ids [B, L] -> token embeddings [B, L, W], without positions."""
        raise NotImplementedError

    def encode_embeddings(self, embeddings: Tensor, text: Tensor | None = None) -> Tensor:
        """Token embeddings [B, L, W] -> contextual tokens [B, L, W]; towers that mask padding need the ids `text`."""
        raise NotImplementedError

    def pool(self, tokens: Tensor, text: Tensor) -> Tensor:
        """Contextual tokens [B, L, W], ids [B, L] -> projected features [B, D]."""
        raise NotImplementedError

    def forward_text(self, text: Tensor) -> Tensor:
        """Token ids [B, L] -> features [B, D], not unit length."""
        return self.features(self.embed(text), text)

    def features(self, embeddings: Tensor, text: Tensor) -> Tensor:
        """Token embeddings [B, L, W], ids [B, L] -> features [B, D]: both steps, without padding."""
        return self.pool(self.encode_embeddings(embeddings, text), text)

    def text_intermediates(
        self,
        text: Tensor,
        indices: Indices = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
    ) -> dict[str, Tensor | list[Tensor]]:
        """`text_intermediates`: outputs [B, L, W] of the blocks `indices`; and `text_features` unless only those.

        `stop_early` spares the blocks above the last wanted one where no features are wanted.
        """
        raise NotImplementedError

    def text_attention_maps(self, text: Tensor) -> list[Tensor]:
        """Attention weights [B, heads, L, L] of each block, computed eagerly."""
        raise NotImplementedError

    def text_parameters(self) -> list[nn.Parameter]:
        """The parameters of the text tower alone."""
        return list(self.parameters())

    def text_groups(self) -> list[Group]:
        """Modules and parameters from the input to the output, as far as they belong to a layer."""
        raise NotImplementedError

    def lock_text(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze all but the last `unlocked_layers` groups."""
        raise NotImplementedError

    def set_text_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        raise NotImplementedError

    def remove_projection(self) -> None:
        """Give the pooled vector [B, W] instead of features [B, D] from now on."""
        raise NotImplementedError


class CLIPTextTower(TextTower):
    """The mixin: parameters at the module's own root, created by `build_text`."""

    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    transformer: Transformer
    ln_final: nn.Module
    text_projection: nn.Parameter | nn.Linear | None

    @property
    def rows_are_independent(self) -> bool:
        """As TextTower says: nothing is drawn here but what an adapter's dropout draws."""
        return not draws(self.transformer)

    def build_text(self, cfg: CLIPTextCfg, embed_dim: int, quick_gelu: bool) -> None:
        """Create the parameters with CLIP's initialisation."""
        width, norm = cfg.width, norm_of(cfg.norm_kwargs)
        self.context_length, self.vocab_size = cfg.context_length, cfg.vocab_size
        self.text_width, self.text_blocks = width, cfg.layers
        self.text_pool_type, self.text_eos_id, self.text_causal = cfg.pool_type, cfg.eos_id, not cfg.no_causal_mask
        activation = activation_of(quick_gelu, cfg.act_kwargs)
        self.transformer = Transformer(width, cfg.layers, cfg.heads, cfg.mlp_ratio, activation, norm, cfg.ls_init_value)
        self.token_embedding = nn.Embedding(cfg.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(cfg.context_length, width))
        self.ln_final = norm(width)
        self.text_projection = None
        if cfg.proj_type == "linear":
            bias = cfg.proj_bias
            self.text_projection = nn.Linear(width, embed_dim) if bias else nn.Parameter(torch.empty(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for parameter in self._projection_parameters():
            nn.init.normal_(parameter, std=width**-0.5) if parameter.dim() == 2 else nn.init.zeros_(parameter)
        self.transformer.initialize()

    def embed(self, text: Tensor) -> Tensor:
        """Token ids [B, L] -> token embeddings [B, L, W], without positions."""
        return self.token_embedding(text).to(self.transformer.dtype)

    def encode_embeddings(
        self,
        embeddings: Tensor,
        text: Tensor | None = None,
        key_mask: Tensor | None = None,
        maps: AttentionMaps | None = None,
    ) -> Tensor:
        """Token embeddings [B, L, W] -> contextual tokens after ln_final [B, L, W].

        Padding is not masked, in SigLIP neither: a causal tower never sees it, SigLIP was trained with it. `key_mask`
        bool [B, L] says otherwise, as Hugging Face's `attention_mask` does.
        """
        x = self.with_positions(embeddings)
        return self.ln_final(self.transformer(x, self.text_causal, key_mask, maps))

    def features(self, embeddings: Tensor, text: Tensor) -> Tensor:
        """As TextTower says. Towers that see what follows the end of a text, or pool elsewhere, compute all of it."""
        whole = not self.text_causal or is_watched(self.transformer, self.ln_final)
        ends = None if whole else self.ends(text)
        if ends is None:
            return self.pool(self.encode_embeddings(embeddings, text), text)
        ragged = Ragged(ends)
        x = ragged.pack(self.with_positions(embeddings))
        pooled = self.transformer.forward_at(x, ragged.last, causal=True, ragged=ragged)
        return self.project(self.ln_final(pooled))

    def ends(self, text: Tensor) -> Tensor | None:
        """Ids [B, L] -> the pooled position int64 [B]; None where that is not the end of the text.

        `argmax` is CLIP's rule: the end token has the largest id, and argmax returns its first position. `eos` looks
        for the id itself, which is right also where ids were added above it.
        """
        if self.text_pool_type == "argmax":
            return text.argmax(-1)
        return (text == self.text_eos_id).int().argmax(-1) if self.text_pool_type == "eos" else None

    def pool(self, tokens: Tensor, text: Tensor) -> Tensor:
        """Contextual tokens [B, L, W], ids [B, L] -> projected features [B, D]."""
        return self.project(self.pool_tokens(tokens, text))

    def pool_tokens(self, tokens: Tensor, text: Tensor) -> Tensor:
        """Contextual tokens [B, L, W], ids [B, L] -> the pooled token [B, W]."""
        ends = self.ends(text)
        if ends is not None:
            return tokens[torch.arange(len(text), device=text.device), ends]
        if self.text_pool_type == "none":
            return tokens
        return tokens[:, 0] if self.text_pool_type == "first" else tokens[:, -1]

    def project(self, pooled: Tensor) -> Tensor:
        """[B, W] -> [B, D]; unchanged without a projection."""
        if self.text_projection is None:
            return pooled
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(pooled)
        return pooled @ self.text_projection

    def text_intermediates(
        self,
        text: Tensor,
        indices: Indices = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
    ) -> dict[str, Tensor | list[Tensor]]:
        """As TextTower says."""
        x = self.with_positions(self.embed(text))
        stop = stop_early and intermediates_only
        last, tokens = self.transformer.forward_intermediates(x, indices, stop, self.text_causal)
        output: dict[str, Tensor | list[Tensor]] = {
            "text_intermediates": [self.ln_final(t) for t in tokens] if normalize_intermediates else tokens
        }
        if not intermediates_only:
            output["text_features"] = self.pool(self.ln_final(last), text)
        return output

    def text_attention_maps(self, text: Tensor) -> list[Tensor]:
        """Attention weights [B, heads, L, L] of each block, computed eagerly."""
        maps = AttentionMaps()
        self.encode_embeddings(self.embed(text), text, maps=maps)
        return maps

    def text_parameters(self) -> list[nn.Parameter]:
        """The parameters of the text tower alone."""
        modules = (self.transformer, self.token_embedding, self.ln_final)
        own = [self.positional_embedding, *self._projection_parameters()]
        return [*own, *(p for m in modules for p in m.parameters())]

    def text_groups(self) -> list[Group]:
        """Embeddings, each block but the last, the last block with ln_final, the projection: layers + 2."""
        blocks = list(self.transformer.resblocks)
        top = [self.text_projection] if self.text_projection is not None else []
        embedding = [self.token_embedding, self.positional_embedding]
        return [embedding, *([block] for block in blocks[:-1]), [blocks[-1], self.ln_final], *([top] if top else [])]

    def lock_text(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze all but the last `unlocked_layers` groups; norms are frozen with their block.

        Raises UserError for `freeze_layer_norm=False`, which only Hugging Face towers know.
        """
        if not freeze_layer_norm:
            raise UserError("freeze_layer_norm=False is for Hugging Face text towers; here norms belong to their block")
        lock_groups(self.text_parameters(), self.text_groups(), unlocked_layers)

    def remove_projection(self) -> None:
        """Give the pooled vector [B, W] instead of features [B, D] from now on."""
        self.text_projection = None

    def set_text_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.transformer.grad_checkpointing = enable

    def with_positions(self, embeddings: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """[B, L, W] plus positions 0 to L - 1, or `position_ids` int64 [B, L]. Raises UserError for too long text."""
        length = embeddings.shape[1]
        if length > self.context_length:
            raise UserError(f"{length} tokens are longer than the text tower's context of {self.context_length}")
        positions = (
            self.positional_embedding[:length] if position_ids is None else self.positional_embedding[position_ids]
        )
        return embeddings + positions.to(embeddings.dtype)

    def _projection_parameters(self) -> list[nn.Parameter]:
        projection = self.text_projection
        return (
            list(projection.parameters())
            if isinstance(projection, nn.Linear)
            else [projection]
            if projection is not None
            else []
        )


class TextTransformer(CLIPTextTower):
    """The text tower on its own: `text` of CustomTextCLIP."""

    def __init__(self, cfg: CLIPTextCfg | Mapping[str, Any], embed_dim: int, quick_gelu: bool = False) -> None:
        super().__init__()
        cfg = text_cfg_of(cfg)
        self.output_dim = embed_dim
        self.build_text(cfg, embed_dim, quick_gelu)

    def forward(self, text: Tensor) -> Tensor:
        """Token ids [B, L] -> features [B, D], not unit length."""
        return self.forward_text(text)

    lock = CLIPTextTower.lock_text
    set_grad_checkpointing = CLIPTextTower.set_text_checkpointing


def resize_text_positions(stored: Tensor, length: int) -> Tensor:
    """Positions [L, W] -> [length, W]: linear without antialias, open_clip's rule."""
    resized = F.interpolate(stored.float().T[None], size=length, mode="linear", align_corners=False)
    return resized[0].T.to(stored.dtype).contiguous()
