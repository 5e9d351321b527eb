from typing import Any

import open_clip.model
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cliplab.errors import UserError
from cliplab.models.modified_resnet import Pointwise
from tests.oracles import (
    MODIFIED_RESNET,
    TEXT,
    assert_close,
    assert_same_gradients,
    gradients,
    make_pair,
    perturb,
    pictures,
)

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


def pair(**options: Any) -> tuple[Any, Any]:
    config = {"embed_dim": 12, "vision_cfg": {**MODIFIED_RESNET, **options}, "text_cfg": {**TEXT, "layers": 1}}
    ours, theirs = make_pair(config)
    return ours.visual, theirs.visual


@pytest.mark.parametrize(
    "options",
    [{}, {"image_size": 96, "width": 16, "head_width": 64}, {"layers": [2, 1, 1, 2], "head_width": 16}],
    ids=str,
)
def test_features_and_gradients_are_open_clips(options: dict[str, Any]) -> None:
    ours, theirs = pair(**options)
    images = pictures(3, options.get("image_size", 64))
    features, expected = ours(images), theirs(images)
    assert_close(features, expected)
    assert_same_gradients(gradients([features], ours), gradients([expected], theirs))


def test_a_step_of_training_moves_the_statistics_as_open_clips() -> None:
    ours, theirs = pair()
    images = pictures(4, 64)
    features, expected = ours.train()(images), theirs.train()(images)
    assert_close(features, expected)
    assert_same_gradients(gradients([features], ours), gradients([expected], theirs))
    for key, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[key].float(), value.float(), key)


def test_it_starts_as_open_clips() -> None:
    """Attention by w^-0.5; the last norm of each block at zero, so that each starts as its shortcut."""
    torch.manual_seed(0)
    config = {"embed_dim": 12, "vision_cfg": {**MODIFIED_RESNET, "width": 16}, "text_cfg": TEXT}
    ours = make_untouched(config)
    for name, parameter in ours.named_parameters():
        if name.startswith("layer") and name.endswith("bn3.weight"):
            assert not parameter.any()
    for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
        weight = ours.get_parameter(f"attnpool.{name}.weight")
        assert weight.std().item() == pytest.approx(512**-0.5, rel=0.05)


def make_untouched(config: dict[str, Any]) -> Any:
    from cliplab.models.clip import build_clip

    return build_clip(config).visual


def test_tokens_are_the_places_that_were_pooled() -> None:
    ours, _ = pair()
    images = pictures(2, 64)
    features, tokens = ours.forward_with_tokens(images)
    last = ours.layer4(ours.layer3(ours.layer2(ours.layer1(ours.stem(images)))))
    assert tokens.shape == (2, 4, 256)
    assert torch.equal(tokens[1, 3], last[1, :, 1, 1]) and torch.equal(tokens[1, 1], last[1, :, 0, 1])
    assert_close(features, ours.attnpool(last))


@pytest.mark.parametrize("implementation", ["eager", "flash"])
def test_the_pooling_attends_in_all_ways(implementation: str) -> None:
    ours, _ = pair()
    images = pictures(2, 64)
    expected = ours(images)
    ours.attnpool.attention_implementation = implementation
    assert_close(ours(images), expected)


# Another image size: open_clip has no rule for it and fails


@pytest.mark.parametrize("size", [96, 128])
def test_positions_are_resized_as_open_clip_resizes_those_of_a_vit(size: int) -> None:
    ours, _ = pair(image_size=size)
    stored = pair()[1].state_dict()
    key = "attnpool.positional_embedding"
    found = ours.fit_positions(key, stored[key])

    class Vit:
        class visual:
            grid_size = size // 32

    as_vit = {"visual.positional_embedding": stored[key]}
    open_clip.model.resize_pos_embed(as_vit, Vit)
    assert_close(found, as_vit["visual.positional_embedding"], tolerance=1e-6)
    ours.load_state_dict({**stored, key: found})
    assert ours(pictures(1, size)).shape == (1, 12)


# Gradient checkpointing


def loss_of(tower: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    features = tower(images)
    return features, gradients([features], tower)


@pytest.mark.parametrize("train", [True, False])
def test_checkpointing_changes_no_loss_no_gradient_and_no_statistic(train: bool) -> None:
    images = pictures(3, 64)
    plain, again = pair()[0].train(train), pair()[0].train(train)
    again.set_grad_checkpointing()
    calls = {"layer2": 0, "stem": 0}
    again.layer2.register_forward_pre_hook(lambda *_: calls.update(layer2=calls["layer2"] + 1))
    again.bn1.register_forward_pre_hook(lambda *_: calls.update(stem=calls["stem"] + 1))
    (features, found), (expected, truth) = loss_of(again, images), loss_of(plain, images)
    assert calls == {"layer2": 2, "stem": 2}, "each stage is computed again in the backward pass"
    assert_close(features, expected)
    assert_same_gradients(found, truth)
    for key, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), f"{key} counted twice"
    assert again.bn1.num_batches_tracked == (1 if train else 0)
    assert all(norm.track_running_stats for norm in again.modules() if isinstance(norm, nn.BatchNorm2d))


def test_checkpointing_is_off_without_gradients_and_when_disabled() -> None:
    tower, calls = pair()[0].train(), [0]
    tower.layer2.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    tower.set_grad_checkpointing()
    with torch.no_grad():
        tower(pictures(2, 64))
    tower.set_grad_checkpointing(False)
    tower(pictures(2, 64)).sum().backward()
    assert calls == [2]


# Locking


def test_groups_hold_every_parameter_once() -> None:
    tower = pair()[0]
    groups = tower.groups()
    assert len(groups) == 6
    ids = [id(p) for group in groups for module in group for p in module.parameters()]
    assert len(ids) == len(set(ids)) == len(list(tower.parameters()))


@pytest.mark.parametrize("unlocked", range(8))
def test_the_last_groups_stay_trainable(unlocked: int) -> None:
    ours, theirs = pair()
    ours.lock(unlocked)
    names = ("stem", "layer1.", "layer2.", "layer3.", "layer4.", "attnpool.")
    open_names = names[max(6 - unlocked, 0) :]
    for name, parameter in ours.named_parameters():
        group = next((prefix for prefix in names if name.startswith(prefix)), "stem")
        assert parameter.requires_grad == (group in open_names), name
    if unlocked == 0:
        theirs.lock(0)
        assert not any(parameter.requires_grad for parameter in theirs.parameters())
    else:
        with pytest.raises(AssertionError):
            theirs.lock(unlocked)


def test_a_negative_number_of_groups_is_refused() -> None:
    with pytest.raises(UserError, match="can't leave -1 groups unlocked: this tower has 6"):
        pair()[0].lock(-1)


@pytest.mark.parametrize("unlocked", [0, 2, 6])
def test_frozen_statistics_stay_and_keys_are_unchanged(unlocked: int) -> None:
    ours, theirs = pair()
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    ours.lock(unlocked, freeze_bn_stats=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    images = pictures(4, 64)
    found = ours.train()(images)
    moved = {key for key, value in ours.state_dict().items() if not torch.equal(value, before[key])}
    frozen = {0: "", 2: "layer4.", 6: "layer1."}[unlocked]
    expected = {key for key in before if "running" in key or "tracked" in key} if unlocked == 6 else set()
    expected |= (
        {key for key in before if key.startswith("layer4.") and ("running" in key or "tracked" in key)}
        if unlocked
        else set()
    )
    assert moved == expected, frozen
    if unlocked == 0:
        theirs.lock(0, freeze_bn_stats=True)
        assert_close(found, theirs.train()(images))
        assert_close(found, ours.eval()(images))
    assert ours.train().training and ours.layer1.training == True  # noqa: E712


def test_without_freezing_the_statistics_move() -> None:
    ours, _ = pair()
    perturb(ours, seed=4)
    before = ours.bn1.running_mean.clone()
    ours.lock(0)
    ours.train()(pictures(4, 64))
    assert not torch.equal(ours.bn1.running_mean, before)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_a_pointwise_convolution_is_one(order: torch.memory_format) -> None:
    torch.manual_seed(0)
    ours = Pointwise(5, 7).double()
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64).contiguous(memory_format=order).requires_grad_()
    expected, found = F.conv2d(x, ours.weight), ours(x)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * cotangent).sum(), [x, ours.weight])
    for one, other in zip(torch.autograd.grad((found * cotangent).sum(), [x, ours.weight]), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=order)


def test_maps_have_their_channels_last() -> None:
    tower, orders = pair()[0], []
    for module in tower.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda *given: orders.append(given[2].is_contiguous(memory_format=torch.channels_last))
            )
    tower(pictures(2, 64))
    assert orders and all(orders)
