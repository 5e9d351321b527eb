"""torch.compile, block by block: the layers that a tower repeats, so that one compilation serves all of them."""

import logging
from collections import Counter

import torch
from torch import nn

log = logging.getLogger(__name__)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """What towers are stacks of: the innermost modules with parts of their own of which a list holds several."""
    found: dict[nn.Module, None] = {}
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            kinds = Counter(type(child) for child in module)
            found |= {child: None for child in module if kinds[type(child)] > 1 and any(child.children())}
    return [block for block in found if not any(inner in found for inner in block.modules() if inner is not block)]


def compile_blocks(model: nn.Module, accelerator: str = "auto") -> bool:
    """Compile the repeated blocks of `model` in place; names of parameters stay. Whether it was possible.

    `accelerator` as the Trainer takes it. Where torch.compile does not work there (no C++ compiler, no Triton) a
    warning says why, and the model stays as it is. The first batch waits for the compiler: 75 to 100 s for a ViT-B-32
    on two CPU cores.
    """
    found = None if accelerator == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    device = found or torch.device("cpu")
    try:
        torch.compile(lambda x: (x + 1).relu())(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001 - the compilers below torch fail with errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("model.compile=true: torch.compile does not work here, going on without it: %s", reason)
        return False
    # One forward serves both towers, all lengths, training and evaluation: more shapes than torch keeps by itself.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in repeated_blocks(model):
        block.compile()
    return True
