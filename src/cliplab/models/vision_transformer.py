"""The ViT image tower of CLIP (Dosovitskiy et al., 2021; Radford et al., 2021)."""

import torch
from torch import Tensor, nn

from cliplab.models.transformer import Transformer


class VisionTransformer(nn.Module):
    """Patches and a class token -> the projected class token."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        activation: type[nn.Module],
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, mlp_ratio, activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def tokens(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> class and patch tokens after ln_post [B, 1 + N, W]."""
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [B, W, h, w] -> [B, N, W]
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding.to(x.dtype)
        return self.ln_post(self.transformer(self.ln_pre(x)))

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens [B, 1 + N, W] -> projected features [B, D]."""
        return tokens[:, 0] @ self.proj

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> features [B, D], not unit length."""
        return self.pool(self.tokens(images))
