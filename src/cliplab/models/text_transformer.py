"""CLIP's text tower, as a mixin: open_clip's CLIP keeps these parameters at its root, other models under `text.`."""

import torch
from torch import Tensor, nn

from cliplab.models.transformer import Transformer


class TextTower(nn.Module):
    """Everything that handles text: `embed`, `encode_embeddings`, `pool`. Reached through `model.text_tower`.

    The three steps are apart so that a composer can put a pseudo-word in place of a token embedding (Pic2Word).
    """

    context_length: int
    vocab_size: int
    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    transformer: Transformer
    ln_final: nn.LayerNorm
    text_projection: nn.Parameter

    def build_text(
        self,
        context_length: int,
        vocab_size: int,
        width: int,
        heads: int,
        layers: int,
        embed_dim: int,
        activation: type[nn.Module],
        mlp_ratio: float = 4.0,
    ) -> None:
        """Create the parameters with CLIP's initialisation."""
        self.context_length, self.vocab_size = context_length, vocab_size
        self.transformer = Transformer(width, layers, heads, mlp_ratio, activation)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        self.transformer.initialize()

    def text_parameters(self) -> list[nn.Parameter]:
        """The parameters of the text tower alone."""
        modules = (self.transformer, self.token_embedding, self.ln_final)
        return [self.positional_embedding, self.text_projection, *(p for m in modules for p in m.parameters())]

    def embed(self, text: Tensor) -> Tensor:
        """Token ids [B, L] -> token embeddings [B, L, W], without positions."""
        return self.token_embedding(text)

    def encode_embeddings(self, embeddings: Tensor) -> Tensor:
        """Token embeddings [B, L, W] -> contextual tokens after ln_final [B, L, W], causal."""
        x = embeddings + self.positional_embedding[: embeddings.shape[1]].to(embeddings.dtype)
        return self.ln_final(self.transformer(x, causal=True))

    def pool(self, tokens: Tensor, text: Tensor) -> Tensor:
        """Contextual tokens [B, L, W], ids [B, L] -> projected features [B, D] at the end token.

        CLIP's rule: the end token has the largest id, and argmax returns its first position.
        """
        return tokens[torch.arange(len(text), device=text.device), text.argmax(dim=-1)] @ self.text_projection

    def forward_text(self, text: Tensor) -> Tensor:
        """Token ids [B, L] -> features [B, D], not unit length."""
        return self.pool(self.encode_embeddings(self.embed(text)), text)
