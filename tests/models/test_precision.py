from typing import Any

import open_clip.model
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cliplab.errors import UserError
from cliplab.models.clip import build_clip
from cliplab.models.precision import PRECISIONS, cast
from cliplab.models.transformer import LayerNorm
from tests.oracles import MODIFIED_RESNET, TEXT, TIMM_VIT, VIT, make_pair, open_clip_model, pictures, sentences

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SIGLIP = {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
KINDS: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": VIT, "text_cfg": TEXT, "init_logit_bias": -1.0},
    "layer_scale": {"vision_cfg": {**VIT, "ls_init_value": 0.5}, "text_cfg": TEXT},
    "resnet": {"vision_cfg": MODIFIED_RESNET, "text_cfg": TEXT},
    "custom_text": {"vision_cfg": VIT, "text_cfg": TEXT, "custom_text": True},
    "siglip": {"vision_cfg": VIT, "text_cfg": SIGLIP, "custom_text": True},
    "timm": {"vision_cfg": {**TIMM_VIT, "timm_model_name": "test_vit", "image_size": 160}, "text_cfg": TEXT},
}


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {key: value.dtype for key, value in model.state_dict().items()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["vit", "layer_scale", "resnet", "custom_text"])
def test_the_same_tensors_as_open_clips_are_in_half_precision(kind: str, precision: str) -> None:
    ours, theirs = make_pair({"embed_dim": 20, **KINDS[kind]})
    cast(ours, precision)
    open_clip.model.convert_weights_to_lp(theirs, DTYPES[precision])
    assert dtypes(ours) == dtypes(theirs)
    assert {torch.float32, DTYPES[precision]} <= set(dtypes(ours).values())
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())


def test_a_published_size_has_195_of_302() -> None:
    config = open_clip.get_model_config("ViT-B-32")
    with torch.device("meta"):
        ours, theirs = build_clip(config), open_clip_model(config)
    cast(ours, "fp16")
    open_clip.model.convert_weights_to_lp(theirs)
    low = [key for key, dtype in dtypes(ours).items() if dtype == torch.float16]
    assert (len(low), len(dtypes(ours))) == (195, 302)
    assert dtypes(ours) == dtypes(theirs)


@pytest.mark.parametrize("precision", ["pure_bf16", "pure_fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_pure_is_all(kind: str, precision: str) -> None:
    ours, _ = make_pair({"embed_dim": 20, **KINDS[kind]})
    cast(ours, precision)
    found = {dtype for key, dtype in dtypes(ours).items() if "num_batches" not in key}
    assert found == {DTYPES[precision.removeprefix("pure_")]}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_bf16", "pure_fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_stay_close(kind: str, precision: str) -> None:
    ours, _ = make_pair({"embed_dim": 20, **KINDS[kind]})
    images, text = pictures(4, KINDS[kind]["vision_cfg"]["image_size"]), sentences(4, 11, 60)
    expected = ours.encode_image(images), ours.encode_text(text)
    cast(ours, precision)
    found = ours.encode_image(images), ours.encode_text(text)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == DTYPES[precision.removeprefix("pure_")]
        assert not torch.equal(one.float(), other)
        assert F.cosine_similarity(one.float(), other).min() > 0.999
    image, words, scale, *_ = ours(images, text)
    assert torch.isfinite(image).all() and torch.isfinite(words).all() and torch.isfinite(scale)
    maps = ours.forward_intermediates(images, text, normalize_intermediates=True)
    assert all(torch.isfinite(m).all() for m in (*maps["image_intermediates"], *maps["text_intermediates"]))


@pytest.mark.parametrize("kind", ["vit", "custom_text"])
def test_features_in_bf16_are_open_clips(kind: str) -> None:
    """With its LayerNormFp32, which `cast_dtype` chooses: norms in fp32 between products in bf16."""
    ours, theirs = make_pair({"embed_dim": 20, "cast_dtype": torch.bfloat16, **KINDS[kind]})
    cast(ours, "bf16")
    open_clip.model.convert_weights_to_lp(theirs, torch.bfloat16)
    images, text = pictures(4, 32), sentences(4, 11, 60)
    for found, expected in (
        (ours.encode_image(images), theirs.encode_image(images.bfloat16())),
        (ours.encode_text(text), theirs.encode_text(text)),
    ):
        assert (found.float() - expected.float()).abs().max() <= 0.02 * expected.float().abs().max()


def test_norms_keep_their_statistics_in_fp32() -> None:
    x = (40_000 + 20_000 * torch.randn(3, 48)).clamp(-60_000, 60_000).half()  # the sum of squares is beyond fp16
    normed = LayerNorm(48)(x)
    assert normed.dtype == torch.float16 and torch.isfinite(normed).all()
    assert (normed.float() - F.layer_norm(x.float(), (48,))).abs().max() < 0.01


@pytest.mark.parametrize(
    ("weights", "given"), [("float32", "float16"), ("bfloat16", "float32"), ("float64", "float32")]
)
def test_a_norm_gives_back_the_precision_it_is_given(weights: str, given: str) -> None:
    norm = LayerNorm(8).to(getattr(torch, weights))
    x = torch.randn(2, 8, dtype=getattr(torch, given))
    assert norm(x).dtype == x.dtype
    assert (norm(x).float() - F.layer_norm(x.float(), (8,))).abs().max() < 0.02


def test_fp32_takes_everything_back() -> None:
    ours, _ = make_pair({"embed_dim": 20, **KINDS["vit"]})
    for precision in ("pure_fp16", "fp32"):
        cast(ours, precision)
    assert set(dtypes(ours).values()) == {torch.float32}


def test_an_unknown_precision_is_told_the_closest() -> None:
    assert PRECISIONS == ("fp32", "bf16", "fp16", "pure_bf16", "pure_fp16")
    with pytest.raises(UserError, match="unknown precision 'bf61'.*did you mean 'bf16'"):
        cast(nn.Identity(), "bf61")
