"""Attention in three ways with equal results, chosen by name: eager, sdpa, flash."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cliplab.errors import UserError
from cliplab.registry import closest

Implementation = Literal["eager", "sdpa", "flash"]

_ALL_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


_LONGEST_PRODUCTS, _LONGEST_PRODUCTS_HALF = 128, 512  # keys, in training on a CPU


class AttentionMaps(list[Tensor]):
    """Collects the attention weights [B, H, L, L] of each block; while it is given, blocks attend eagerly."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    implementation: Implementation = "sdpa",
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al., 2017): q [B, H, L, d], k and v [B, H, S, d] -> [B, H, L, d].

    `mask` is bool, broadcastable to [B, H, L, S], True where a query may look; it already includes causality.
    """
    if implementation == "eager":
        return attention_weights(q, k, mask, causal) @ v
    if implementation == "sdpa" and q.device.type == "cpu":
        return _attend_on_cpu(q, k, v, mask, causal)
    with sdpa_kernel(_kernels(q, implementation, mask)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None)


def _attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The fastest way that was measured, by precision, length and whether there will be a backward pass.

    torch's flash kernel is good in fp32, but its backward pass in bf16 took five times as long as plain products, and
    with bf16 products inside fp32 it was 5 to 7 times slower than they are. Where the weights [B, H, L, S] would grow
    large they are not kept: in half precision the kernel then runs in fp32.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if torch.get_float32_matmul_precision() != "highest" and not half:
        return _products(q, k, v, mask, causal)
    if learns and k.shape[-2] <= (_LONGEST_PRODUCTS_HALF if half else _LONGEST_PRODUCTS):
        return _products(q, k, v, mask, causal)
    with torch.autocast("cpu", enabled=False):
        wide = (t.float() if half and learns else t for t in (q, k, v))
        return F.scaled_dot_product_attention(*wide, attn_mask=mask, is_causal=causal and mask is None).to(q.dtype)


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """As `attend`, by two batched products and a softmax between them.

    In half precision the scores are rounded before the softmax, as in any eager attention: where they reach 80 and
    more, gradients are less exact than the fused kernel's (4 % beside 0.6 % off in bf16 at a length of 197).
    """
    batch, heads, length, width = q.shape
    queries, keys, values = (t.reshape(batch * heads, t.shape[-2], width) for t in (q, k, v))
    if mask is None and causal:
        mask = causal_mask(length, q.device)
    bias = q.new_zeros(1) if mask is None else q.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    if bias.dim() == 4 and bias.shape[0] * bias.shape[1] > 1:
        bias = bias.expand(batch, heads, length, -1).reshape(batch * heads, length, -1)
    elif bias.dim() == 4:
        bias = bias[0, 0]
    scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=width**-0.5)
    return torch.bmm(scores.softmax(-1), values).view(batch, heads, length, width)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) in fp32 or better, in the dtype of q: [B, H, L, S]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is None and causal:
        mask = causal_mask(scores.shape[-1], scores.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)


def causal_mask(length: int, device: torch.device) -> Tensor:
    """Bool [L, L], True where a token may look: at itself and at those before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _kernels(q: Tensor, implementation: Implementation, mask: Tensor | None) -> list[SDPBackend]:
    if implementation == "flash" and mask is None:  # no flash kernel takes a mask
        if q.is_cuda and q.dtype not in (torch.float16, torch.bfloat16):
            raise UserError("attention=flash needs bf16 or fp16 on a GPU: set the precision, or attention=sdpa")
        return [SDPBackend.FLASH_ATTENTION]
    return _ALL_KERNELS


def set_attention(model: nn.Module, implementation: str) -> None:
    """Choose how every layer of `model` attends, those of timm and transformers included. Raises UserError.

    timm knows eager and fused; transformers' own `flash` needs another package, so flash means sdpa there.
    """
    if implementation not in get_args(Implementation):
        raise UserError(f"unknown attention '{implementation}': {closest(implementation, get_args(Implementation))}")
    for module in model.modules():
        if hasattr(module, "attention_implementation"):
            module.attention_implementation = implementation  # type: ignore[assignment]
        elif hasattr(module, "fused_attn"):
            module.fused_attn = implementation != "eager"  # type: ignore[assignment]
        elif hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("eager" if implementation == "eager" else "sdpa")  # type: ignore[operator]
