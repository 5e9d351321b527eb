from typing import Any

import pytest
import timm
import torch
from torch import nn

from cliplab.errors import UserError
from cliplab.models.timm_tower import TimmTower
from tests.oracles import (
    TEXT,
    TIMM_VIT,
    assert_close,
    assert_same_gradients,
    gradients,
    make_pair,
    open_clip_model,
    pictures,
)

VIT = {**TIMM_VIT, "timm_model_name": "test_vit"}  # timm's own tiny model, 160 pixels
CONVNEXT = {**VIT, "timm_model_name": "test_convnext", "timm_pool": "avg"}
BYOB = {**VIT, "timm_model_name": "test_byobnet", "timm_pool": "avg"}  # with batch norms


def config(**vision: Any) -> dict[str, Any]:
    return {"embed_dim": 24, "vision_cfg": {**vision, "image_size": 160}, "text_cfg": {**TEXT, "layers": 1}}


def pair(**vision: Any) -> tuple[TimmTower, Any]:
    ours, theirs = make_pair(config(**vision))
    return ours.visual, theirs.visual  # type: ignore[return-value]


HEADS: dict[str, dict[str, Any]] = {
    "linear": VIT,
    "linear_bias": {**VIT, "timm_proj_bias": True},
    "mlp": {**VIT, "timm_proj": "mlp", "timm_pool": "avg"},
    "mlp_bias": {**VIT, "timm_proj": "mlp", "timm_pool": "token", "timm_proj_bias": True},
    "none": {**VIT, "timm_proj": "none", "timm_pool": "token"},
    "classifier": {**VIT, "timm_proj": "", "timm_pool": "avg"},
    "null": {**VIT, "timm_proj": None, "timm_pool": "token"},
    "map": {**VIT, "timm_proj": "none", "timm_pool": "map"},
    "convnext": CONVNEXT,
    "convnext_mlp": {**CONVNEXT, "timm_proj": "mlp"},
    "own_pooling": {**CONVNEXT, "timm_pool": ""},
    "batch_norms": BYOB,
    "rot_attn": {**BYOB, "timm_pool": "rot_attn", "timm_proj": ""},
    "abs_attn": {**BYOB, "timm_pool": "abs_attn", "timm_proj": ""},
    "rot_attn_linear": {**BYOB, "timm_pool": "rot_attn", "timm_proj": "linear"},
    "drop": {**VIT, "timm_drop": 0.5, "timm_drop_path": 0.5},
}


@pytest.mark.parametrize("head", HEADS)
def test_features_and_gradients_are_open_clips(head: str) -> None:
    ours, theirs = pair(**HEADS[head])
    images = pictures(2, 160)
    features, expected = ours(images), theirs(images)
    assert_close(features, expected)
    assert_same_gradients(gradients([features], ours), gradients([expected], theirs))
    assert_close(ours.forward_with_tokens(images)[0], features)


def test_dropout_and_stochastic_depth_arrive() -> None:
    ours, theirs = pair(**HEADS["drop"])
    for tower in (ours, theirs):
        assert tower.head.drop.p == 0.5
        rates = [m.drop_prob for m in tower.modules() if type(m).__name__ == "DropPath"]
        assert max(rates) == pytest.approx(0.5)


def test_patch_dropout_is_timms() -> None:
    ours, theirs = pair(**VIT, patch_dropout=0.5)
    assert ours.trunk.patch_drop.prob == theirs.trunk.patch_drop.prob == 0.5


@pytest.mark.parametrize("vision", [VIT, CONVNEXT], ids=["vit", "convnext"])
def test_tokens_are_the_trunks_last(vision: dict[str, Any]) -> None:
    ours, _ = pair(**vision)
    images = pictures(2, 160)
    last = ours.trunk.forward_features(images)
    tokens = ours.forward_with_tokens(images)[1]
    if last.dim() == 3:
        assert torch.equal(tokens, last)
    else:
        assert tokens.shape == (2, last.shape[2] * last.shape[3], last.shape[1])
        assert torch.equal(tokens[1, last.shape[3] + 1], last[1, :, 1, 1])


def test_tokens_of_a_trunk_that_puts_channels_last() -> None:
    swin = {"timm_model_name": "swin_s3_tiny_224", "timm_kwargs": {"depths": [1, 1, 1, 1], "embed_dim": 24}}
    tower = TimmTower({**swin, "image_size": 224, "timm_pool": "avg"}, 8).eval()
    images = pictures(1, 224)
    features, tokens = tower.forward_with_tokens(images)
    last = tower.trunk.forward_features(images)
    assert tokens.shape == (1, 49, 192) and torch.equal(tokens[0, 8], last[0, 1, 1])
    assert_close(tower.head(tokens.mean(1)), features)


@pytest.mark.parametrize(("vision", "size"), [(VIT, 192), (VIT, (128, 192)), (CONVNEXT, 96)], ids=str)
def test_another_image_size_is_timms(vision: dict[str, Any], size: Any) -> None:
    """open_clip's model resized by its own method."""
    their_config = config(**vision)
    their_config["vision_cfg"]["image_size"] = 160
    theirs = open_clip_model(their_config).visual.eval()
    ours = TimmTower({**vision, "image_size": 160}, 24).eval()
    ours.load_state_dict(theirs.state_dict())
    for tower in (ours, theirs):
        tower.set_input_size(size)
    images = pictures(1, size)
    assert_close(ours(images), theirs(images))
    assert ours.image_size == size
    built = TimmTower({**vision, "image_size": size}, 24)
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_more_options_of_timm() -> None:
    tower = TimmTower({**VIT, "image_size": 32, "timm_kwargs": {"img_size": 32, "patch_size": 8, "depth": 2}}, 24)
    assert len(tower.trunk.blocks) == 2 and tower.trunk.pos_embed.shape[1] == 17
    assert tower.eval()(pictures(1, 32)).shape == (1, 24)


def test_an_unknown_trunk_is_told_the_closest() -> None:
    with pytest.raises(UserError, match="timm has no model 'vit_base_patch16_22'.*did you mean 'vit_base_patch16_224'"):
        TimmTower({**VIT, "timm_model_name": "vit_base_patch16_22"}, 8)


# Locking and checkpointing


@pytest.mark.parametrize("vision", [VIT, CONVNEXT, BYOB], ids=["vit", "convnext", "byob"])
def test_locking_is_open_clips(vision: dict[str, Any]) -> None:
    """open_clip imports group_parameters from where timm no longer has it: the fallback is put back for the oracle."""
    total = len(pair(**vision)[0].groups())
    for unlocked in range(total):
        ours, theirs = pair(**vision)
        ours.lock(unlocked)
        try:
            theirs.lock(unlocked)
        except RuntimeError:
            assert unlocked, "all frozen needs no groups"
            lock_as_open_clip(theirs.trunk, unlocked)
        found = {name: p.requires_grad for name, p in ours.named_parameters()}
        assert found == {name: p.requires_grad for name, p in theirs.named_parameters()}, unlocked
    pair(**vision)[0].lock(total + 3)
    assert all(flag for name, flag in found.items() if name.startswith("head")), "the projection is always trained"


def lock_as_open_clip(trunk: nn.Module, unlocked: int) -> None:
    groups = timm.models.group_parameters(trunk, trunk.group_matcher())  # type: ignore[operator]
    for index in range(max(groups) - unlocked + 1):
        for name in groups[index]:
            trunk.get_parameter(name).requires_grad = False


@pytest.mark.parametrize("unlocked", [0, 1])
def test_frozen_statistics_stay(unlocked: int) -> None:
    ours, theirs = pair(**BYOB)
    keys, before = ours.state_dict().keys(), {k: v.clone() for k, v in ours.state_dict().items()}
    ours.lock(unlocked, freeze_bn_stats=True)
    found = ours.train()(pictures(4, 160))
    assert ours.state_dict().keys() == keys
    moved = [key for key, value in ours.state_dict().items() if not torch.equal(value, before[key])]
    if unlocked == 0:
        assert not moved
        assert_close(found, theirs.eval()(pictures(4, 160)))  # locked, open_clip's loses timm's activations
    else:
        locked = {name for name, p in ours.named_parameters() if not p.requires_grad}
        assert not [key for key in moved if f"{key.rpartition('.')[0]}.weight" in locked]


@pytest.mark.parametrize("vision", [VIT, CONVNEXT], ids=["vit", "convnext"])
def test_checkpointing_changes_no_loss_and_no_gradient(vision: dict[str, Any]) -> None:
    plain, again = pair(**vision)[0].train(), pair(**vision)[0].train()
    again.set_grad_checkpointing()
    stage = again.trunk.blocks[0] if vision is VIT else again.trunk.stages[0].blocks[0]
    calls = [0]
    stage.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    images = pictures(2, 160)
    features, expected = again(images), plain(images)
    assert_close(features, expected)
    assert_same_gradients(gradients([features], again), gradients([expected], plain))
    assert calls == [2]


def test_checkpointing_where_timm_has_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = pair(**VIT)[0]

    def refuse(enable: bool) -> None:
        raise AssertionError("gradient checkpointing not supported")

    monkeypatch.setattr(tower.trunk, "set_grad_checkpointing", refuse)
    with pytest.raises(UserError, match="VisionTransformer has no gradient checkpointing"):
        tower.set_grad_checkpointing()
