"""A linear layer with what follows it in one pass: encoding in half precision on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: nn.Module | None = None) -> Tensor:
    """[..., W], [V, W], [V] -> activation(x weight^T + bias) [..., V].

    oneDNN adds the bias and applies GELU before it rounds to half precision; apart each is a pass over fresh memory,
    which took as long as the product. The operator knows no gradient.
    """
    plain = activation is None or (type(activation) is nn.GELU and activation.approximate == "none")
    if plain and _can_fuse(x, weight):
        attribute, algorithm = ("none", "") if activation is None else ("gelu", "none")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, attribute, [], algorithm)
    y = F.linear(x, weight, bias)
    return y if activation is None else activation(y)


def _can_fuse(x: Tensor, weight: Tensor) -> bool:
    half = x.dtype == weight.dtype == torch.bfloat16
    encoding = x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return half and encoding and hasattr(torch.ops.mkldnn, "_linear_pointwise") and _native()


def _native() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
