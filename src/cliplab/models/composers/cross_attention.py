"""Flamingo's way (Alayrac et al., NeurIPS 2022): the text tower looks at the reference image between its blocks."""

from typing import Any

import torch
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.attention import attend
from cliplab.models.chunks import encode_in_chunks
from cliplab.models.composers.composer import Composer, unit
from cliplab.models.text_transformer import CLIPTextTower
from cliplab.models.transformer import LayerNorm


class CrossAttention(Composer):
    """q = n(pooled and projected x), x the text, which after every `every`-th block b looks at the image's latents z.

    x <- x + tanh(alpha_b) Attention_b(LN(x), z),   x <- x + tanh(beta_b) MLP_b(x)
    z = Resampler(image tokens), see below; alpha_b and beta_b start at 0, so that training begins at text_only.
    Departures: one picture a text, so no mask; the gated layers follow the blocks, the paper's precede them.
    """

    inputs = frozenset({"image_tokens", "text_tower"})

    def __init__(
        self,
        image_width: int,
        text_width: int,
        text_blocks: int | None,
        latents: int = 32,
        depth: int = 2,
        heads: int = 8,
        every: int = 1,
    ) -> None:
        super().__init__()
        if text_blocks is None:
            raise UserError(
                "composer 'cross_attention' needs the blocks of CLIP's text tower, which this model has not"
            )
        if min(latents, depth, heads, every) < 1 or text_width % heads or every > text_blocks:
            raise UserError(
                f"composer 'cross_attention' needs latents, depth, heads and every of 1 or more, heads that divide the "
                f"text's width of {text_width} and every of at most its {text_blocks} blocks, got {latents}, {depth}, "
                f"{heads}, {every}"
            )
        self.every = every
        self.resampler = Resampler(image_width, text_width, latents, depth, heads)
        self.layers = nn.ModuleList(GatedLayer(text_width, heads) for _ in range(text_blocks // every))

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        """`image_tokens` [B, 1 + N, V], `text_tower`, `token_ids` [B, L] -> [B, D]; both features are not used."""
        tower, ids = extra["text_tower"], extra["token_ids"]
        assert isinstance(tower, CLIPTextTower)
        ends = tower.ends(ids) if tower.text_causal else None
        if ends is not None:  # what follows the longest text is seen by none of its tokens
            ids = ids[:, : int(ends.max()) + 1]

        def read(ids: Tensor, image_tokens: Tensor) -> Tensor:
            latents = self.resampler(image_tokens)

            def look(block: int, x: Tensor) -> Tensor:
                return x if (block + 1) % self.every else self.layers[block // self.every](x, latents)

            x = tower.transformer.forward_between(tower.with_positions(tower.embed(ids)), look, tower.text_causal)
            return unit(tower.pool(tower.ln_final(x), ids))

        return encode_in_chunks(read, ids, extra["image_tokens"], size=self.chunk_size)


class Resampler(nn.Module):
    """Flamingo's Perceiver resampler: R learned latents z look at the image tokens x and at themselves.

    x = Lin(V, W) tokens;  `depth` times: z <- z + Attention(LN(z), [LN(x); LN(z)]),  z <- z + MLP(z);  then LN(z)
    """

    def __init__(self, image_width: int, width: int, latents: int, depth: int, heads: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.project = nn.Linear(image_width, width)
        self.layers = nn.ModuleList(ResamplerLayer(width, heads) for _ in range(depth))
        self.norm = LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Image tokens [B, N, V] -> latents [B, R, W]."""
        x = self.project(tokens)
        z = self.latents.to(x.dtype).expand(len(x), -1, -1)
        for layer in self.layers:
            z = layer(z, x)
        return self.norm(z)


class ResamplerLayer(nn.Module):
    """The attention of the latents and their MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = LayerNorm(width), Attention(width, heads), mlp(width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Latents [B, R, W], image [B, N, W] -> [B, R, W]."""
        z = z + self.attention(z, torch.cat([self.norm(x), self.attention.norm(z)], dim=1))
        return z + self.mlp(z)


class GatedLayer(nn.Module):
    """Cross-attention and an MLP, each behind a tanh gate that starts closed."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), mlp(width)
        self.gates = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """Text [B, L, W], latents [B, R, W] -> [B, L, W]."""
        of_attention, of_mlp = torch.tanh(self.gates).to(x.dtype)
        x = x + of_attention * self.attention(x, latents)
        return x + of_mlp * self.mlp(x)


class Attention(nn.Module):
    """Multi-head attention whose queries, normed here, and keys come from two sequences; without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, L, W] looks at context [B, S, W] -> [B, L, W]."""
        parts = (self.q(self.norm(x)), *self.kv(context).chunk(2, dim=-1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


def mlp(width: int) -> nn.Sequential:
    """Flamingo's feed-forward layer: Lin(4 W, W) . GELU . Lin(W, 4 W) . LN, without biases."""
    first, last = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
    return nn.Sequential(LayerNorm(width), first, nn.GELU(), last)
