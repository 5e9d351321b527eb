"""What surrounds the encoding of many inputs: evaluation mode without gradients, a progress bar."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No gradient, no dropout; afterwards as before."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def progress(steps: Sequence[Any] | DataLoader, description: str, shown: bool) -> Iterator[Any]:
    """The steps, with a bar on standard error that vanishes at the end."""
    from rich.console import Console
    from rich.progress import track

    yield from track(steps, description, console=Console(stderr=True), disable=not shown, transient=True)
