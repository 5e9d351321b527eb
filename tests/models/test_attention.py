from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.attention import attend, attention_weights, causal_mask, set_attention
from cliplab.models.transformer import Attention, Transformer
from tests.oracles import TEXT, TIMM_VIT, VIT, assert_close, make_pair, pictures, sentences

IMPLEMENTATIONS = ("eager", "sdpa", "flash")


def qkv(batch: int = 2, heads: int = 3, length: int = 7, dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, length, dim, generator=generator).requires_grad_() for _ in range(3)]


def by_loops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """One query after the other."""
    result = torch.zeros_like(q)
    for b, h, i in product(*(range(n) for n in q.shape[:3])):
        seen = [
            j
            for j in range(k.shape[2])
            if (j <= i or not causal) and (mask is None or bool(mask.expand(q.shape[0], 1, 7, 7)[b, 0, i, j]))
        ]
        scores = torch.stack([(q[b, h, i] * k[b, h, j]).sum() / q.shape[3] ** 0.5 for j in seen])
        result[b, h, i] = sum(w * v[b, h, j] for w, j in zip(scores.exp() / scores.exp().sum(), seen, strict=True))
    return result


def masks(batch: int, heads: int, length: int) -> dict[str, Tensor | None]:
    """Of the keys, of keys by query, by head: of every shape that broadcasts."""
    drawn = torch.rand(batch, heads, length, length) < 0.6
    drawn[..., 0] = True  # no token may be left without anything to look at
    return {"none": None, "keys": drawn[:, :1, :1], "causal": causal_mask(length, drawn.device), "each": drawn}


@pytest.mark.parametrize("kind", ["none", "keys", "causal", "each"])
@pytest.mark.parametrize("length", [7, 150, 600])  # products, the fp32 kernel, the kernel in fp32 for half precision
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_in_every_precision_and_length(dtype: torch.dtype, length: int, kind: str) -> None:
    torch.manual_seed(0)
    given, mask = [torch.randn(2, 3, length, 8).to(dtype) for _ in range(3)], masks(2, 3, length)[kind]
    results = []
    for precision, way in ((torch.float64, "eager"), (dtype, "sdpa")):
        q, k, v = (t.to(precision).requires_grad_() for t in given)
        output = attend(q, k, v, way, mask)  # type: ignore[arg-type]
        (output * torch.linspace(-1, 1, length, dtype=precision)[:, None]).sum().backward()
        results.append([output.detach(), q.grad, k.grad, v.grad])
        with torch.no_grad():
            results[-1].append(attend(q, k, v, way, mask))  # type: ignore[arg-type]
    for expected, found in zip(*results, strict=True):
        assert found is not None and expected is not None and found.dtype == dtype
        limit = (2e-2 if dtype == torch.bfloat16 else 2e-6) * float(expected.abs().max())
        assert_close(found.double(), expected, tolerance=limit)


def padded_mask() -> Tensor:
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[0, :, :, 5:], mask[1, :, :, :2] = False, False
    return mask | torch.eye(7, dtype=torch.bool)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("mask", "causal"), [(None, False), (None, True), (padded_mask(), False)], ids=str)
def test_all_ways_are_the_loop(implementation: Any, mask: Tensor | None, causal: bool) -> None:
    q, k, v = qkv()
    expected = by_loops(q.detach().double(), k.detach().double(), v.detach().double(), mask, causal).float()
    assert_close(attend(q, k, v, implementation, mask, causal).detach(), expected, tolerance=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "flash"])
@pytest.mark.parametrize(("mask", "causal"), [(None, False), (None, True), (padded_mask(), False)], ids=str)
def test_gradients_are_those_of_plain_attention(implementation: Any, mask: Tensor | None, causal: bool) -> None:
    results = []
    for way in ("eager", implementation):
        q, k, v = qkv()
        attend(q, k, v, way, mask, causal).square().sum().backward()
        results.append([t.grad for t in (q, k, v)])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected)


def test_a_mask_includes_causality() -> None:
    q, k, v = qkv()
    mask = causal_mask(7, torch.device("cpu"))
    for way in IMPLEMENTATIONS:
        assert_close(attend(q, k, v, way, mask, causal=True), attend(q, k, v, way, causal=True))


def test_the_causal_mask() -> None:
    assert causal_mask(3, torch.device("cpu")).tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_those_of_fp32_rounded(dtype: torch.dtype) -> None:
    q, k, _ = qkv(length=64)
    weights = attention_weights(q.to(dtype), k.to(dtype))
    assert weights.dtype == dtype
    assert (weights.float() - attention_weights(q, k)).abs().max() < 0.01
    assert (weights.float().sum(-1) - 1).abs().max() < 64 * torch.finfo(dtype).eps / 4


# Padding within the blocks


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_either_side_changes_nothing_and_gives_no_nan(implementation: str, causal: bool, side: str) -> None:
    torch.manual_seed(0)
    transformer = Transformer(24, 2, 3)
    set_attention(transformer, implementation)
    x, mask = torch.randn(2, 9, 24), torch.ones(2, 9, dtype=torch.bool)
    kept = slice(3, 9) if side == "left" else slice(0, 6)
    mask[1] = False
    mask[1, kept] = True
    x.requires_grad_()
    found = transformer(x, causal, mask)
    assert torch.isfinite(found).all()
    assert_close(found[0], transformer(x, causal)[0], "a row without padding")
    assert_close(found[1:, kept], transformer(x[1:, kept], causal), "a row without its padding")
    found[1, kept].square().sum().backward()
    assert torch.isfinite(x.grad).all() and not x.grad[1, ~mask[1]].any()
    assert all(torch.isfinite(p.grad).all() for p in transformer.parameters())


def test_a_row_of_padding_alone_is_finite() -> None:
    transformer = Transformer(24, 2, 3)
    mask = torch.zeros(1, 5, dtype=torch.bool)
    for causal in (False, True):
        assert torch.isfinite(transformer(torch.randn(1, 5, 24), causal, mask)).all()


# Maps


def test_maps_are_what_is_attended() -> None:
    torch.manual_seed(0)
    ours, _ = make_pair({"embed_dim": 20, "vision_cfg": VIT, "text_cfg": TEXT})
    images, text = pictures(2, 32), sentences(3, 11, 60)
    visual, words = ours.visual.attention_maps(images), ours.text_attention_maps(text)
    assert [tuple(m.shape) for m in visual] == [(2, 3, 17, 17)] * 3
    assert [tuple(m.shape) for m in words] == [(3, 2, 11, 11)] * 3
    for weights in (*visual, *words):
        assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), tolerance=1e-6)
    assert not any(weights.triu(1).any() for weights in words), "no token looks ahead"
    assert visual[0].triu(1).any()
    # torch's own, block by block
    x = ours.visual.embed(images)
    for block, weights in zip(ours.visual.transformer.resblocks, visual, strict=True):
        theirs = nn.MultiheadAttention(48, 3, batch_first=True)
        theirs.load_state_dict(block.attn.state_dict())
        normed = block.ln_1(x)
        assert_close(weights, theirs(normed, normed, normed, average_attn_weights=False)[1])
        x = block(x)


def test_towers_without_maps_say_so() -> None:
    vision = {**TIMM_VIT, "timm_model_name": "test_convnext", "timm_pool": "avg", "image_size": 160}
    ours, _ = make_pair({"embed_dim": 20, "vision_cfg": vision, "text_cfg": TEXT})
    with pytest.raises(UserError, match="TimmTower has no blocks of self-attention that give maps"):
        ours.visual.attention_maps(pictures(1, 160))


# The choice


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_layer_is_told(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = {**TIMM_VIT, "timm_model_name": "test_vit", "image_size": 160}
    ours, theirs = make_pair({"embed_dim": 20, "vision_cfg": vision, "text_cfg": TEXT})
    images, text = pictures(2, 160), sentences(3, 11, 60)
    set_attention(ours, implementation)
    assert {m.attention_implementation for m in ours.modules() if isinstance(m, Attention)} == {implementation}
    assert {m.fused_attn for m in ours.visual.modules() if hasattr(m, "fused_attn")} == {implementation != "eager"}
    calls = [0]
    fused = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **options: Any) -> Tensor:
        calls[0] += 1
        return fused(*args, **options)

    expected = theirs.encode_image(images), theirs.encode_text(text)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with torch.no_grad():  # in training short sequences do without the kernel on a CPU
        assert_close(ours.encode_image(images), expected[0])
        assert_close(ours.encode_text(text), expected[1])
    blocks = len(ours.visual.trunk.blocks) + 3
    assert calls == [0 if implementation == "eager" else blocks]


def test_an_unknown_way_is_told_the_closest() -> None:
    with pytest.raises(UserError, match="unknown attention 'flsh'.*did you mean 'flash'"):
        set_attention(nn.Identity(), "flsh")
