"""Folders of transformers' CLIPModel and SiglipModel, read by `cliplab.load`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

import cliplab
from cliplab.data.geometry import OPENAI_MEAN
from cliplab.errors import UserError
from cliplab.models.checkpoints.hugging_face import architecture_of, preprocess_of, read_config, weight_files
from tests.hugging_face import clip_model, features_of, ids, saved, siglip_model
from tests.oracles import assert_close, assert_same_gradients, gradients, pictures

# int(56 * (115 / 56)) is 114, and so with 61: a plain ratio would build another MLP
AWKWARD = {"hidden_size": 56, "num_attention_heads": 4, "intermediate_size": 115}
CLIPS: dict[str, dict[str, Any]] = {
    "quick_gelu": {},
    "gelu": {"text": {"hidden_act": "gelu"}, "vision": {"hidden_act": "gelu"}},
    "tanh": {"text": {"hidden_act": "gelu_pytorch_tanh"}, "vision": {"hidden_act": "gelu_pytorch_tanh"}},
    "tanh_text": {"text": {"hidden_act": "gelu_new"}, "vision": {"hidden_act": "gelu"}},
    "largest_id": {"text": {"eos_token_id": 2}},
    "smaller_id": {"text": {"eos_token_id": 50}},
    "multiples": {"text": {"intermediate_size": 192}, "vision": {"intermediate_size": 128}},
    "awkward": {"text": AWKWARD, "vision": {**AWKWARD, "intermediate_size": 61}},
    "eps": {"text": {"layer_norm_eps": 1e-2}, "vision": {"layer_norm_eps": 1e-3}},
}
SIGLIPS: dict[str, dict[str, Any]] = {
    "tanh": {},
    "gelu": {"text": {"hidden_act": "gelu"}, "vision": {"hidden_act": "gelu"}},
    "tanh_text": {"vision": {"hidden_act": "gelu"}},
    "multiples": {"text": {"intermediate_size": 192}, "vision": {"intermediate_size": 128}},
    "awkward": {"text": {**AWKWARD, "projection_size": 56}, "vision": {**AWKWARD, "intermediate_size": 61}},
    "text_eps": {"text": {"layer_norm_eps": 1e-5}},
}


def assert_same(ours: Any, theirs: Any, text: torch.Tensor) -> None:
    images = pictures(3, 32)
    expected = features_of(theirs, images, text)
    found = ours.encode_image(images), ours.encode_text(text)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    image_logits, text_logits = ours.get_logits(images, text)
    output = theirs(input_ids=text, pixel_values=images)
    assert_close(image_logits, output.logits_per_image, tolerance=1e-4)
    assert_close(text_logits, output.logits_per_text, tolerance=1e-4)


@pytest.mark.parametrize("kind", CLIPS)
def test_a_clip_models_features_are_transformers(kind: str, tmp_path: Path) -> None:
    theirs = clip_model(**CLIPS[kind])
    ours = cliplab.load(saved(theirs, tmp_path)).model
    text = ids()
    text[:, 4] = text[2, 3] = 50
    text[1, 1] = text[1, 5] = 98  # two end tokens: the first one counts
    assert_same(ours, theirs, text)


@pytest.mark.parametrize("kind", SIGLIPS)
def test_a_siglip_models_features_are_transformers(kind: str, tmp_path: Path) -> None:
    theirs = siglip_model(**SIGLIPS[kind])
    ours = cliplab.load(saved(theirs, tmp_path)).model
    assert_same(ours, theirs, ids())
    assert ours.logit_scale.shape == ours.logit_bias.shape == ()


def test_gradients_are_transformers(tmp_path: Path) -> None:
    theirs = clip_model()
    ours = cliplab.load(saved(theirs, tmp_path)).model
    images, text = pictures(2, 32), ids()
    found = gradients((ours.encode_image(images), ours.encode_text(text)), ours)
    expected = gradients(features_of(theirs, images, text), theirs)
    pairs = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
    for mine, other in pairs.items():
        assert_same_gradients({mine: found[mine].T}, {mine: expected[other]})
    layer = "text_model.encoder.layers.1.self_attn"
    stacked = torch.cat([expected[f"{layer}.{part}_proj.weight"] for part in "qkv"])
    key = "transformer.resblocks.1.attn.in_proj_weight"
    assert_same_gradients({key: found[key]}, {key: stacked})


@pytest.mark.parametrize("make", [clip_model, siglip_model])
def test_attention_maps_are_transformers(make: Any, tmp_path: Path) -> None:
    theirs = make()
    ours = cliplab.load(saved(theirs, tmp_path)).model
    images, text = pictures(2, 32), ids()
    expected = theirs.text_model(input_ids=text, output_attentions=True).attentions
    found = ours.text_tower.text_attention_maps(text)
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, tolerance=1e-6)
    if make is clip_model:
        expected = theirs.vision_model(pixel_values=images, output_attentions=True).attentions
        for one, other in zip(ours.visual.attention_maps(images), expected, strict=True):
            assert_close(one, other, tolerance=1e-6)


def test_a_masked_text_is_transformers(tmp_path: Path) -> None:
    """Left-padded, as its `attention_mask` says; positions are counted from the left of the row in both."""
    theirs = clip_model()
    tower = cliplab.load(saved(theirs, tmp_path)).model.text_tower
    text, mask = ids(), torch.ones(4, 13, dtype=torch.bool)
    mask[1, :4], mask[2, 9:] = False, False
    found = tower.encode_embeddings(tower.embed(text), text, mask)
    expected = theirs.text_model(input_ids=text, attention_mask=mask.long()).last_hidden_state
    assert torch.isfinite(found).all()
    assert_close(found[mask], expected[mask])


# Files


def test_weights_in_parts_and_pickled(tmp_path: Path) -> None:
    theirs = clip_model()
    expected = cliplab.load(saved(theirs, tmp_path / "whole")).model.state_dict()
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len(weight_files(tmp_path / "parts")) > 2
    (tmp_path / "old").mkdir()
    torch.save(load_file(tmp_path / "whole" / "model.safetensors"), tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    for name in ("parts", "old"):
        found = cliplab.load(tmp_path / name).model.state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    weight_files(tmp_path / "parts")[1].unlink()
    with pytest.raises(UserError, match="index.json names parts that are not there: model-00002"):
        cliplab.load(tmp_path / "parts")


def test_old_files_with_position_ids_are_read(tmp_path: Path) -> None:
    theirs = clip_model()
    state = load_file(saved(theirs, tmp_path) / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(13)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(cliplab.load(tmp_path).model, theirs, ids())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "blip"}, "is of a 'blip' model: there are readers for clip"),
        (
            {"text_config.hidden_act": "relu", "vision_config.hidden_act": "gelu"},
            "hidden_act=relu: there is gelu, quick_gelu",
        ),
        ({"text_config.hidden_act": "gelu"}, "one tower.* quick_gelu"),
    ],
    ids=str,
)
def test_configs_that_are_not_built_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = json.loads((saved(clip_model(), tmp_path) / "config.json").read_text())
    for key, value in change.items():
        section, _, option = key.rpartition(".")
        (config[section] if section else config)[option] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        cliplab.load(tmp_path)


def test_configs_are_completed_by_transformers_defaults(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip", "projection_dim": 512}')
    architecture = architecture_of(read_config(tmp_path))
    assert architecture["text_cfg"]["width"] == 512 and architecture["vision_cfg"]["patch_size"] == 32
    assert architecture["quick_gelu"] is True
    siglip = {"model_type": "siglip", "text_config": {}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(siglip))
    architecture = architecture_of(read_config(tmp_path))
    assert architecture["text_cfg"]["context_length"] == 64 and architecture["init_logit_bias"] == -10


# Preprocessing


def test_preprocessing_is_the_folders(tmp_path: Path) -> None:
    config = {"model_type": "clip", "vision_config": {"image_size": 32}}
    standard = preprocess_of(tmp_path, config)
    assert standard == {"size": 32, "crop_rounding": "floor", "resize_mode": "shortest", "interpolation": "bicubic"}
    siglip = preprocess_of(tmp_path, {**config, "model_type": "siglip"})
    assert (siglip["resize_mode"], siglip["mean"], siglip["std"]) == ("squash", (0.5,) * 3, (0.5,) * 3)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=2, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(tmp_path)
    found = preprocess_of(tmp_path, config)
    assert (found["mean"], found["interpolation"], found["resize_mode"]) == ((0.1, 0.2, 0.3), "bilinear", "shortest")
    loaded = cliplab.load(saved(clip_model(), tmp_path))
    assert loaded.preprocess.config.mean == (0.1, 0.2, 0.3) != OPENAI_MEAN


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"resample": 0}, "resample=0 is neither bilinear .* nor bicubic"),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, "resizes to 40 and crops 32"),
    ],
    ids=str,
)
def test_preprocessing_that_is_not_built_is_named(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        preprocess_of(tmp_path, {"model_type": "clip"})
    assert str(tmp_path) in str(error.value)


def test_a_unit_feature_is_transformers_embedding(tmp_path: Path) -> None:
    theirs = clip_model()
    ours = cliplab.load(saved(theirs, tmp_path)).model
    images, text = pictures(2, 32), ids()
    output = theirs(input_ids=text, pixel_values=images)
    image, words, scale = ours(images, text)
    assert_close(image, output.image_embeds)
    assert_close(words, F.normalize(output.text_embeds, dim=-1))
    assert_close(scale, theirs.logit_scale.exp())
