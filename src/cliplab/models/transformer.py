"""The residual attention block that both CLIP towers are made of; parameter names are open_clip's."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cliplab.errors import UserError
from cliplab.models.attention import AttentionMaps, Implementation, attend, attention_weights, causal_mask
from cliplab.models.fused import linear
from cliplab.models.ragged import Ragged
from cliplab.models.seen import is_watched

Indices = int | Sequence[int] | None
Layer = Callable[..., nn.Module]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's weights; it belongs to the weights, not to the architecture."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * torch.sigmoid(1.702 * x)


class LayerNorm(nn.LayerNorm):
    """Computed in the precision of its weights and given back in that of its input.

    With weights in half precision all around fp32 norms (OpenAI's storage) the statistics so stay in fp32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Any shape that ends in W."""
        if input.is_cpu and self.weight.dtype == torch.float32:  # reads half precision as it is, with the same result
            return super().forward(input)
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


class LayerScale(nn.Module):
    """x * gamma, gamma [W] learned (Touvron et al., 2021)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(initial * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, W] -> [B, L, W]."""
        return x * self.gamma.to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with packed q, k, v (Vaswani et al., 2017)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads != 0:
            raise UserError(f"a width of {width} can't be divided into {heads} heads")
        self.heads = heads
        self.attention_implementation: Implementation = "sdpa"
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        causal: bool = False,
        mask: Tensor | None = None,
        maps: AttentionMaps | None = None,
        ragged: Ragged | None = None,
    ) -> Tensor:
        """[B, L, W] -> [B, L, W]; `causal`: a token sees itself and those before it; `mask` as in `attend`.

        `ragged`: x is what it packed.
        """
        q, k, v = self._heads(linear(x, self.in_proj_weight, self.in_proj_bias), ragged)
        if maps is not None:
            maps.append(attention_weights(q, k, mask, causal))
            attended = maps[-1] @ v
        else:
            attended = attend(q, k, v, self.attention_implementation, mask, causal)
        joined = attended.transpose(1, 2).flatten(2)
        return self.out_proj(joined if ragged is None else ragged.pack(joined))

    def attend_from(self, queries: Tensor, x: Tensor, mask: Tensor | None, ragged: Ragged | None) -> Tensor:
        """One token of each row [B, W] that looks at the tokens x of its row, as in `forward` -> [B, W]."""
        width, weight = x.shape[-1], self.in_proj_weight  # once: an adapter computes it anew each time
        q = F.linear(queries, weight[:width], self.in_proj_bias[:width])
        k, v = self._heads(F.linear(x, weight[width:], self.in_proj_bias[width:]), ragged)
        attended = attend(q.unflatten(-1, (self.heads, 1, -1)), k, v, self.attention_implementation, mask)
        return self.out_proj(attended.flatten(1))

    def _heads(self, packed: Tensor, ragged: Ragged | None) -> tuple[Tensor, ...]:
        """[B, L, n W] -> n of [B, H, L, W/H]."""
        padded = packed if ragged is None else ragged.pad(packed)
        return (
            padded.unflatten(-1, (-1, self.heads, self.out_proj.in_features // self.heads))
            .permute(2, 0, 3, 1, 4)
            .unbind()
        )


class ResidualAttentionBlock(nn.Module):
    """Pre-norm attention and MLP, each with its residual and, by option, a layer scale."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        activation: Layer,
        norm: Layer = LayerNorm,
        ls_init_value: float | None = None,
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.ln_1 = norm(width)
        self.attn = Attention(width, heads)
        self.ls_1 = LayerScale(width, ls_init_value) if ls_init_value is not None else nn.Identity()
        self.ln_2 = norm(width)
        layers = [("c_fc", nn.Linear(width, hidden)), ("gelu", activation()), ("c_proj", nn.Linear(hidden, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ls_2 = LayerScale(width, ls_init_value) if ls_init_value is not None else nn.Identity()

    def forward(
        self,
        x: Tensor,
        causal: bool = False,
        mask: Tensor | None = None,
        maps: AttentionMaps | None = None,
        ragged: Ragged | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """[B, L, W] -> [B, L, W]; with `ragged` what it packed.

        `places` int64 [B]: only these of all tokens, one of each row, are wanted -> [B, W].
        """
        normed = self.ln_1(x)
        if places is None:
            x = x + self.ls_1(self.attn(normed, causal, mask, maps, ragged))
        else:
            x, queries = (t.reshape(-1, t.shape[-1]).index_select(0, places) for t in (x, normed))
            x = x + self.ls_1(self.attn.attend_from(queries, normed, mask, ragged))
        return x + self.ls_2(self._mlp(self.ln_2(x)))

    def _mlp(self, x: Tensor) -> Tensor:
        """`mlp`, its first two layers as one where no hook stands between them."""
        first, activation, last = self.mlp
        if type(first) is not nn.Linear or is_watched(self.mlp):  # an adapter in its place
            return self.mlp(x)
        return last(linear(x, first.weight, first.bias, activation))


class Transformer(nn.Module):
    """A stack of blocks; `grad_checkpointing` recomputes each block in the backward pass instead of keeping it."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation: Layer = nn.GELU,
        norm: Layer = LayerNorm,
        ls_init_value: float | None = None,
    ) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, mlp_ratio, activation, norm, ls_init_value) for _ in range(layers)
        )

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the blocks multiply in."""
        return self.get_parameter("resblocks.0.mlp.c_fc.weight").dtype

    def forward(
        self, x: Tensor, causal: bool = False, key_mask: Tensor | None = None, maps: AttentionMaps | None = None
    ) -> Tensor:
        """[B, L, W] -> [B, L, W]; `key_mask` bool [B, L]: True for tokens that may be looked at."""
        return self.forward_intermediates(x, (), False, causal, key_mask, maps)[0]

    def forward_at(self, x: Tensor, places: Tensor, causal: bool = False, ragged: Ragged | None = None) -> Tensor:
        """The last output of one token of each row, `places` int64 [B] among all tokens: [B, L, W] -> [B, W].

        The last block computes nothing else. A causal token must be the last of its row's in `ragged`.
        """
        last = len(self.resblocks) - 1
        for block in self.resblocks[:last]:
            x = self._run(block, x, causal, None, None, ragged)
        mask = ragged.inside[:, None, None] if ragged is not None else None
        return self._run(self.resblocks[last], x, False, mask, None, ragged, places)

    def _run(self, block: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, *rest, use_reentrant=False)  # type: ignore[return-value]
        return block(x, *rest)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        stop_early: bool = False,
        causal: bool = False,
        key_mask: Tensor | None = None,
        maps: AttentionMaps | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The last output [B, L, W] and those of the blocks `indices` (see `taken_indices`), in order of depth."""
        taken = taken_indices(len(self.resblocks), indices)
        mask = _attention_mask(key_mask, causal, x.shape[1])
        intermediates = []
        for index, block in enumerate(self.resblocks):
            x = self._run(block, x, causal, mask) if maps is None else block(x, causal, mask, maps)
            if index in taken:
                intermediates.append(x)
            if stop_early and index == max(taken):
                break
        return x, intermediates

    def forward_between(self, x: Tensor, between: Callable[[int, Tensor], Tensor], causal: bool = False) -> Tensor:
        """[B, L, W] -> [B, L, W]; `between` makes of the number of each block and its output what goes on."""
        for number, block in enumerate(self.resblocks):
            x = between(number, self._run(block, x, causal))
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


def taken_indices(total: int, indices: Indices) -> set[int]:
    """None: all, n: the last n, a list: those, negative ones counted from the end. Raises UserError."""
    wanted = range(total) if indices is None else range(total - indices, total) if isinstance(indices, int) else indices
    taken = {index + total if index < 0 else index for index in wanted}
    if (isinstance(indices, int) and not 0 < indices <= total) or not taken <= set(range(total)):
        raise UserError(f"intermediates {indices} of {total} blocks: give None, 1 to {total} or a list of numbers")
    return taken


def activation_of(quick_gelu: bool, options: Mapping[str, Any] | None) -> Layer:
    """QuickGELU or GELU with its options, for example `approximate`."""
    return partial(QuickGELU if quick_gelu else nn.GELU, **(options or {}))


def norm_of(options: Mapping[str, Any] | None) -> Layer:
    """LayerNorm with its options, for example `eps`."""
    return partial(LayerNorm, **(options or {}))


def _attention_mask(key_mask: Tensor | None, causal: bool, length: int) -> Tensor | None:
    """Bool, broadcastable to [B, H, L, L], True where a query may look; None where causality says it all."""
    if key_mask is None:
        return None
    mask = key_mask.bool()[:, None, None, :]
    if causal:
        mask = mask & causal_mask(length, mask.device)
    # A token with nothing to look at would become NaN, and NaN times a weight of zero spreads: let it see itself.
    alone = ~mask.any(dim=-1, keepdim=True)
    return mask | (alone & torch.eye(length, dtype=torch.bool, device=mask.device))
