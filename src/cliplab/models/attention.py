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
    with sdpa_kernel(_kernels(q, implementation, mask)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None)


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
    # On a CPU with bf16 products inside fp32 the flash kernel was 5 to 7 times slower than plain products.
    reduced = q.device.type == "cpu" and torch.get_float32_matmul_precision() != "highest"
    return [SDPBackend.MATH] if reduced else _ALL_KERNELS


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
