"""The physical limit of a step: its matrix products and convolutions, forward and backward, and nothing else."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
}


class Recorder(TorchDispatchMode):
    """`with Recorder() as work: step()`; then `work.replay()` does the same products on noise."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []
        self._noise: dict[tuple, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.calls.append((func, tuple(map(self._operand, args)), dict(kwargs or {})))
        elif func is torch.ops.mkldnn._linear_pointwise.default:  # a product with its activation: the product alone
            self.calls.append(
                (aten.mm.default, (self._operand(args[0].flatten(0, -2)), self._operand(args[1].t())), {})
            )
        return func(*args, **(kwargs or {}))

    def _operand(self, given: Any) -> Any:
        """Noise of the same shape, strides and precision, once per kind."""
        if not isinstance(given, Tensor):
            return given
        kind = (tuple(given.shape), tuple(given.stride()), given.dtype)
        if kind not in self._noise:
            self._noise[kind] = torch.empty_strided(*kind[:2], dtype=kind[2]).normal_()
        return self._noise[kind]

    def replay(self) -> None:
        """Do the recorded products."""
        with torch.no_grad():
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)
