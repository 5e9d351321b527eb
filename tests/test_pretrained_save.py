"""What a saved model keeps, and what a format has no words for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, CLIPModel, DistilBertConfig, SiglipModel

import cliplab
from cliplab import UserError
from tests.hugging_face import features_of, saved, siglip_model
from tests.oracles import TEXT, VIT, assert_close, perturb, pictures

TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "image_size": 64}


def small(embed_dim: int = 16, text: dict[str, Any] | None = None, **options: Any) -> cliplab.CLIP:
    model = cliplab.CLIP(embed_dim, VIT, {**TEXT, **(text or {})}, **options)
    perturb(model)
    return model.eval()


@pytest.mark.parametrize("last", ["open_clip", "hugging_face"])
def test_a_folder_holds_the_model_that_was_saved_last(last: str, tmp_path: Path) -> None:
    other = "hugging_face" if last == "open_clip" else "open_clip"
    cliplab.save(small(16), tmp_path, format=other)
    cliplab.save(small(24), tmp_path, format=last)
    assert cliplab.load(tmp_path).model.embed_dim == 24
    assert (tmp_path / "config.json").exists() == (last == "hugging_face")


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "gelu_pytorch_tanh"])
def test_the_activation_of_siglip_goes_both_ways(activation: str, tmp_path: Path) -> None:
    theirs = siglip_model({"hidden_act": activation}, {"hidden_act": activation})
    model = cliplab.load(saved(theirs, tmp_path / "theirs")).model
    images, text = pictures(2, 32), torch.randint(0, 99, (2, 13))
    again = SiglipModel.from_pretrained(cliplab.save(model, tmp_path / "ours", format="hugging_face")).eval()
    for oracle in (theirs, again):
        expected = features_of(oracle, images, text)
        assert_close(model.encode_image(images), expected[0])
        assert_close(model.encode_text(text), expected[1])


def test_a_temperature_of_one_element_becomes_a_scalar(tmp_path: Path) -> None:
    model = small(nonscalar_logit_scale=True)
    theirs = CLIPModel.from_pretrained(cliplab.save(model, tmp_path, format="hugging_face"))
    assert theirs.logit_scale.shape == () and theirs.logit_scale.item() == model.logit_scale.item()


def test_preprocessing_is_that_of_the_model_and_kept(tmp_path: Path) -> None:
    first = cliplab.load(cliplab.save(small(), tmp_path / "a", format="hugging_face"))
    assert first.preprocess.config.size == 32 and first.preprocess.config.crop_rounding == "floor"
    second = cliplab.load(cliplab.save(first.model, tmp_path / "b"))
    assert second.preprocess.config == first.preprocess.config


def test_a_hugging_face_text_tower_takes_its_config_along(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    BertConfig(**sizes, vocab_size=60).save_pretrained(tmp_path / "bert")
    model = cliplab.CustomTextCLIP(16, VIT, {"hf_model_name": str(tmp_path / "bert")}).eval()
    folder = cliplab.save(model, tmp_path / "saved")
    shutil.rmtree(tmp_path / "bert")
    text = torch.randint(1, 60, (2, 9))
    assert torch.equal(cliplab.load(folder).model.encode_text(text), model.encode_text(text))


def test_a_tokenizer_in_a_local_folder_goes_along(tmp_path: Path) -> None:
    theirs = saved(siglip_model(), tmp_path / "theirs")
    (theirs / "tokenizer.json").write_text("{}")
    cliplab.save(cliplab.load(theirs).model, tmp_path / "ours", format="hugging_face")
    assert (tmp_path / "ours" / "tokenizer.json").is_file()


REFUSED: list[tuple[Any, str, str]] = [
    (lambda: small(text={"pool_type": "eos"}), "hugging_face", "eos_id=2"),
    (lambda: cliplab.CLIP(16, TIMM, TEXT), "open_clip", "pictures of 224 alone"),
    (lambda: cliplab.load("ViT-B-32", device="meta").model, "open_clip", "no weights to save"),
    (small, "keras", "unknown format 'keras'"),
    (lambda: torch.nn.Linear(2, 2), "open_clip", "got Linear"),
]


@pytest.mark.parametrize(("make", "form", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_a_format_cannot_hold_is_refused(make: Any, form: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        cliplab.save(make(), tmp_path / "saved", format=form)
    assert not (tmp_path / "saved").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"can't write {tmp_path / 'file'}"):
        cliplab.save(small(), tmp_path / "file")


class TestWhatBelongsToTheWeights:
    def test_the_activation_of_a_folder_can_not_be_overridden(self, tmp_path: Path) -> None:
        folder = cliplab.save(small(), tmp_path)
        with pytest.raises(UserError, match="quick_gelu=True contradicts"):
            cliplab.load(folder, quick_gelu=True)
        assert not cliplab.load(folder, quick_gelu=False).model.quick_gelu

    def test_a_folder_as_weights_brings_norms_and_activations(self, tmp_path: Path) -> None:
        model = small(text={"norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}}, quick_gelu=False)
        folder = cliplab.save(model, tmp_path / "saved")
        (tmp_path / "plain.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}))
        text = torch.randint(1, 59, (2, 11))
        found = cliplab.load(tmp_path / "plain.json", folder).model.encode_text(text)
        assert torch.equal(found, model.encode_text(text))


def test_encoders_without_a_pooling_layer(tmp_path: Path) -> None:
    DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, vocab_size=60).save_pretrained(tmp_path)
    options = {"hf_model_name": str(tmp_path), "hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"}
    model = cliplab.CustomTextCLIP(16, VIT, options).eval()
    text = torch.randint(1, 60, (2, 9))
    tokens = model.text.transformer(input_ids=text).last_hidden_state
    torch.testing.assert_close(model.encode_text(text), model.text.proj(tokens[:, 0]))
