"""Folders written for transformers: its own classes load them, and give our features and our ids."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import cliplab
from cliplab.errors import UserError
from tests.hugging_face import clip_model, features_of, ids, saved, siglip_model
from tests.oracles import TEXT, VIT, assert_close, perturb, pictures, sentences

SIGLIP_TEXT = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "tanh": {
        "vision_cfg": {"act_kwargs": {"approximate": "tanh"}},
        "text_cfg": {"act_kwargs": {"approximate": "tanh"}},
    },
    "eps": {"vision_cfg": {"norm_kwargs": {"eps": 0.01}}, "text_cfg": {"norm_kwargs": {"eps": 0.02}}},
    "eos": {"text_cfg": {"pool_type": "eos", "eos_id": 7}},
    "custom_text": {"custom_text": True},
}


def load_config(config: dict[str, Any], folder: Path) -> Any:
    (folder / "a.json").write_text(json.dumps(config))
    loaded = cliplab.load(folder / "a.json")
    perturb(loaded.model)
    return loaded


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_clip_model_gives_our_features(variant: str, tmp_path: Path) -> None:
    changes = VARIANTS[variant]
    config = {"embed_dim": 20, **changes}
    config |= {
        "vision_cfg": {**VIT, **changes.get("vision_cfg", {})},
        "text_cfg": {**TEXT, **changes.get("text_cfg", {})},
    }
    model = load_config(config, tmp_path).model
    theirs = transformers.CLIPModel.from_pretrained(cliplab.save(model, tmp_path / "hf", "hugging_face")).eval()
    images, text = pictures(2, 32), sentences(3, 11, 60)
    text[:, 1] = 7
    for found, expected in zip(
        features_of(theirs, images, text), (model.encode_image(images), model.encode_text(text)), strict=True
    ):
        assert_close(found, expected)
    assert_close(theirs.logit_scale, model.logit_scale)
    again = cliplab.load(tmp_path / "hf").model
    assert all(torch.equal(v, again.state_dict()[k.removeprefix("text.")]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("make", [clip_model, siglip_model])
def test_there_and_back_every_bit_is_kept(make: Any, tmp_path: Path) -> None:
    theirs = make()
    loaded = cliplab.load(saved(theirs, tmp_path / "theirs"))
    folder = cliplab.save(loaded.model, tmp_path / "ours", "hugging_face")
    expected, found = (load_file(path / "model.safetensors") for path in (tmp_path / "theirs", folder))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].shape == expected[key].shape for key in expected)
    again = type(theirs).from_pretrained(folder).eval()
    images, text = pictures(2, 32), ids()
    for one, other in zip(features_of(again, images, text), features_of(theirs, images, text), strict=True):
        assert_close(one, other)
    third = cliplab.load(folder)
    architectures = [one.model.architecture for one in (third, loaded)]
    for architecture in architectures:  # each has its tokenizer in its own folder
        architecture["text_cfg"].pop("hf_tokenizer_name")
    assert architectures[0] == architectures[1]
    assert third.preprocess.config == loaded.preprocess.config


def test_open_clips_siglip_for_transformers(tmp_path: Path) -> None:
    trunk = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    vision = {
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_pool": "map",
        "timm_proj": "none",
        "image_size": 32,
    }
    config = {"embed_dim": 24, "vision_cfg": {**vision, "timm_kwargs": trunk}, "text_cfg": {**TEXT, **SIGLIP_TEXT}}
    config |= {"custom_text": True, "init_logit_bias": -10.0}
    model = load_config(config, tmp_path).model
    theirs = transformers.SiglipModel.from_pretrained(cliplab.save(model, tmp_path / "hf", "hugging_face")).eval()
    images, text = pictures(2, 32), sentences(3, 11, 60)
    for found, expected in zip(
        features_of(theirs, images, text), (model.encode_image(images), model.encode_text(text)), strict=True
    ):
        assert_close(found, expected)
    assert theirs.logit_bias.shape == (1,)


@pytest.mark.parametrize(
    "resize", [{}, {"resize_mode": "squash"}, {"interpolation": "bilinear", "mean": (0.1, 0.2, 0.3)}], ids=str
)
def test_the_processor_is_our_preprocessing(resize: dict[str, Any], tmp_path: Path) -> None:
    """Of even margins: with odd ones the crops of open_clip and transformers differ by a pixel."""
    model = load_config({"embed_dim": 20, "vision_cfg": VIT, "text_cfg": TEXT}, tmp_path).model
    model.visual.preprocess_cfg = {**model.visual.preprocess_cfg, **resize}
    folder = cliplab.save(model, tmp_path / "hf", "hugging_face")
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    preprocess = cliplab.load(folder).preprocess
    assert preprocess.config.crop_rounding == "floor"
    for size in ((64, 48), (48, 64), (32, 32), (67, 40), (40, 67)):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        expected = processor(picture, return_tensors="pt").pixel_values[0]
        assert (preprocess(picture) - expected).abs().max() < 1e-5


def test_the_vocabulary_is_clips(tmp_path: Path) -> None:
    config = {"embed_dim": 20, "vision_cfg": VIT, "text_cfg": {**TEXT, "vocab_size": 49408, "context_length": 16}}
    loaded = load_config(config, tmp_path)
    folder = cliplab.save(loaded.model, tmp_path / "hf", "hugging_face")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    texts = [
        "Hello World!",
        "a photo of a cat",
        "",
        "l'été is  naïve 123",
        "is " + "very " * 40 + "long",
        "don't; x-ray",
    ]
    found = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    ours = loaded.tokenizer(texts)
    assert found.shape == ours.shape == (6, 16)
    assert torch.equal(torch.where(found == 49407, 0, found), torch.where(ours == 49407, 0, ours)), (
        "but for the padding"
    )
    assert torch.equal((found == 49407).int().argmax(1), (ours == 49407).int().argmax(1))
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    assert_close(features_of(theirs, pictures(1, 32), found)[1], loaded.model.encode_text(ours))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"vision_cfg": {"pool_type": "avg"}}, "vision_cfg.pool_type=avg"),
    ({"vision_cfg": {"no_ln_pre": True}}, "vision_cfg.no_ln_pre=True"),
    ({"vision_cfg": {"ls_init_value": 0.1}}, "vision_cfg.ls_init_value=0.1"),
    ({"text_cfg": {"pool_type": "last"}}, "text_cfg.pool_type=last"),
    ({"text_cfg": {"no_causal_mask": True}}, "text_cfg.no_causal_mask=True"),
    ({"text_cfg": {"proj_bias": True}}, "text_cfg.proj_bias=True"),
    ({"init_logit_bias": -10.0}, "logit_bias"),
    ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}}, "the format hugging_face .*ViT .*SigLIP"),
    ({"vision_cfg": {"timm_model_name": "test_vit", "image_size": 160}}, "the format hugging_face .*ViT .*SigLIP"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_transformers_has_no_words_for_is_refused_and_nothing_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = {"embed_dim": 20, **changes}
    config |= {
        "vision_cfg": {**VIT, **changes.get("vision_cfg", {})},
        "text_cfg": {**TEXT, **changes.get("text_cfg", {})},
    }
    model = load_config(config, tmp_path).model
    with pytest.raises(UserError, match=message):
        cliplab.save(model, tmp_path / "hf", "hugging_face")
    assert not (tmp_path / "hf").exists()


def test_a_resize_without_words_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = load_config({"embed_dim": 20, "vision_cfg": VIT, "text_cfg": TEXT}, tmp_path).model
    model.visual.preprocess_cfg = {**model.visual.preprocess_cfg, "resize_mode": "longest"}
    with pytest.raises(UserError, match="resize_mode=longest"):
        cliplab.save(model, tmp_path / "hf", "hugging_face")
    assert not (tmp_path / "hf").exists()
