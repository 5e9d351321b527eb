"""Pairs of our model and open_clip's with the same weights, and the comparison of their values and gradients."""

from collections.abc import Iterable, Mapping
from typing import Any

import open_clip.model
import torch
from torch import Tensor, nn

from cliplab.models.clip import CLIP, CustomTextCLIP, build_clip

FEATURES, GRADIENTS = 1e-5, 1e-4  # absolute; relative to a gradient's own norm, or to a hundredth of the largest
MODIFIED_RESNET = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "head_width": 32, "patch_size": None}
VIT = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16, "mlp_ratio": 3.3}
TEXT = {"context_length": 11, "vocab_size": 60, "width": 32, "heads": 2, "layers": 3, "mlp_ratio": 2.5}
TIMM_VIT = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"}


def perturb(module: nn.Module, scale: float = 0.1, seed: int = 0) -> None:
    """Move everything away from its start: biases at 0, norms at 1, residual branches at 0 would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() < 2:  # matrices are random already
                parameter += scale * noise(parameter)
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.weight += scale * noise(norm.weight).abs() + scale
            norm.running_mean += scale * noise(norm.running_mean)
            norm.running_var *= 1 + scale * noise(norm.running_var).abs()


def make_pair(config: Mapping[str, Any], seed: int = 0) -> tuple[CLIP | CustomTextCLIP, Any]:
    """Ours and open_clip's, in evaluation mode, with open_clip's weights, disturbed and moved strictly."""
    torch.manual_seed(seed)
    theirs = open_clip_model(config).eval()
    perturb(theirs, seed=seed)
    with torch.device("meta"):  # spares the initialisation
        ours = build_clip(config)
    ours.load_state_dict({key: value.clone() for key, value in theirs.state_dict().items()}, strict=True, assign=True)
    if any(buffer.is_meta for buffer in ours.buffers()):  # those that no state dict holds
        ours = build_clip(config)
        ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval(), theirs


def open_clip_model(config: Mapping[str, Any]) -> Any:
    config = dict(config)
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    return (open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP)(**config)


def pictures(batch: int, size: int | tuple[int, int], seed: int = 1) -> Tensor:
    height, width = size if isinstance(size, tuple) else (size, size)
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def sentences(batch: int, length: int, vocabulary: int, seed: int = 1) -> Tensor:
    """Random ids, the largest one as the end token somewhere, zeros behind it; the last sentence fills its row."""
    text = torch.randint(1, vocabulary - 1, (batch, length), generator=torch.Generator().manual_seed(seed))
    for row in range(batch):
        end = length - 1 if row == batch - 1 else 1 + (3 * row) % (length - 1)
        text[row, end], text[row, end + 1 :] = vocabulary - 1, 0
    return text


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; shapes and dtypes must be equal."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert torch.isfinite(expected).all() and expected.numel()
    return (found - expected).abs().max().item()


def assert_close(found: Tensor, expected: Tensor, what: str = "", tolerance: float = FEATURES) -> None:
    assert difference(found, expected) <= tolerance, f"{what}: {difference(found, expected)}"


def assert_same_output(found: Any, expected: Any) -> None:
    """Nested mappings, lists, tuples of tensors with the same keys and values; a mapping's order is no matter."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same_output(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_output(one, other)
    elif expected is None:
        assert found is None
    else:
        assert_close(found, expected, tolerance=FEATURES * max(1.0, expected.abs().max().item()))  # logits are large


def gradients(outputs: Iterable[Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Of a fixed random sum of the outputs; zeros for parameters that do not take part."""
    module.zero_grad()
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros(())
    for output in outputs:
        total = total + (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()
    total.backward()
    return {
        k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in module.named_parameters() if p.requires_grad
    }


def assert_same_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Key biases have no gradient in theory: norms below a hundredth of the largest are measured against that."""
    assert found.keys() == expected.keys()
    largest = max(gradient.norm().item() for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm().item() / max(gradient.norm().item(), 0.01 * largest)
        assert error <= GRADIENTS, f"{name}: {error}"


def assert_same_model(ours: nn.Module, theirs: nn.Module, images: Tensor, text: Tensor) -> None:
    """Features of both towers, unit or not, and the gradients of all parameters."""
    image, words = ours.encode_image(images), ours.encode_text(text)  # type: ignore[operator]
    their_image, their_words = theirs.encode_image(images), theirs.encode_text(text)  # type: ignore[operator]
    assert_close(image, their_image, "image features")
    assert_close(words, their_words, "text features")
    scale, their_scale = ours.get_parameter("logit_scale"), theirs.get_parameter("logit_scale")
    found = gradients((image, words, scale.exp() * image @ words.T), ours)
    expected = gradients((their_image, their_words, their_scale.exp() * their_image @ their_words.T), theirs)
    assert_same_gradients(found, expected)
