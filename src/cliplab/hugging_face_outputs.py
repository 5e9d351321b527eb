"""What transformers' CLIPModel and SiglipModel return beside embeddings, from our towers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cliplab.models.attention import AttentionMaps
from cliplab.models.image_tower import ImageTower
from cliplab.models.text_transformer import CLIPTextTower, TextTower
from cliplab.models.vision_transformer import VisionTransformer


def image_output(
    visual: ImageTower, pixel_values: Tensor, hidden_states: bool = False, attentions: bool = False
) -> BaseModelOutputWithPooling:
    """Pixels [B, 3, H, W] -> last_hidden_state [B, N, W], projected pooler_output [B, D], and what is asked for.

    `hidden_states`: the blocks' input and outputs; of towers without a list of blocks their stages' outputs.
    """
    if isinstance(visual, VisionTransformer):
        x, maps = visual.embed(pixel_values), AttentionMaps() if attentions else None
        last, states = visual.transformer.forward_intermediates(x, maps=maps)
        return _output(last, visual.project(visual.pool(last)), (x, *states) if hidden_states else None, maps)
    features, tokens = visual.forward_with_tokens(pixel_values)
    states = _states(visual, pixel_values) if hidden_states else None
    return _output(tokens, features, states, visual.attention_maps(pixel_values) if attentions else None)


def _states(visual: ImageTower, pixel_values: Tensor) -> tuple[Any, ...]:
    blocks = getattr(getattr(visual, "trunk", None), "blocks", None)
    first: list[Tensor] = []
    hook = (
        blocks[0].register_forward_pre_hook(lambda _, inputs: first.append(inputs[0])) if blocks is not None else None
    )
    found = visual.forward_intermediates(
        pixel_values, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
    )
    if hook is not None:
        hook.remove()
    tokens, prefix = found["image_intermediates"], found.get("image_intermediates_prefix")
    joined = [torch.cat(pair, dim=1) for pair in zip(prefix, tokens, strict=True)] if prefix else list(tokens)
    return (*first, *joined)


def text_output(
    tower: TextTower,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    hidden_states: bool = False,
    attentions: bool = False,
) -> BaseModelOutputWithPooling:
    """Ids [B, L] -> last_hidden_state [B, L, W], projected pooler_output [B, D], and what is asked for.

    A Hugging Face tower knows its mask and its positions from the ids.
    """
    if not isinstance(tower, CLIPTextTower):
        tokens = tower.encode_embeddings(tower.embed(input_ids), input_ids)
        found = tower.text_intermediates(input_ids, intermediates_only=True) if hidden_states else {}
        maps = tower.text_attention_maps(input_ids) if attentions else None
        states = (tower.embed(input_ids), *found["text_intermediates"]) if found else None
        return _output(tokens, tower.pool(tokens, input_ids), states, maps)
    x, maps = tower.with_positions(tower.embed(input_ids), position_ids), AttentionMaps() if attentions else None
    last, states = tower.transformer.forward_intermediates(
        x, causal=tower.text_causal, key_mask=attention_mask, maps=maps
    )
    tokens = tower.ln_final(last)
    return _output(tokens, tower.pool(tokens, input_ids), (x, *states) if hidden_states else None, maps)


def contrastive_loss(logits: Tensor, sigmoid: bool) -> Tensor:
    """Logits per image [B, B] -> CLIP's symmetric cross-entropy (Radford et al., 2021), or SigLIP's sigmoid loss.

    SigLIP (Zhai et al., 2023): -1/B sum_ij log sigmoid(z_ij logits_ij), z = 1 on the diagonal and -1 elsewhere.
    """
    logits = logits.float()
    if sigmoid:
        signs = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -F.logsigmoid(signs * logits).sum(dim=-1).mean()
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _output(last: Tensor, pooled: Tensor, states: Any, maps: Any) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(
        last_hidden_state=last,  # type: ignore[arg-type]
        pooler_output=pooled,  # type: ignore[arg-type]
        hidden_states=states,
        attentions=tuple(maps) if maps is not None else None,  # type: ignore[arg-type]
    )
