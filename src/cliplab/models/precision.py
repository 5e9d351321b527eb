"""Half-precision weights as OpenAI and open_clip store them."""

import torch
from torch import nn

from cliplab.errors import UserError
from cliplab.registry import closest

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "pure_bf16": torch.bfloat16, "pure_fp16": torch.float16}
PRECISIONS = ("fp32", *_DTYPES)
# Parameters beside those of Linear and convolutions that take part in products.
_PRODUCT_NAMES = ("in_proj_weight", "in_proj_bias", "text_projection", "proj")


def cast(model: nn.Module, precision: str) -> None:
    """fp32; bf16, fp16: what is multiplied in half precision, norms and embeddings in fp32; pure_*: all in half.

    A timm trunk or a Hugging Face encoder is cast whole: their norms give back what their weights are in.
    """
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision '{precision}': {closest(str(precision), PRECISIONS)}")
    if precision == "fp32":
        model.float()
    elif precision.startswith("pure_"):
        model.to(_DTYPES[precision])
    else:
        _cast_products(model.float(), _DTYPES[precision])


def _cast_products(module: nn.Module, dtype: torch.dtype) -> None:
    if _is_foreign(module):
        module.to(dtype)
        return
    whole = isinstance(module, nn.Linear | nn.Conv2d)
    for name, parameter in module.named_parameters(recurse=False):
        if whole or name in _PRODUCT_NAMES:
            parameter.data = parameter.data.to(dtype)
    for child in module.children():
        _cast_products(child, dtype)


def _is_foreign(module: nn.Module) -> bool:
    return not type(module).__module__.startswith(("cliplab.", "torch."))
