"""A linear classifier on the mean of an image tower's patch tokens: transformers' CLIPForImageClassification."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliplab.data.images import ImagePreprocess
from cliplab.errors import UserError
from cliplab.models.attention import set_attention
from cliplab.models.image_tower import ImageTower
from cliplab.models.vision_transformer import VisionTransformer
from cliplab.pretrained import build_tower
from cliplab.sources import find_source

if TYPE_CHECKING:
    from transformers.modeling_outputs import ImageClassifierOutput


class ImageClassifier(nn.Module):
    """`visual` and a linear `classifier`: fine-tune both, or lock the tower first (`visual.lock()`)."""

    def __init__(self, visual: ImageTower, num_labels: int, preprocess: ImagePreprocess | None = None) -> None:
        super().__init__()
        if num_labels < 1:
            raise UserError(f"num_labels must be 1 or more, got {num_labels}")
        self.visual, self.preprocess = visual, preprocess
        self.classifier = nn.Linear(visual.width, num_labels)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        weights: str | Path | None = None,
        num_labels: int | None = None,
        device: str | torch.device = "cpu",
        **overrides: Any,
    ) -> ImageClassifier:
        """The image tower of whatever `cliplab.load` takes, in evaluation mode.

        A folder of CLIPForImageClassification brings its classifier; one of other `num_labels` is new.
        """
        source = find_source(str(name), str(weights) if weights is not None else None, overrides)
        stored = source.weights.state_dict if source.weights is not None else {}
        head = {key: stored[f"classifier.{key}"] for key in ("weight", "bias") if f"classifier.{key}" in stored}
        labels = num_labels if num_labels is not None or not head else len(head["bias"])
        if labels is None:
            raise UserError(f"{name} holds no classifier: give num_labels for a new one")
        tower = build_tower(source, "image", projection=False)
        assert isinstance(tower, ImageTower)
        set_attention(tower, overrides.get("attention") or "sdpa")
        model = cls(tower, labels, ImagePreprocess(source.preprocess))
        if head and labels == len(head["bias"]):
            model.classifier.load_state_dict(head)
        return model.to(device).eval()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Normalised pictures [B, 3, H, W] -> ImageClassifierOutput with logits [B, C] and, with labels, loss.

        Labels: class numbers int64 [B] (cross-entropy), or float [B, C] (binary cross-entropy, several labels each).
        """
        from transformers.modeling_outputs import ImageClassifierOutput

        # Hugging Face leaves CLIP's tokens without the final norm here; other towers' tokens are normed.
        is_normed = not isinstance(self.visual, VisionTransformer)
        found = self.visual.forward_intermediates(pixel_values, 1, False, is_normed, True, "NLC")
        logits = self.classifier(found["image_intermediates"][0].mean(dim=1).to(self.classifier.weight.dtype))
        loss = None
        if labels is not None and labels.is_floating_point():
            loss = F.binary_cross_entropy_with_logits(logits, labels)
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]
