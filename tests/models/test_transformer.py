import math

import open_clip.transformer
import pytest
import torch
from torch import nn

from cliplab.errors import UserError
from cliplab.models.transformer import Attention, QuickGELU, ResidualAttentionBlock, Transformer


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Biases and norms too, which start at 0 and 1 and would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def assert_same(ours: nn.Module, theirs: nn.Module, y: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn_like(y)
    (y * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    gradients = dict(theirs.named_parameters())
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torch_multi_head_attention(causal: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(24, 3).double(), nn.MultiheadAttention(24, 3, batch_first=True).double()
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected, _ = theirs(theirs_x, theirs_x, theirs_x, attn_mask=mask)
    assert_same(ours, theirs, ours(ours_x, causal), expected)
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, rtol=1e-9, atol=1e-10)


def test_attention_needs_whole_heads() -> None:
    with pytest.raises(UserError, match="a width of 10 can't be divided into 3 heads"):
        Attention(10, 3)


def test_attention_starts_as_torch_does() -> None:
    torch.manual_seed(0)
    attention, width = Attention(64, 4), 64
    bound = math.sqrt(6 / (4 * width))  # Xavier, uniform: fan in w, fan out 3 w
    weight = attention.in_proj_weight
    assert 0.99 * bound < weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not attention.in_proj_bias.any() and not attention.out_proj.bias.any()
    assert attention.out_proj.weight.std().item() == pytest.approx(1 / math.sqrt(3 * width), rel=0.04)


def test_quick_gelu() -> None:
    values = torch.linspace(-6, 6, 41, dtype=torch.float64, requires_grad=True)
    y = QuickGELU()(values)
    expected = [x / (1 + math.exp(-1.702 * x)) for x in values.tolist()]
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64))
    y.sum().backward()
    assert values.grad is not None
    step = 1e-6
    for x, slope in zip(values.tolist(), values.grad.tolist(), strict=True):
        difference = [(x + h) / (1 + math.exp(-1.702 * (x + h))) for h in (step, -step)]
        assert slope == pytest.approx((difference[0] - difference[1]) / (2 * step), abs=1e-8)


@pytest.mark.parametrize(("activation", "mlp_ratio"), [(nn.GELU, 4.0), (QuickGELU, 2.6)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_block_is_open_clips(activation: type[nn.Module], mlp_ratio: float, causal: bool) -> None:
    torch.manual_seed(0)
    ours = ResidualAttentionBlock(16, 2, mlp_ratio, activation).double()
    act_layer = open_clip.transformer.QuickGELU if activation is QuickGELU else nn.GELU
    theirs = open_clip.transformer.ResidualAttentionBlock(16, 2, mlp_ratio, act_layer=act_layer).double()
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1) if causal else None
    expected = theirs(x, attn_mask=mask)
    assert_same(ours, theirs, ours(x, causal), expected)


def test_initial_standard_deviations() -> None:
    torch.manual_seed(0)
    width, layers = 64, 6
    transformer = Transformer(width, layers, 4, 4.0, nn.GELU)
    transformer.initialize()
    branch = width**-0.5 * (2 * layers) ** -0.5
    expected = {
        "attn.in_proj_weight": width**-0.5,
        "attn.out_proj.weight": branch,
        "mlp.c_fc.weight": (2 * width) ** -0.5,
        "mlp.c_proj.weight": branch,
    }
    for block in transformer.resblocks:
        for name, std in expected.items():
            weight = block.get_parameter(name)
            assert weight.std().item() == pytest.approx(std, rel=0.05), name
            assert weight.mean().abs().item() < 5 * std / weight.numel() ** 0.5, name
