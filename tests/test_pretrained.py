"""load and save, as users call them: round trips with open_clip, precision, devices, runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import cliplab
from cliplab.errors import UserError
from tests.conftest import TINY
from tests.oracles import (
    MODIFIED_RESNET,
    TEXT,
    TIMM_VIT,
    VIT,
    assert_close,
    assert_same_output,
    open_clip_model,
    perturb,
    pictures,
    sentences,
)

SIGLIP_TEXT = {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": VIT, "text_cfg": TEXT},
    "quick_gelu": {"vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    "variants": {
        "vision_cfg": {**VIT, "pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True, "ls_init_value": 0.1},
        "text_cfg": {**TEXT, "act_kwargs": {"approximate": "tanh"}, "ls_init_value": 0.2, "proj_bias": True},
        "nonscalar_logit_scale": True,
    },
    "custom_text": {"vision_cfg": VIT, "text_cfg": SIGLIP_TEXT, "custom_text": True, "init_logit_bias": -10},
    "resnet": {"vision_cfg": {**MODIFIED_RESNET, "image_size": 32}, "text_cfg": TEXT, "quick_gelu": True},
    "timm": {"vision_cfg": {**TIMM_VIT, "timm_model_name": "test_vit", "image_size": 160}, "text_cfg": TEXT},
}


def config_file(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "arch.json").write_text(json.dumps(config))
    return folder / "arch.json"


def theirs_of(kind: str, folder: Path) -> tuple[Any, Path, Path]:
    """open_clip's model, its architecture and its weights as files."""
    config = {"embed_dim": 20, **MODELS[kind]}
    torch.manual_seed(0)
    model = open_clip_model(config).eval()
    perturb(model)
    torch.save({"state_dict": model.state_dict()}, folder / "epoch_1.pt")
    return model, config_file(folder, config), folder / "epoch_1.pt"


@pytest.mark.parametrize("kind", MODELS)
def test_from_open_clip_and_back_every_bit_is_kept(kind: str, tmp_path: Path) -> None:
    theirs, architecture, weights = theirs_of(kind, tmp_path)
    loaded = cliplab.load(architecture, weights)
    folder = cliplab.save(loaded.model, tmp_path / "saved")
    again = open_clip.create_model(f"local-dir:{folder}").eval()
    ours = cliplab.load(folder).model
    expected = theirs.state_dict()
    for found in (again.state_dict(), ours.state_dict(), load_file(folder / "open_clip_model.safetensors")):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], v) and found[k].shape == v.shape for k, v in expected.items())
    size = MODELS[kind]["vision_cfg"]["image_size"]
    images, text = pictures(2, tuple(size) if isinstance(size, list) else size), sentences(3, 11, 60)
    with torch.no_grad():
        for found in (again(images, text), ours(images, text)):
            assert_same_output(found, theirs(images, text))
    assert type(again) is type(theirs)
    assert ours.architecture == loaded.model.architecture


@pytest.mark.parametrize(
    "options",
    [{}, {"interpolation": "bilinear", "mean": (0.5, 0.5, 0.5)}, {"resize_mode": "squash"}, {"resize_mode": "longest"}],
    ids=str,
)
def test_the_preprocessing_of_a_saved_folder_is_open_clips(options: dict[str, Any], tmp_path: Path) -> None:
    loaded = cliplab.load(config_file(tmp_path, TINY))
    loaded.model.visual.preprocess_cfg |= options
    folder = cliplab.save(loaded.model, tmp_path / "saved")
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    ours = cliplab.load(folder).preprocess
    for size in ((50, 37), (37, 51), (32, 32)):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        assert_close(ours(picture), theirs(picture), tolerance=1e-6)


def test_the_tokenizer_of_a_saved_folder_is_open_clips(tmp_path: Path) -> None:
    folder = cliplab.save(cliplab.load(config_file(tmp_path, TINY)).model, tmp_path / "saved")
    texts = ["a red dress", "is " + "very " * 40 + "long"]
    assert torch.equal(cliplab.load(folder).tokenizer(texts), open_clip.get_tokenizer(f"local-dir:{folder}")(texts))


def test_saving_again_replaces_what_is_there(tmp_path: Path) -> None:
    model = cliplab.load(config_file(tmp_path, TINY)).model
    cliplab.save(model, tmp_path / "saved")
    with torch.no_grad():
        model.logit_scale += 1
    cliplab.save(model, tmp_path / "saved")
    assert cliplab.load(tmp_path / "saved").model.logit_scale == model.logit_scale


def test_save_takes_dual_encoders_and_two_formats(tmp_path: Path) -> None:
    model = cliplab.load(config_file(tmp_path, TINY)).model
    with pytest.raises(UserError, match="unknown format 'openclip': did you mean 'open_clip'"):
        cliplab.save(model, tmp_path / "saved", "openclip")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="got VisionTransformer"):
        cliplab.save(model.visual, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_fine_tuned_model_of_bf16_is_saved_as_it_is(tmp_path: Path) -> None:
    model = cliplab.load(config_file(tmp_path, TINY), precision="bf16").model
    folder = cliplab.save(model, tmp_path / "saved")
    stored = load_file(folder / "open_clip_model.safetensors")
    assert {str(v.dtype) for v in stored.values()} == {"torch.bfloat16", "torch.float32"}
    again = cliplab.load(folder).model
    assert {p.dtype for p in again.parameters()} == {torch.float32}, "loaded, all is fp32 unless asked otherwise"
    assert torch.equal(again.visual.proj, model.visual.proj.float())


# Options


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("pure_fp16", torch.float16), ("fp32", torch.float32)]
)
def test_precision(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = cliplab.load(config_file(tmp_path, TINY), precision=precision).model
    assert model.visual.proj.dtype == dtype and not model.training
    assert model.logit_scale.dtype == (dtype if precision.startswith("pure") else torch.float32)


def test_attention(tmp_path: Path) -> None:
    model = cliplab.load(config_file(tmp_path, TINY), attention="eager").model
    assert model.transformer.resblocks[0].attn.attention_implementation == "eager"
    with pytest.raises(UserError, match="unknown attention 'flas'"):
        cliplab.load(config_file(tmp_path, TINY), attention="flas")


def test_another_image_size_and_context_are_open_clips(tmp_path: Path) -> None:
    theirs, architecture, weights = theirs_of("vit", tmp_path)
    loaded = cliplab.load(architecture, weights, image_size=48, context_length=7)
    config = {"embed_dim": 20, "vision_cfg": {**VIT, "image_size": 48}, "text_cfg": {**TEXT, "context_length": 7}}
    expected, other = dict(theirs.state_dict()), open_clip_model(config).eval()
    open_clip.model.resize_pos_embed(expected, other)
    open_clip.model.resize_text_pos_embed(expected, other)
    other.load_state_dict(expected)
    images, text = pictures(2, 48), sentences(3, 7, 60)
    with torch.no_grad():
        assert_same_output(loaded.model(images, text), other(images, text))
    assert loaded.preprocess.config.size == 48 and loaded.tokenizer(["a"]).shape == (1, 7)


@pytest.mark.parametrize("kind", ["resnet", "timm"])
def test_another_image_size_where_open_clip_has_no_rule(kind: str, tmp_path: Path) -> None:
    """A timm trunk resizes as timm's own method does; a ResNet's pooling as a ViT's positions."""
    theirs, architecture, weights = theirs_of(kind, tmp_path)
    size = {"resnet": 96, "timm": 192}[kind]
    model = cliplab.load(architecture, weights, image_size=size).model
    found = model.encode_image(pictures(1, size))
    assert torch.isfinite(found).all()
    if kind == "timm":
        theirs.visual.set_input_size(size)
        assert_close(found, theirs.encode_image(pictures(1, size)))


def test_the_meta_device_reads_and_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, architecture, weights = theirs_of("vit", tmp_path)
    folder = cliplab.save(cliplab.load(architecture, weights).model, tmp_path / "saved")
    (folder / "open_clip_model.safetensors").write_text("not read")
    for name, tag in ((str(folder), None), ("ViT-B-32", "openai")):
        model = cliplab.load(name, tag, device="meta").model
        assert all(value.is_meta for value in model.state_dict().values())
    assert model.quick_gelu is True


def test_names() -> None:
    assert cliplab.available_models() == [
        *("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"),
        *("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"),
    ]
    supported = cliplab.supported_architectures()
    assert {name for name in open_clip.list_models() if not name.startswith("coca")} <= set(supported)
    assert "ViT-tiny-8-64" in supported and not any("coca" in name for name in supported)


# Nothing but the files that were named


def test_a_local_path_opens_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    import transformers

    theirs, architecture, weights = theirs_of("vit", tmp_path)
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_tokenizer_name": str(tmp_path / "bert"), "context_length": 9}
    transformers.BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3).save_pretrained(
        tmp_path / "bert"
    )
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]))
    (tmp_path / "bert" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (tmp_path / "hf.json").write_text(json.dumps({"embed_dim": 20, "vision_cfg": VIT, "text_cfg": text}))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("no connection is needed")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    loaded = cliplab.load(architecture, weights)
    for kind in ("open_clip", "hugging_face"):
        folder = cliplab.save(loaded.model, tmp_path / kind, kind)  # type: ignore[arg-type]
        again = cliplab.load(folder)
        assert torch.equal(again.model.visual.proj, theirs.visual.proj)
    with_bert = cliplab.load(tmp_path / "hf.json")
    assert with_bert.tokenizer(["a cat", "cat"])[:, :4].tolist() == [[2, 5, 6, 3], [2, 6, 3, 0]]
    assert with_bert.model.encode_text(with_bert.tokenizer(["a cat"])).shape == (1, 20)
    folder = cliplab.save(with_bert.model, tmp_path / "saved_bert")
    assert cliplab.load(folder).model.encode_text(with_bert.tokenizer(["a cat"])).shape == (1, 20)
