from typing import Any

import open_clip.model
import open_clip.transformer
import pytest
import torch

from cliplab.models.vision_transformer import VisionTransformer
from tests.oracles import TEXT, VIT, assert_close, assert_same_gradients, gradients, make_pair, pictures

SIZES = {"image_size": 24, "patch_size": 8, "width": 32, "layers": 2}
CFG = {**SIZES, "head_width": 8, "mlp_ratio": 3.0}


@pytest.fixture
def towers() -> tuple[VisionTransformer, open_clip.transformer.VisionTransformer]:
    """Ours and open_clip's with the same random weights, in float64."""
    torch.manual_seed(0)
    theirs = open_clip.transformer.VisionTransformer(
        **SIZES, heads=4, mlp_ratio=3.0, output_dim=12, output_tokens=True
    ).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours = VisionTransformer(CFG, 12).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_features_and_gradients_are_open_clips(
    towers: tuple[VisionTransformer, open_clip.transformer.VisionTransformer],
) -> None:
    ours, theirs = towers
    images = torch.randn(3, 3, 24, 24, dtype=torch.float64)
    ours_images, theirs_images = images.clone().requires_grad_(), images.clone().requires_grad_()
    features, (expected, _) = ours(ours_images), theirs(theirs_images)
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn_like(features)
    (features * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    torch.testing.assert_close(ours_images.grad, theirs_images.grad, rtol=1e-8, atol=1e-9)
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-8, atol=1e-9, msg=name)


def test_tokens_are_the_class_token_and_open_clips_patch_tokens(
    towers: tuple[VisionTransformer, open_clip.transformer.VisionTransformer],
) -> None:
    ours, theirs = towers
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    features, tokens = ours.forward_with_tokens(images)
    pooled, patches = theirs(images)
    assert tokens.shape == (2, 1 + 9, 32)
    torch.testing.assert_close(tokens[:, 1:], patches, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(features, pooled, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(features, tokens[:, 0] @ theirs.proj, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours(images), features, rtol=1e-12, atol=1e-13)


def test_the_activation_matters() -> None:
    torch.manual_seed(0)
    plain = VisionTransformer(CFG, 12)
    quick = VisionTransformer(CFG, 12, quick_gelu=True)
    quick.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 24, 24)
    assert (plain(images) - quick(images)).abs().max() > 1e-4


def test_initial_standard_deviations() -> None:
    torch.manual_seed(0)
    tower = VisionTransformer({"image_size": 64, "patch_size": 8, "width": 256, "layers": 1}, 128)
    std = 256**-0.5
    for name, tolerance in (("class_embedding", 0.2), ("positional_embedding", 0.03), ("proj", 0.03)):
        assert tower.get_parameter(name).std().item() == pytest.approx(std, rel=tolerance), name
    assert tower.positional_embedding.shape == (8 * 8 + 1, 256)
    assert tower.conv1.bias is None


def tiny(**options: Any) -> dict[str, Any]:
    return {"embed_dim": 20, "vision_cfg": {**VIT, **options}, "text_cfg": {**TEXT, "layers": 1}}


VARIANTS: dict[str, dict[str, Any]] = {
    "tok": {},
    "avg": {"pool_type": "avg"},
    "none": {"pool_type": "none"},
    "no_ln_pre": {"no_ln_pre": True},
    "final_ln_after_pool": {"final_ln_after_pool": True, "pool_type": "avg"},
    "final_ln_after_class": {"final_ln_after_pool": True},
    "layer_scale": {"ls_init_value": 0.3},
    "eps": {"norm_kwargs": {"eps": 0.1}},
    "tanh": {"act_kwargs": {"approximate": "tanh"}},
    "tuple": {"image_size": [24, 40]},
    "patches_that_do_not_fit": {"image_size": 30, "patch_size": 7},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_open_clips(variant: str) -> None:
    config = tiny(**VARIANTS[variant])
    ours, theirs = (model.visual for model in make_pair(config))
    size = config["vision_cfg"]["image_size"]
    images = pictures(3, tuple(size) if isinstance(size, list) else size)
    features, expected = ours(images), theirs(images)
    assert_close(features, expected)
    assert_same_gradients(gradients([features], ours), gradients([expected], theirs))
    assert_close(ours.forward_with_tokens(images)[0], features)
    plain = make_pair(tiny())[0].visual
    if variant in ("avg", "no_ln_pre", "layer_scale", "eps", "tanh"):
        plain.load_state_dict(ours.state_dict(), strict=False)
        assert (plain(images) - features).abs().max() > 1e-4, "the option changes something"


def test_tokens_are_those_after_ln_post_whatever_is_pooled() -> None:
    ours, theirs = (model.visual for model in make_pair(tiny(final_ln_after_pool=True, pool_type="avg")))
    images = pictures(2, 32)
    tokens = ours.forward_with_tokens(images)[1]
    assert_close(tokens, theirs.ln_post(theirs.transformer(theirs._embeds(images))))


# Patch dropout


def test_patch_dropout_leaves_patches_out_in_training_only() -> None:
    tower = make_pair(tiny(patch_dropout=0.4))[0].visual
    images = pictures(64, 32)
    assert tower.embed(images).shape == (64, 17, 48)
    without = tower.embed(images)
    torch.manual_seed(0)
    dropped = tower.train().embed(images)
    assert dropped.shape == (64, 1 + int(16 * 0.6), 48)
    assert torch.equal(dropped[:, 0], without[:, 0]), "the class token stays and stays first"
    kept = torch.zeros(64, 16, dtype=torch.bool)
    for row in range(64):
        for patch in dropped[row, 1:]:
            found = (without[row, 1:] == patch).all(-1)
            assert found.sum() == 1, "each is one of the patches, with its own position"
            kept[row] |= found
    assert (kept.sum(1) == 9).all() and 20 < kept.sum(0).min() <= kept.sum(0).max() < 55, "others in each picture"


def test_patch_dropout_keeps_at_least_one_patch() -> None:
    tower = make_pair(tiny(patch_dropout=0.99))[0].visual.train()
    assert tower.embed(pictures(2, 32)).shape == (2, 2, 48)


def test_without_patch_dropout_training_is_evaluation() -> None:
    tower = make_pair(tiny())[0].visual
    images = pictures(2, 32)
    assert torch.equal(tower.train()(images), tower.eval()(images))


# Another image size


@pytest.mark.parametrize("size", [16, 48, [24, 40]])
def test_positions_are_resized_as_open_clip_does(size: Any) -> None:
    ours, theirs = make_pair(tiny(image_size=size))
    stored = make_pair(tiny(), seed=3)[1].state_dict()
    expected = dict(stored)
    open_clip.model.resize_pos_embed(expected, theirs)
    key = "positional_embedding"
    found = ours.visual.fit_positions(key, stored[f"visual.{key}"])
    assert_close(found, expected[f"visual.{key}"], tolerance=1e-6)
    assert torch.equal(found[0], stored[f"visual.{key}"][0]), "the class token's stays"


def test_positions_of_the_same_size_are_not_touched() -> None:
    tower = make_pair(tiny())[0].visual
    stored = torch.randn(17, 48)
    assert tower.fit_positions("positional_embedding", stored) is stored
    assert tower.fit_positions("class_embedding", stored) is stored


def test_positions_keep_their_precision() -> None:
    tower = make_pair(tiny(image_size=48))[0].visual
    assert tower.fit_positions("positional_embedding", torch.randn(17, 48).half()).dtype == torch.float16


@pytest.mark.parametrize("shape", [(16, 48), (), (0, 48), (1, 48), (17, 5), (2, 3, 48)])
def test_positions_that_are_no_square_grid_stay_for_the_loader_to_refuse(shape: tuple[int, ...]) -> None:
    stored = torch.randn(shape)
    assert make_pair(tiny(image_size=48))[0].visual.fit_positions("positional_embedding", stored) is stored


@pytest.mark.parametrize("size", [24, 30], ids=["fits", "too large"])
def test_patches_are_those_of_the_convolution(size: int) -> None:
    torch.manual_seed(0)
    tower = VisionTransformer({**CFG, "patch_size": 5, "image_size": size}, 12).double()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    expected = tower.conv1(images).flatten(2).transpose(1, 2)
    found = tower.patches(images)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(found)
    (wanted,) = torch.autograd.grad((expected * cotangent).sum(), [tower.conv1.weight])
    (gradient,) = torch.autograd.grad((found * cotangent).sum(), [tower.conv1.weight])
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_the_last_block_computes_the_class_token_alone() -> None:
    torch.manual_seed(0)
    tower = VisionTransformer(CFG, 12).double()
    images, rows = torch.randn(2, 3, 24, 24, dtype=torch.float64), []
    parameters = list(tower.parameters())
    for hooked in (False, True):  # a hook wants to see all tokens
        if hooked:
            tower.transformer.resblocks[-1].register_forward_hook(lambda *given: rows.append(given[2].shape[1]))
        features = tower(images)
        gradients = torch.autograd.grad(features.square().sum(), parameters)
        if not hooked:
            expected = (features, *gradients)
    assert rows == [1 + 9]
    for found, wanted in zip((features, *gradients), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
