from typing import Any

import pytest
import torch
from torch import Tensor

from cliplab.errors import UserError
from cliplab.models.checkpoints.hugging_face_keys import from_open_clip, is_hugging_face, to_open_clip
from cliplab.models.clip import build_clip
from tests.hugging_face import clip_model, siglip_model

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8, "mlp_ratio": 90.5 / 32}
TEXT = {"context_length": 13, "vocab_size": 99, "width": 48, "heads": 3, "layers": 2, "mlp_ratio": 79.5 / 48}
SIGLIP_VISION = {
    "timm_model_name": "vit_base_patch16_siglip_224",
    "timm_pool": "map",
    "timm_proj": "none",
    "image_size": 32,
}
TRUNK = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 90.5 / 32}


def keys_of_ours(is_siglip: bool) -> dict[str, torch.Size]:
    config: dict[str, Any] = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    if is_siglip:
        vision = {**SIGLIP_VISION, "timm_kwargs": TRUNK}
        text = {**TEXT, "no_causal_mask": True, "proj_bias": True}
        config = {
            "embed_dim": 32,
            "vision_cfg": vision,
            "text_cfg": text,
            "custom_text": True,
            "init_logit_bias": -10.0,
        }
        config["nonscalar_logit_scale"] = True
    with torch.device("meta"):
        return {key: value.shape for key, value in build_clip(config).state_dict().items()}


@pytest.mark.parametrize("is_siglip", [False, True])
def test_every_key_has_its_place_and_comes_back_bit_by_bit(is_siglip: bool) -> None:
    theirs = (siglip_model() if is_siglip else clip_model()).state_dict()
    ours = to_open_clip(theirs)
    assert {key: value.shape for key, value in ours.items()} == keys_of_ours(is_siglip)
    back = from_open_clip(ours, is_siglip)
    expected = {key: value for key, value in theirs.items() if not key.endswith("position_ids")}
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], expected[key]) for key in expected)
    assert sum(value.numel() for value in ours.values()) == sum(value.numel() for value in expected.values())


def test_q_k_and_v_are_packed_in_this_order() -> None:
    theirs = clip_model().state_dict()
    ours = to_open_clip(theirs)
    for number, part in enumerate("qkv"):
        for kind in ("weight", "bias"):
            packed = ours[f"visual.transformer.resblocks.1.attn.in_proj_{kind}"]
            expected = theirs[f"vision_model.encoder.layers.1.self_attn.{part}_proj.{kind}"]
            assert torch.equal(packed[32 * number : 32 * (number + 1)], expected)


def test_the_probes_query_and_its_keys_and_values() -> None:
    theirs = siglip_model().state_dict()
    ours = to_open_clip(theirs)
    packed = theirs["vision_model.head.attention.in_proj_weight"]
    assert torch.equal(ours["visual.trunk.attn_pool.q.weight"], packed[:32])
    assert torch.equal(ours["visual.trunk.attn_pool.kv.weight"], packed[32:])
    positions = theirs["vision_model.embeddings.position_embedding.weight"]
    assert torch.equal(ours["visual.trunk.pos_embed"][0], positions)


def test_projections_are_transposed_in_clip_and_not_in_siglip() -> None:
    theirs, ours = clip_model().state_dict(), to_open_clip(clip_model().state_dict())
    assert torch.equal(ours["visual.proj"], theirs["visual_projection.weight"].T)
    assert ours["visual.proj"].is_contiguous()
    theirs, ours = siglip_model().state_dict(), to_open_clip(siglip_model().state_dict())
    assert torch.equal(ours["text.text_projection.weight"], theirs["text_model.head.weight"])


def test_keys_that_belong_to_neither_are_kept_to_be_reported() -> None:
    theirs: dict[str, Tensor] = clip_model().state_dict()
    ours = to_open_clip(
        {**theirs, "adapter.weight": torch.ones(1), "text_model.embeddings.position_ids": torch.ones(1)}
    )
    assert ours.keys() - to_open_clip(theirs).keys() == {"adapter.weight"}
    lone = {k: v for k, v in theirs.items() if not k.endswith("layers.0.self_attn.k_proj.weight")}
    assert "vision_model.encoder.layers.0.self_attn.q_proj.weight" in to_open_clip(lone), (
        "an incomplete three is no pack"
    )


def test_what_transformers_has_no_place_for_is_named() -> None:
    ours = to_open_clip(clip_model().state_dict())
    with pytest.raises(UserError, match="no place for 2 tensors of this one: logit_bias, zeta"):
        from_open_clip({**ours, "zeta": torch.ones(1), "logit_bias": torch.ones(())}, is_siglip=False)


def test_whose_keys_they_are() -> None:
    theirs = clip_model().state_dict()
    assert is_hugging_face(theirs) and is_hugging_face(siglip_model().state_dict())
    assert not is_hugging_face(to_open_clip(theirs))
    assert is_hugging_face({"text_model.final_layer_norm.weight": torch.ones(1)})
