import open_clip.transformer
import pytest
import torch
from torch import nn

from cliplab.models.transformer import QuickGELU
from cliplab.models.vision_transformer import VisionTransformer

SIZES = {"image_size": 24, "patch_size": 8, "width": 32, "layers": 2, "heads": 4}


@pytest.fixture
def towers() -> tuple[VisionTransformer, open_clip.transformer.VisionTransformer]:
    """Ours and open_clip's with the same random weights, in float64."""
    torch.manual_seed(0)
    theirs = open_clip.transformer.VisionTransformer(**SIZES, mlp_ratio=3.0, output_dim=12, output_tokens=True).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours = VisionTransformer(**SIZES, embed_dim=12, activation=nn.GELU, mlp_ratio=3.0).double()
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
    tokens = ours.tokens(images)
    pooled, patches = theirs(images)
    assert tokens.shape == (2, 1 + 9, 32)
    torch.testing.assert_close(tokens[:, 1:], patches, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours.pool(tokens), pooled, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours.pool(tokens), tokens[:, 0] @ theirs.proj, rtol=1e-9, atol=1e-10)


def test_the_activation_matters() -> None:
    torch.manual_seed(0)
    plain = VisionTransformer(**SIZES, embed_dim=12, activation=nn.GELU)
    quick = VisionTransformer(**SIZES, embed_dim=12, activation=QuickGELU)
    quick.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 24, 24)
    assert (plain(images) - quick(images)).abs().max() > 1e-4


def test_initial_standard_deviations() -> None:
    torch.manual_seed(0)
    tower = VisionTransformer(64, 8, 256, 1, 4, 128, nn.GELU)
    std = 256**-0.5
    for name, tolerance in (("class_embedding", 0.2), ("positional_embedding", 0.03), ("proj", 0.03)):
        assert tower.get_parameter(name).std().item() == pytest.approx(std, rel=tolerance), name
    assert tower.positional_embedding.shape == (8 * 8 + 1, 256)
    assert tower.conv1.bias is None
