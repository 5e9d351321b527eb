import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cliplab.errors import UserError
from cliplab.models.checkpoints.weights import read_state_dict
from cliplab.models.clip import CLIP, CustomTextCLIP, build_clip
from cliplab.models.lora import LowRank, adapt, merged
from tests.oracles import assert_close, gradients, pictures, sentences

VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
TEXT = {"context_length": 7, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2}
ARCHITECTURE = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}
LAYERS = ["visual.transformer.resblocks.0", "visual.transformer.resblocks.1"]
LAYERS += ["transformer.resblocks.0", "transformer.resblocks.1"]


def model(**options: Any) -> CLIP | CustomTextCLIP:
    torch.manual_seed(0)
    return build_clip(ARCHITECTURE | options).eval()


def adapted(clip: CLIP | CustomTextCLIP, targets: list[str], rank: int = 2, alpha: float = 3.0) -> None:
    adapt(clip.visual, clip.visual.parameters(), rank, alpha, targets)
    adapt(clip.text_tower.transformer, clip.text_tower.text_parameters(), rank, alpha, targets)


def updates(clip: nn.Module) -> list[LowRank]:
    return [module for module in clip.modules() if isinstance(module, LowRank)]


def move(clip: nn.Module) -> None:
    """Away from the start, where up is 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in updates(clip):
            each.up.copy_(0.2 * torch.randn(each.up.shape, generator=generator))


def by_hand(weight: Tensor, update: LowRank, targets: list[str], ratio: float) -> Tensor:
    """Row by row of each target: w + ratio * sum_r up[r] down[r]."""
    width, expected = weight.shape[1], weight.clone()
    for number, target in enumerate(name for name in "qkv" if name in targets):
        for row in range(width):
            change = sum(update.up[number, row, r] * update.down[number, r] for r in range(update.up.shape[2]))
            expected["qkv".index(target) * width + row] += ratio * change
    return expected.detach()


@pytest.mark.parametrize("targets", [["q", "k", "v"], ["q", "v"], ["k"], ["v", "q"]])
def test_the_weight_is_the_papers(targets: list[str]) -> None:
    clip = model()
    before = copy.deepcopy(clip.state_dict())
    adapted(clip, targets)
    move(clip)
    for name in LAYERS:
        layer = clip.get_submodule(f"{name}.attn")
        weight = before[f"{name}.attn.in_proj_weight"]
        update = layer.get_submodule("parametrizations.in_proj_weight.0")
        assert isinstance(update, LowRank) and update.down.shape == (len(targets), 2, 16)
        torch.testing.assert_close(layer.in_proj_weight, by_hand(weight, update, targets, 3.0 / 2))
        assert not torch.equal(layer.in_proj_weight, weight)


@pytest.mark.parametrize("layout", [{}, {"custom_text": True}])
def test_at_first_nothing_changes_and_then_both_towers_do(layout: dict[str, Any]) -> None:
    clip, plain = model(**layout), model(**layout)
    adapted(clip, ["q", "k", "v"])
    images, text = pictures(3, 16), sentences(3, 7, 20)
    assert torch.equal(clip.encode_image(images), plain.encode_image(images))
    assert torch.equal(clip.encode_text(text), plain.encode_text(text))
    move(clip)
    assert (clip.encode_image(images) - plain.encode_image(images)).abs().max() > 1e-3
    assert (clip.encode_text(text) - plain.encode_text(text)).abs().max() > 1e-3


@pytest.mark.parametrize("layout", [{}, {"custom_text": True}])
def test_merged_features_are_the_adapted_ones_also_in_open_clip(layout: dict[str, Any]) -> None:
    clip, plain = model(**layout), model(**layout)
    keys = list(plain.state_dict())
    adapted(clip, ["q", "v"])
    move(clip)
    weights = merged(clip.state_dict())
    assert sorted(weights) == sorted(keys)
    plain.load_state_dict(weights, strict=True)
    custom = layout.get("custom_text", False)
    theirs = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**ARCHITECTURE).eval()
    theirs.load_state_dict(weights, strict=True)
    images, text = pictures(3, 16), sentences(3, 7, 20)
    for other, tolerance in ((plain, 1e-6), (theirs, 1e-5)):
        assert_close(clip.encode_image(images), other.encode_image(images), "images", tolerance)
        assert_close(clip.encode_text(text), other.encode_text(text), "text", tolerance)


def test_only_the_updates_learn_with_the_gradients_of_the_chain_rule() -> None:
    clip, plain = model(), model()
    adapted(clip, ["q", "k", "v"])
    move(clip)
    plain.load_state_dict(merged(clip.state_dict()))
    images, text = pictures(3, 16), sentences(3, 7, 20)
    found = gradients((clip.encode_image(images), clip.encode_text(text)), clip)
    whole = gradients((plain.encode_image(images), plain.encode_text(text)), plain)
    learned = {name for name in found if not name.startswith("logit")}
    parts = {f"{name}.attn.parametrizations.in_proj_weight.0.{part}" for name in LAYERS for part in ("down", "up")}
    assert learned == parts
    for name in LAYERS:
        update = clip.get_submodule(f"{name}.attn.parametrizations.in_proj_weight.0")
        by_weight = 1.5 * whole[f"{name}.attn.in_proj_weight"].unflatten(0, (3, 16))
        prefix = f"{name}.attn.parametrizations.in_proj_weight.0"
        torch.testing.assert_close(found[f"{prefix}.up"], by_weight @ update.down.mT, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[f"{prefix}.down"], update.up.mT @ by_weight, rtol=1e-4, atol=1e-5)
        assert found[f"{prefix}.up"].abs().max() > 1e-4


def test_a_state_dict_of_its_own_resumes_and_a_plain_one_stays() -> None:
    clip, other = model(), model()
    adapted(clip, ["k"])
    move(clip)
    adapted(other, ["k"])
    other.load_state_dict(clip.state_dict(), strict=True)
    images = pictures(2, 16)
    assert torch.equal(other.encode_image(images), clip.encode_image(images))
    plain = model().state_dict()
    assert merged(plain).keys() == plain.keys() and all(merged(plain)[key] is plain[key] for key in plain)
    again = copy.deepcopy(clip)
    assert torch.equal(again.encode_image(images), clip.encode_image(images))
    assert parametrize.is_parametrized(again.visual.transformer.resblocks[0].attn, "in_proj_weight")


def test_the_weight_is_exact_under_autocast() -> None:
    clip = model()
    adapted(clip, ["q", "k", "v"])
    move(clip)
    layer = clip.visual.transformer.resblocks[0].attn
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = layer.in_proj_weight
    assert weight.dtype == torch.float32 and torch.equal(weight, layer.in_proj_weight)


def test_towers_without_packed_attention_are_named() -> None:
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}
    clip = model(vision_cfg=resnet)
    with pytest.raises(UserError, match=r"model\.lora: ModifiedResNet has no packed attention"):
        adapt(clip.visual, clip.visual.parameters(), 2, 2.0, ["q"])
    assert all(parameter.requires_grad for parameter in clip.parameters())


def test_a_checkpoint_file_is_read_merged(tmp_path: Path) -> None:
    clip = model()
    adapted(clip, ["q", "v"])
    move(clip)
    stored = {f"model.clip.{key}": value for key, value in clip.state_dict().items()}
    torch.save({"state_dict": stored}, tmp_path / "run.ckpt")
    found, expected = read_state_dict(tmp_path / "run.ckpt"), merged(clip.state_dict())
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
