"""The residual attention block that both CLIP towers are made of; parameter names are open_clip's."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's weights; it belongs to the weights, not to the architecture."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * torch.sigmoid(1.702 * x)


_ALL_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def _attention_kernels(x: Tensor) -> list[SDPBackend]:
    """On a CPU with bf16 products inside fp32 the flash kernel was 5 to 7 times slower than plain products."""
    reduced = x.device.type == "cpu" and torch.get_float32_matmul_precision() != "highest"
    return [SDPBackend.MATH] if reduced else _ALL_KERNELS


class Attention(nn.Module):
    """Multi-head self-attention with packed q, k, v (Vaswani et al., 2017)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        assert width % heads == 0, f"width {width} is no multiple of {heads} heads"
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """[B, L, W] -> [B, L, W]; `causal`: a token sees itself and those before it."""
        batch, length, width = x.shape
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = packed.view(batch, length, 3, self.heads, width // self.heads).permute(
            2, 0, 3, 1, 4
        )  # each [B, H, L, W/H]
        with sdpa_kernel(_attention_kernels(x)):
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(attended.transpose(1, 2).reshape(batch, length, width))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: type[nn.Module]) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, hidden)), ("gelu", activation()), ("c_proj", nn.Linear(hidden, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """[B, L, W] -> [B, L, W]."""
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int, heads: int, mlp_ratio: float, activation: type[nn.Module]) -> None:
        super().__init__()
        self.width = width
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, mlp_ratio, activation) for _ in range(layers)
        )

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """[B, L, W] -> [B, L, W]."""
        for block in self.resblocks:
            x = block(x, causal)
        return x

    def initialize(self) -> None:
        """CLIP's initialisation of the text tower: residual branches scaled down with depth (Radford et al., 2021)."""
        attention_std = self.width**-0.5
        projection_std = attention_std * (2 * len(self.resblocks)) ** -0.5
        for block in self.resblocks:
            nn.init.normal_(block.get_parameter("attn.in_proj_weight"), std=attention_std)
            nn.init.normal_(block.get_parameter("attn.out_proj.weight"), std=projection_std)
            nn.init.normal_(block.get_parameter("mlp.c_fc.weight"), std=(2 * self.width) ** -0.5)
            nn.init.normal_(block.get_parameter("mlp.c_proj.weight"), std=projection_std)
