from typing import Any

import pytest
import torch
from torch import nn

from cliplab.errors import UserError
from cliplab.models.image_tower import ImageTower, as_map, check_format, layers_of, lock_groups, resize_positions
from tests.oracles import MODIFIED_RESNET, TEXT, VIT, make_pair, pictures

DEEP = {**VIT, "layers": 4}


def pair(**config: Any) -> tuple[Any, Any]:
    return make_pair({"embed_dim": 20, "vision_cfg": DEEP, "text_cfg": TEXT, **config})


def trained(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("unlocked", range(9))
@pytest.mark.parametrize("options", [{}, {"no_ln_pre": True}], ids=str)
def test_a_vit_is_locked_as_open_clips(unlocked: int, options: dict[str, Any]) -> None:
    ours, theirs = pair(vision_cfg={**DEEP, **options})
    for model in (ours, theirs):
        model.lock_image_tower(unlocked)
    assert trained(ours) == trained(theirs)
    assert sum(trained(ours.visual).values()) == sum(trained(theirs.visual).values())
    assert ours.logit_scale.requires_grad and ours.token_embedding.weight.requires_grad


TEXTS: dict[str, dict[str, Any]] = {
    "clip": {"text_cfg": TEXT},
    "custom_text": {"text_cfg": TEXT, "custom_text": True},
    "siglip": {"text_cfg": {**TEXT, "proj_bias": True}, "custom_text": True, "init_logit_bias": -10.0},
    "no_projection": {"text_cfg": {**TEXT, "proj_type": "none"}, "custom_text": True},
}


@pytest.mark.parametrize("unlocked", range(8))
@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_tower_is_locked_as_open_clips(unlocked: int, kind: str) -> None:
    ours, theirs = pair(**TEXTS[kind])
    ours.lock_text_tower(unlocked)
    if kind == "no_projection" and unlocked:
        # open_clip counts the projection that is not there as a group and fails on it: ours is one less
        theirs.text.text_projection = nn.Parameter(torch.zeros(1))
        theirs.lock_text_tower(unlocked + 1)
        del theirs.text.text_projection
    else:
        theirs.lock_text_tower(unlocked)
    assert trained(ours) == trained(theirs)
    assert ours.logit_scale.requires_grad
    assert ours.logit_bias is None or ours.logit_bias.requires_grad


def test_norms_of_locked_text_blocks_can_not_stay_open() -> None:
    ours, _ = pair()
    with pytest.raises(UserError, match="freeze_layer_norm=False is for Hugging Face text towers"):
        ours.lock_text_tower(1, freeze_layer_norm=False)
    assert all(trained(ours).values()), "nothing was locked"


def test_locking_again_counts_anew() -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        model.lock_image_tower(0)
        model.lock_image_tower(2)
    assert trained(ours) == trained(theirs)


def test_a_negative_number_is_refused() -> None:
    for lock in (pair()[0].lock_image_tower, pair()[0].lock_text_tower):
        with pytest.raises(UserError, match="can't leave -1"):
            lock(-1)


def test_lock_groups_by_hand() -> None:
    layers = [nn.Linear(2, 2) for _ in range(3)]
    free = nn.Parameter(torch.zeros(1))
    parameters = [free, *(p for layer in layers for p in layer.parameters())]
    lock_groups(parameters, [[layers[0]], [layers[1], free], [layers[2]]], 2)
    assert [p.requires_grad for p in parameters] == [True, False, False, True, True, True, True]


def test_statistics_stay_frozen_through_the_whole_models_train() -> None:
    config = {"embed_dim": 12, "vision_cfg": MODIFIED_RESNET, "text_cfg": TEXT}
    ours, _ = make_pair(config)
    ours.lock_image_tower(freeze_bn_stats=True)
    assert ours.train() is ours and ours.visual.training
    norms = [m for m in ours.visual.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 10 and not any(norm.training for norm in norms)
    before = ours.visual.bn1.running_mean.clone()
    ours.encode_image(pictures(3, 64))
    assert torch.equal(ours.visual.bn1.running_mean, before)


def test_a_tower_says_what_it_does_not_have() -> None:
    tower = ImageTower()
    with pytest.raises(UserError, match="ImageTower has no blocks of self-attention"):
        tower.attention_maps(torch.zeros(1))
    stored = torch.randn(5, 3)
    assert tower.fit_positions("anything", stored) is stored


# Layouts and positions


def test_as_map_by_hand() -> None:
    tokens = torch.arange(2 * 6 * 3).reshape(2, 6, 3)
    made = as_map(tokens, 2, 3)
    assert made.shape == (2, 3, 2, 3) and made.is_contiguous()
    assert made[1, 2, 1, 0] == tokens[1, 3, 2]


def test_check_format() -> None:
    check_format("NLC")
    with pytest.raises(UserError, match="must be NCHW or NLC, got 'nchw'"):
        check_format("nchw")


def test_positions_of_a_plane_stay_a_plane() -> None:
    """Bicubic weights sum to one: what is constant stays, and rows and columns are not swapped."""
    rows = torch.arange(4.0)[:, None].expand(4, 4).reshape(16, 1)
    stored = torch.cat([torch.full((1, 1), 9.0), rows])
    made = resize_positions(stored, (8, 2))
    assert made[0] == 9
    grid = made[1:].reshape(8, 2)
    torch.testing.assert_close(grid[:, 0], grid[:, 1])
    assert (grid[1:, 0] > grid[:-1, 0]).all()


def test_layers_of_has_every_parameter_once_and_the_rest_on_top() -> None:
    first, second, third = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    alone = nn.Parameter(torch.zeros(2))
    parameters = [*third.parameters(), *first.parameters(), *second.parameters(), alone]
    layers = layers_of(parameters, [[first], [alone, first], [second]])
    own = [list(first.parameters()), [alone], list(second.parameters()), list(third.parameters())]
    assert [[id(p) for p in layer] for layer in layers] == [[id(p) for p in layer] for layer in own]
    assert len(layers_of(list(first.parameters()), [[first]])) == 1
