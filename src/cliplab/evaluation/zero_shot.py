"""Class names and templates -> the weights of a zero-shot classifier (Radford et al., 2021, section 3.1.4)."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from cliplab.errors import UserError
from cliplab.evaluation.evaluator import average_wordings

Template = str | Callable[[str], str]


class TextEncoder(Protocol):
    """What is needed of a model: cliplab's CLIP has it, and so have open_clip's models."""

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Token ids [B, L] -> features [B, D]."""
        ...


@torch.no_grad()
def zero_shot_weights(
    model: TextEncoder,
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[Template],
    batch_size: int = 256,
) -> Tensor:
    """Unit columns [D, C]: per class the mean of its prompts' unit features, normalised again.

    `image_features @ weights` are then the cosines of pictures and classes. A template is a format string with one {}
    or a function of the name; `tokenizer` makes texts to ids [B, L]. The model is used in the mode it is in.
    """
    if not class_names or not templates or isinstance(class_names, str) or isinstance(templates, str):
        raise UserError("zero_shot_weights needs a list of class names and a list of templates, none of them empty")
    prompts = [_fill(template, name) for name in class_names for template in templates]
    device = next((weight.device for weight in getattr(model, "parameters", list)()), torch.device("cpu"))
    features = [
        model.encode_text(tokenizer(prompts[start : start + batch_size]).to(device), normalize=True)
        for start in range(0, len(prompts), batch_size)
    ]
    classes = torch.arange(len(class_names)).repeat_interleave(len(templates))
    return average_wordings(torch.cat(features), classes).T


def _fill(template: Template, name: str) -> str:
    if not isinstance(template, str):
        return template(name)
    try:
        first, second = (template.format(word) for word in "ab")
    except (IndexError, KeyError, ValueError) as error:
        raise UserError(f"the template '{template}' must hold {{}} once, where the class name goes") from error
    if first == second:
        raise UserError(f"the template '{template}' has no {{}} where the class name goes")
    return template.format(name)
