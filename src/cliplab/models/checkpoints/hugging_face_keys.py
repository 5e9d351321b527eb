"""Key maps between open_clip's state dicts and those of transformers' CLIPModel and SiglipModel, in both directions."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cliplab.errors import UserError


@dataclass(frozen=True)
class Rule:
    """Tensors of ours that hold the same numbers as tensors of theirs.

    `form`: same; transpose; batch (ours has a leading axis of 1); stack (cut and joined along the first axis; a pair of
    ours is q and kv, one and two thirds).
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: str = "same"


_BLOCK = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc"}
_BLOCK |= {"mlp.fc2": "mlp.c_proj"}
_TIMM_BLOCK = {"self_attn.out_proj": "attn.proj", "layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1"}
_TIMM_BLOCK |= {"mlp.fc2": "mlp.fc2"}


def is_hugging_face(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of transformers' CLIP or SigLIP, whole or one tower."""
    return any(key.startswith(("text_model.", "vision_model.")) for key in state_dict)


def to_open_clip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' keys -> open_clip's; keys that belong to neither are kept as they are, to be reported."""
    left = {key: value for key, value in state_dict.items() if not key.endswith("position_ids")}
    converted: dict[str, Tensor] = {}
    for rule in _rules(left, is_siglip="vision_model.head.probe" in left or "text_model.head.weight" in left):
        if all(key in left for key in rule.theirs):
            theirs = [left.pop(key) for key in rule.theirs]
            converted |= zip(rule.ours, _convert(theirs, rule.form, len(rule.ours), to_ours=True), strict=True)
    return {**left, **converted}


def from_open_clip(state_dict: Mapping[str, Tensor], is_siglip: bool) -> dict[str, Tensor]:
    """open_clip's keys -> transformers'. Raises UserError naming keys that have no place there."""
    left, converted = dict(state_dict), {}
    for rule in _rules(left, is_siglip):
        if all(key in left for key in rule.ours):
            ours = [left.pop(key) for key in rule.ours]
            converted |= zip(rule.theirs, _convert(ours, rule.form, len(rule.theirs), to_ours=False), strict=True)
    if left:
        names = ", ".join(sorted(left)[:3])
        raise UserError(f"Hugging Face's model has no place for {len(left)} tensors of this one: {names}, ...")
    return converted


def _convert(tensors: list[Tensor], form: str, parts: int, to_ours: bool) -> list[Tensor]:
    if form == "transpose":
        return [tensors[0].T.contiguous()]
    if form == "batch":
        return [tensors[0][None] if to_ours else tensors[0][0]]
    if form == "stack":
        joined = torch.cat(tensors)
        third = len(joined) // 3
        sizes = {1: [len(joined)], 2: [third, len(joined) - third], 3: [third] * 3}[parts]
        return [part.contiguous() for part in joined.split(sizes)]
    return tensors


def _rules(keys: Mapping[str, Tensor], is_siglip: bool) -> Iterator[Rule]:
    """The rules of all blocks that `keys`, ours or theirs, have."""
    yield from _siglip_rules() if is_siglip else _clip_rules()
    text, vision = ("text.", "visual.trunk.blocks") if is_siglip else ("", "visual.transformer.resblocks")
    for number in _blocks(keys, "text_model.encoder.layers", f"{text}transformer.resblocks"):
        yield from _block_rules(f"{text}transformer.resblocks.{number}", f"text_model.encoder.layers.{number}", _BLOCK)
    names = _TIMM_BLOCK if is_siglip else _BLOCK
    for number in _blocks(keys, "vision_model.encoder.layers", vision):
        yield from _block_rules(f"{vision}.{number}", f"vision_model.encoder.layers.{number}", names)


def _blocks(keys: Mapping[str, Tensor], *prefixes: str) -> list[int]:
    pattern = re.compile(rf"^(?:{'|'.join(re.escape(prefix) for prefix in prefixes)})\.(\d+)\.")
    return sorted({int(match[1]) for match in map(pattern.match, keys) if match})


def _block_rules(ours: str, theirs: str, names: Mapping[str, str]) -> Iterator[Rule]:
    packed = "attn.qkv." if names is _TIMM_BLOCK else "attn.in_proj_"
    for kind in ("weight", "bias"):
        apart = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
        yield Rule((f"{ours}.{packed}{kind}",), apart, "stack")
    for their_name, our_name in names.items():
        yield from _pairs(f"{ours}.{our_name}", f"{theirs}.{their_name}")


def _pairs(ours: str, theirs: str) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield Rule((f"{ours}.{kind}",), (f"{theirs}.{kind}",))


def _text_rules(prefix: str) -> Iterator[Rule]:
    embeddings = "text_model.embeddings"
    yield Rule((f"{prefix}token_embedding.weight",), (f"{embeddings}.token_embedding.weight",))
    yield Rule((f"{prefix}positional_embedding",), (f"{embeddings}.position_embedding.weight",))
    yield from _pairs(f"{prefix}ln_final", "text_model.final_layer_norm")


def _clip_rules() -> Iterator[Rule]:
    yield Rule(("logit_scale",), ("logit_scale",))
    yield from _text_rules("")
    yield Rule(("text_projection",), ("text_projection.weight",), "transpose")
    yield Rule(("visual.proj",), ("visual_projection.weight",), "transpose")
    yield Rule(("visual.class_embedding",), ("vision_model.embeddings.class_embedding",))
    yield Rule(("visual.positional_embedding",), ("vision_model.embeddings.position_embedding.weight",))
    yield Rule(("visual.conv1.weight",), ("vision_model.embeddings.patch_embedding.weight",))
    yield from _pairs("visual.ln_pre", "vision_model.pre_layrnorm")  # transformers' own spelling
    yield from _pairs("visual.ln_post", "vision_model.post_layernorm")


def _siglip_rules() -> Iterator[Rule]:
    yield Rule(("logit_scale",), ("logit_scale",))
    yield Rule(("logit_bias",), ("logit_bias",))
    yield from _text_rules("text.")
    yield from _pairs("text.text_projection", "text_model.head")
    trunk, theirs = "visual.trunk", "vision_model"
    yield from _pairs(f"{trunk}.patch_embed.proj", f"{theirs}.embeddings.patch_embedding")
    yield Rule((f"{trunk}.pos_embed",), (f"{theirs}.embeddings.position_embedding.weight",), "batch")
    yield from _pairs(f"{trunk}.norm", f"{theirs}.post_layernorm")
    yield Rule((f"{trunk}.attn_pool.latent",), (f"{theirs}.head.probe",))
    for kind in ("weight", "bias"):
        parts = (f"{trunk}.attn_pool.q.{kind}", f"{trunk}.attn_pool.kv.{kind}")
        yield Rule(parts, (f"{theirs}.head.attention.in_proj_{kind}",), "stack")
    yield from _pairs(f"{trunk}.attn_pool.proj", f"{theirs}.head.attention.out_proj")
    yield from _pairs(f"{trunk}.attn_pool.norm", f"{theirs}.head.layernorm")
    for layer in ("fc1", "fc2"):
        yield from _pairs(f"{trunk}.attn_pool.mlp.{layer}", f"{theirs}.head.mlp.{layer}")
