import json
import math
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F

from cliplab.errors import UserError
from cliplab.models.clip import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, build_clip
from tests.oracles import MODIFIED_RESNET, TIMM_VIT, assert_same_model, assert_same_output, open_clip_model
from tests.oracles import make_pair as make_oracle_pair

VISION = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16, "mlp_ratio": 3.3}
TEXT = {"context_length": 11, "vocab_size": 60, "width": 32, "heads": 2, "layers": 3, "mlp_ratio": 2.5}


def make_pair(quick_gelu: bool) -> tuple[CLIP, open_clip.CLIP]:
    """Ours and open_clip's with open_clip's random weights, biases and norms disturbed."""
    torch.manual_seed(0)
    config: dict[str, Any] = {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": quick_gelu}
    ours, theirs = CLIP(**config), open_clip.CLIP(**config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 59, (5, 11), generator=generator)
    for row, end in enumerate((2, 4, 6, 8, 10)):
        text[row, end], text[row, end + 1 :] = 59, 0
    return torch.randn(5, 3, 32, 32, generator=generator), text


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_state_dicts_are_interchangeable(quick_gelu: bool) -> None:
    ours, theirs = make_pair(quick_gelu)
    assert shapes(ours) == shapes(theirs)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_features_and_gradients_are_open_clips(quick_gelu: bool) -> None:
    ours, theirs = make_pair(quick_gelu)
    images, text = inputs()
    for normalize in (False, True):
        torch.testing.assert_close(
            ours.encode_image(images, normalize), theirs.encode_image(images, normalize), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            ours.encode_text(text, normalize), theirs.encode_text(text, normalize), rtol=0, atol=1e-5
        )
    losses = []
    for model in (ours, theirs):
        image, words, scale = model(images, text)
        losses.append(F.cross_entropy(scale * image @ words.T, torch.arange(5)))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = gradients[name].grad
        assert parameter.grad is not None and expected is not None and expected.any(), name
        assert (parameter.grad - expected).abs().max() <= 1e-4 * expected.abs().max(), name


def test_the_activation_matters() -> None:
    images, text = inputs()
    plain, quick = make_pair(False)[0], make_pair(True)[0]
    assert (plain.encode_image(images) - quick.encode_image(images)).abs().max() > 1e-3
    assert (plain.encode_text(text) - quick.encode_text(text)).abs().max() > 1e-3


def test_dataclasses_and_mappings_are_the_same_configuration() -> None:
    torch.manual_seed(0)
    mapped = CLIP(20, VISION, TEXT)
    torch.manual_seed(0)
    typed = CLIP(20, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT))
    assert all(torch.equal(value, typed.state_dict()[key]) for key, value in mapped.state_dict().items())
    with pytest.raises(UserError, match="vision_cfg has no option 'timm_model': .*'timm_model_name'"):
        CLIP(20, {**VISION, "timm_model": "resnet50"}, TEXT)


def test_forward_gives_unit_features_and_the_scale() -> None:
    images, text = inputs()
    model = CLIP(20, VISION, TEXT)
    image, words, scale = model(images, text)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(words.norm(dim=-1), torch.ones(5))
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert CLIP(20, VISION, TEXT, init_logit_scale=math.log(10)).logit_scale.exp().item() == pytest.approx(10)
    assert model.text_tower is model


SIGLIP = {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
KINDS: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": VISION, "text_cfg": TEXT},
    "quick_gelu": {"vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True},
    "nonscalar": {"vision_cfg": VISION, "text_cfg": TEXT, "nonscalar_logit_scale": True, "init_logit_bias": -2.0},
    "custom_text": {"vision_cfg": VISION, "text_cfg": SIGLIP, "custom_text": True, "init_logit_bias": -10.0},
    "custom_quick": {"vision_cfg": VISION, "text_cfg": TEXT, "custom_text": True, "quick_gelu": True},
    "resnet": {"vision_cfg": {**MODIFIED_RESNET, "image_size": 32}, "text_cfg": TEXT},
    "timm": {"vision_cfg": {**TIMM_VIT, "timm_model_name": "test_convnext", "image_size": 32, "timm_pool": "avg"}},
}
KINDS["timm"]["text_cfg"] = TEXT


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_open_clips(kind: str) -> None:
    ours, theirs = make_oracle_pair({"embed_dim": 20, **KINDS[kind]})
    assert shapes(ours) == shapes(theirs)
    images, text = inputs()
    assert_same_model(ours, theirs, images, text)
    with torch.no_grad():
        for output_dict in (False, True):
            ours.output_dict = theirs.output_dict = output_dict
            for given in ((images, text), (images, None), (None, text), (None, None)):
                assert_same_output(ours(*given), theirs(*given))
        assert_same_output(ours.get_logits(images, text[:3]), theirs.get_logits(images, text[:3]))
    for key, value in (("context_length", 11), ("vocab_size", 60)):
        assert getattr(ours, key) == getattr(theirs, key) == value


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_knows_what_rebuilds_it(kind: str) -> None:
    ours, _ = make_oracle_pair({"embed_dim": 20, **KINDS[kind]})
    architecture = json.loads(json.dumps(ours.architecture))
    again = build_clip(architecture).eval()
    again.load_state_dict(ours.state_dict(), strict=True)
    assert again.architecture == architecture
    images, text = inputs()
    assert_same_output(again(images, text), ours(images, text))
    theirs = open_clip_model(architecture).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_output(ours(images, text), theirs(images, text))


@pytest.mark.parametrize("kind", ["vit", "custom_text"])
def test_checkpointing_changes_no_loss_and_no_gradient(kind: str) -> None:
    """ResNets and timm: in their own files."""
    (plain, _), (again, _) = (make_oracle_pair({"embed_dim": 20, **KINDS[kind]}) for _ in range(2))
    images, text = inputs()
    again.train().set_grad_checkpointing()
    calls: list[str] = []
    for name, block in again.named_modules():
        if name.endswith(("resblocks.0", "resblocks.1")):
            block.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    assert_same_model(again, plain, images, text)
    assert sorted(set(calls)) != [] and all(calls.count(name) == 2 for name in calls), "computed twice"
    assert any("visual" in name for name in calls) and any("visual" not in name for name in calls)
    calls.clear()
    with torch.no_grad():
        again(images, text)
    again.set_grad_checkpointing(False)
    again(images, text)[0].sum().backward()
    assert all(calls.count(name) == 2 for name in calls), "once in each of the two passes"


@pytest.mark.parametrize("kind", KINDS)
def test_text_parameters_and_the_image_towers_are_all_there_are(kind: str) -> None:
    ours, _ = make_oracle_pair({"embed_dim": 20, **KINDS[kind]})
    text = {id(p) for p in ours.text_tower.text_parameters()}
    visual = {id(p) for p in ours.visual.parameters()}
    scalars = {id(p) for p in (ours.logit_scale, ours.logit_bias) if p is not None}
    assert text | visual | scalars == {id(p) for p in ours.parameters()}
    assert not text & visual and not scalars & text


def test_what_can_not_be_built_is_named() -> None:
    for config, message in (
        ({"multimodal_cfg": {}}, "CoCa"),
        ({"vision_cfg": {**VISION, "width": 50, "head_width": 16}}, "width of 50 can't be divided into 3 heads"),
        ({"embed_dim": 0}, "embed_dim must be 1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            build_clip({"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT, **config})
    with pytest.raises(UserError, match="needs CustomTextCLIP"):
        CLIP(20, VISION, {"hf_model_name": "x"})


@pytest.mark.parametrize("layout", [CLIP, CustomTextCLIP])
@pytest.mark.parametrize("is_trained", [True, False])
def test_a_bias_is_added_where_there_is_none_and_rebuilt(layout: Any, is_trained: bool) -> None:
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    clip = layout(8, vision, text)
    clip.add_logit_bias(is_trained)
    assert clip.logit_bias.item() == -10 and clip.logit_bias.requires_grad and clip.logit_bias.shape == ()
    assert clip.logit_scale.exp().item() == pytest.approx(1 / 0.07 if is_trained else 10)
    again = build_clip(clip.architecture)
    again.load_state_dict(clip.state_dict(), strict=True)
    theirs = (open_clip.CustomTextCLIP if layout is CustomTextCLIP else open_clip.CLIP)(
        **{key: value for key, value in clip.architecture.items() if key != "custom_text"}
    )
    theirs.load_state_dict(clip.state_dict(), strict=True)
    with torch.no_grad():
        clip.logit_bias.fill_(-3)
    clip.add_logit_bias(is_trained=False)
    assert clip.logit_bias.item() == -3, "a bias that is there stays"
    assert dict(clip.named_parameters())["logit_bias"] is clip.logit_bias
