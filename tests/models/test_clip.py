import math
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F

from cliplab.models.clip import CLIP, CLIPTextCfg, CLIPVisionCfg

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


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "ViT-g-14", "ViT-B-16-quickgelu"])
def test_published_sizes_have_open_clips_keys_and_shapes(name: str) -> None:
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        ours, theirs = CLIP(**config), open_clip.CLIP(**config)
    assert shapes(ours) == shapes(theirs)
    assert ours.quick_gelu == name.endswith("quickgelu")
    if name == "ViT-B-32":
        assert len(shapes(ours)) == 302
        assert sum(parameter.numel() for parameter in ours.parameters()) == 151_277_313


def test_dataclasses_and_mappings_are_the_same_configuration() -> None:
    torch.manual_seed(0)
    mapped = CLIP(20, VISION, TEXT)
    torch.manual_seed(0)
    typed = CLIP(20, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT))
    assert all(torch.equal(value, typed.state_dict()[key]) for key, value in mapped.state_dict().items())
    with pytest.raises(TypeError, match="timm_model_name"):
        CLIP(20, {**VISION, "timm_model_name": "resnet50"}, TEXT)


def test_forward_gives_unit_features_and_the_scale() -> None:
    images, text = inputs()
    model = CLIP(20, VISION, TEXT)
    image, words, scale = model(images, text)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(words.norm(dim=-1), torch.ones(5))
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert CLIP(20, VISION, TEXT, init_logit_scale=math.log(10)).logit_scale.exp().item() == pytest.approx(10)
    assert model.text_tower is model
