"""forward_intermediates against open_clip's, for all combinations that mean the same there."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cliplab.errors import UserError
from tests.oracles import (
    MODIFIED_RESNET,
    TEXT,
    TIMM_VIT,
    VIT,
    assert_close,
    assert_same_output,
    make_pair,
    pictures,
    sentences,
)

SIGLIP = {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
TOWERS: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": VIT, "text_cfg": TEXT},
    "vit_bias": {"vision_cfg": VIT, "text_cfg": TEXT, "init_logit_bias": -3.0},
    "custom_text": {"vision_cfg": VIT, "text_cfg": SIGLIP, "custom_text": True, "init_logit_bias": -3.0},
    "resnet": {"vision_cfg": MODIFIED_RESNET, "text_cfg": TEXT},
    "timm": {"vision_cfg": {**TIMM_VIT, "timm_model_name": "test_vit", "image_size": 160}, "text_cfg": TEXT},
}
INDICES: list[Any] = [None, 1, 2, [0], [-1, 0], [1, 2], (2, 0)]
FLAGS = ("normalize", "normalize_intermediates", "intermediates_only", "output_logits", "output_logit_scale_bias")


def pair(kind: str) -> tuple[Any, Any]:
    return make_pair({"embed_dim": 20, **TOWERS[kind]})


def inputs(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    return pictures(2, TOWERS[kind]["vision_cfg"]["image_size"]), sentences(3, 11, 60)


@pytest.mark.parametrize("kind", ["vit", "vit_bias", "custom_text"])
def test_all_options_are_open_clips(kind: str) -> None:
    ours, theirs = pair(kind)
    images, text = inputs(kind)
    with torch.no_grad():
        for flags in product([False, True], repeat=len(FLAGS)):
            options = dict(zip(FLAGS, flags, strict=True))
            for number, indices in enumerate(INDICES):
                options |= {"image_indices": indices, "text_indices": INDICES[-number]}
                options |= {
                    "image_output_fmt": ("NCHW", "NLC")[number % 2],
                    "image_output_extra_tokens": number % 3 == 0,
                }
                options |= {"stop_early": options["intermediates_only"] and kind == "custom_text"}
                found = ours.forward_intermediates(images, text, **options)
                assert_same_output(found, theirs.forward_intermediates(images, text, **options))


@pytest.mark.parametrize("kind", TOWERS)
def test_one_input_alone(kind: str) -> None:
    ours, theirs = pair(kind)
    images, text = inputs(kind)
    for given in ({"image": images}, {"text": text}):
        found = ours.forward_intermediates(**given, output_logit_scale_bias=True)
        assert_same_output(found, theirs.forward_intermediates(**given, output_logit_scale_bias=True))
        with pytest.raises(UserError, match="output_logits needs both image and text"):
            ours.forward_intermediates(**given, output_logits=True)


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("indices", [None, 1, 3, [4], [-1, 0], [1, 4]], ids=str)
def test_a_resnets_are_open_clips(indices: Any, only: bool) -> None:
    """Where the last stage is among them: open_clip pools a cut tower otherwise."""
    ours, theirs = pair("resnet")
    images, text = inputs("resnet")
    options = {"image_indices": indices, "intermediates_only": only, "normalize": False}
    found = ours.forward_intermediates(images, text, **options)
    assert_same_output(found, theirs.forward_intermediates(images, text, **options))
    flat = ours.forward_intermediates(images, image_output_fmt="NLC", **options)["image_intermediates"]
    for one, other in zip(flat, found["image_intermediates"], strict=True):
        assert torch.equal(one, other.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("stop_early", [False, True])
def test_a_resnets_features_are_those_of_the_whole_tower(stop_early: bool) -> None:
    ours, _ = pair("resnet")
    images, _ = inputs("resnet")
    found = ours.forward_intermediates(images, image_indices=[1], stop_early=stop_early)
    assert_close(found["image_features"], ours.encode_image(images, normalize=True))
    assert [m.shape[1] for m in found["image_intermediates"]] == [32]


def test_timms_are_open_clips() -> None:
    ours, theirs = pair("timm")
    images, text = inputs("timm")
    with torch.no_grad():
        for flags in product([False, True], repeat=2):
            for indices, layout, extra in product((None, 2, [0, 3], (-1,)), ("NCHW", "NLC"), (False, True)):
                options = {"normalize_intermediates": flags[0], "intermediates_only": flags[1]}
                options |= {"image_indices": indices, "image_output_fmt": layout, "image_output_extra_tokens": extra}
                found = ours.forward_intermediates(images, text, **options)
                their_options = options | {"image_indices": list(indices) if isinstance(indices, tuple) else indices}
                assert_same_output(found, theirs.forward_intermediates(images, text, **their_options))


def test_maps_of_a_convolutional_trunk() -> None:
    """timm gives maps only; tokens are made of them, and there are no extra tokens."""
    vision = {**TIMM_VIT, "timm_model_name": "test_convnext", "timm_pool": "avg", "image_size": 160}
    ours, theirs = make_pair({"embed_dim": 20, "vision_cfg": vision, "text_cfg": TEXT})
    images = pictures(2, 160)
    found = ours.forward_intermediates(images)
    assert_same_output(found, theirs.forward_intermediates(images))
    flat = ours.forward_intermediates(images, image_output_fmt="NLC", image_output_extra_tokens=True)
    assert flat.keys() == found.keys()
    for one, other in zip(flat["image_intermediates"], found["image_intermediates"], strict=True):
        assert torch.equal(one, other.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("kind", TOWERS)
def test_features_are_those_of_encode(kind: str) -> None:
    ours, _ = pair(kind)
    images, text = inputs(kind)
    found = ours.forward_intermediates(
        images, text, output_logits=True, stop_early=True, image_indices=[0], text_indices=[0]
    )
    assert_close(found["image_features"], ours.encode_image(images, True), tolerance=1e-6)
    assert_close(found["text_features"], ours.encode_text(text, True), tolerance=1e-6)
    image_logits, text_logits = ours.get_logits(images, text)
    assert_close(found["image_logits"], image_logits)
    assert_close(found["text_logits"], text_logits)


@pytest.mark.parametrize("kind", ["vit", "custom_text", "resnet", "timm"])
@pytest.mark.parametrize(("only", "stop_early"), [(True, True), (True, False), (False, True)])
def test_stopping_early_skips_the_blocks_above_where_no_features_are_wanted(
    kind: str, only: bool, stop_early: bool
) -> None:
    ours, _ = pair(kind)
    images, text = inputs(kind)
    ran: list[str] = []
    visual, blocks = ours.visual, dict(enumerate(ours.text_tower.transformer.resblocks))
    image_blocks = {
        "resnet": lambda: [visual.layer1, visual.layer2, visual.layer3, visual.layer4],
        "timm": lambda: list(visual.trunk.blocks),
    }.get(kind, lambda: list(visual.transformer.resblocks))()
    for index, block in [*enumerate(image_blocks), *((f"text{i}", b) for i, b in blocks.items())]:
        block.register_forward_hook(lambda *_, name=f"{index}": ran.append(name))
    options = {"image_indices": [1, 0], "text_indices": [0, 1], "intermediates_only": only, "stop_early": stop_early}
    ours.forward_intermediates(images, text, **options)
    expected = [str(index) for index in range(len(image_blocks))]
    if only and stop_early:
        expected = ["0"] if kind == "resnet" else ["0", "1"]  # a ResNet's block 0 is its stem
    texts = ["text0", "text1"] if only and stop_early else ["text0", "text1", "text2"]
    assert ran == [*expected, *texts]


@pytest.mark.parametrize("indices", [0, 4, -1, [3], [-4]], ids=str)
def test_blocks_that_are_not_there_are_named(indices: Any) -> None:
    ours, _ = pair("vit")
    images, text = inputs("vit")
    with pytest.raises(UserError, match="of 3 blocks: give None, 1 to 3"):
        ours.forward_intermediates(images, image_indices=indices)
    with pytest.raises(UserError, match="of 3 blocks"):
        ours.forward_intermediates(text=text, text_indices=indices)


@pytest.mark.parametrize("kind", TOWERS)
def test_layouts_that_are_not_there_are_named(kind: str) -> None:
    ours, _ = pair(kind)
    images, text = inputs(kind)
    with pytest.raises(UserError, match="must be NCHW or NLC, got 'NHWC'"):
        ours.forward_intermediates(images, image_output_fmt="NHWC")
    with pytest.raises(UserError, match="must be NLC, got 'NCHW'"):
        ours.forward_intermediates(text=text, text_output_fmt="NCHW")


def test_gradients_flow_through_intermediates() -> None:
    ours, _ = pair("vit")
    images, text = inputs("vit")
    found = ours.forward_intermediates(images, text, normalize_intermediates=True, intermediates_only=True)
    F.mse_loss(found["image_intermediates"][0].mean((2, 3))[:, :32], found["text_intermediates"][0][:2, 0]).backward()
    assert ours.visual.conv1.weight.grad.any() and ours.token_embedding.weight.grad.any()
    assert ours.visual.transformer.resblocks[1].attn.in_proj_weight.grad is None
