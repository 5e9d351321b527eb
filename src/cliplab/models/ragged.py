"""Texts of different lengths as one sequence of tokens, without what lies behind their ends."""

import torch
from torch import Tensor


class Ragged:
    """The tokens that lie behind no text's end: T of B * L.

    A causal tower that is pooled at the end never sees what follows it: features and gradients stay the same. All but
    attention works on the T tokens; attention pads them to the longest text.
    """

    def __init__(self, ends: Tensor) -> None:
        """`ends` int64 [B]: the last token of each text that counts. Waits for the device once."""
        self.ends, self.batch, self.length = ends, len(ends), int(ends.max()) + 1
        self.inside = torch.arange(self.length, device=ends.device) <= ends[:, None]  # bool [B, L]
        # On a GPU the padding of a batch costs less than gathering it away: it is only cut to the longest text there.
        pack = ends.device.type == "cpu"
        self._kept = self.inside.flatten().nonzero()[:, 0] if pack and not bool(self.inside.all()) else None

    @property
    def last(self) -> Tensor:
        """int64 [B]: where the last token of each text is among all tokens."""
        if self._kept is not None:
            return (self.ends + 1).cumsum(0) - 1
        return torch.arange(self.batch, device=self.ends.device) * self.length + self.ends

    def pack(self, x: Tensor) -> Tensor:
        """[B, >= L, W] -> [T, W]; [B, L, W] where nothing is gained."""
        x = x[:, : self.length]
        return x if self._kept is None else x.flatten(0, 1).index_select(0, self._kept)

    def pad(self, x: Tensor) -> Tensor:
        """[T, W] -> [B, L, W], zero behind the ends."""
        if self._kept is None:
            return x
        padded = x.new_zeros(self.batch * self.length, x.shape[-1]).index_copy(0, self._kept, x)
        return padded.unflatten(0, (self.batch, self.length))
