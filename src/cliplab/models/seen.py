"""Who looks at a module from outside, and what in it draws at random: shortcuts stand back for both."""

import torch
from torch import nn


def is_watched(*modules: nn.Module) -> bool:
    """Whether anyone expects whole tensors of them or of their parts: hooks of any kind, or a trace being recorded."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for module in modules
        for part in module.modules()
    )


def draws(module: nn.Module) -> bool:
    """Whether equal rows may get different results: dropout of any kind in training, an adapter's for example."""
    kinds = ("dropout", "drop_path", "droppath", "stochasticdepth")
    names = (type(part).__name__.lower() for part in module.modules() if part.training)
    return any(kind in name for name in names for kind in kinds)
