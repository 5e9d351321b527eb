from typing import Any

import pytest
import torch
from torch import Tensor

from cliplab.models.clip import CLIP
from cliplab.models.composed import ComposedRetriever
from cliplab.models.composers import Combiner
from cliplab.models.repeats import encode_once

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
TEXT = {"context_length": 6, "vocab_size": 20, "width": 32, "heads": 2, "layers": 2}
D = 16


def make_model(vision: dict[str, Any]) -> ComposedRetriever:
    torch.manual_seed(0)
    return ComposedRetriever(CLIP(D, vision, TEXT), Combiner(D, dropout=0.0), (0.5,) * 3, (0.3,) * 3).double()


def batch(size: int = 16) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Three images in six rows, one reference is another row's target; two of the captions are equal."""
    images = torch.randint(256, (3, 3, size, size), dtype=torch.uint8)
    text = torch.tensor([[0, 5, 19, 0, 0, 0], [0, 5, 19, 0, 0, 0], [7, 0, 3, 2, 19, 0]])
    return {"image": images[[0, 0, 2]], "text": text}, {"image": images[[1, 2, 0]]}


def count(model: ComposedRetriever, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    for tower, name in ((model.clip.visual, "forward"), (model.clip, "forward_text")):
        original = getattr(tower, name)
        monkeypatch.setattr(tower, name, lambda x, original=original: seen.append(len(x)) or original(x))
    return seen


def test_values_and_gradients_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (query, target) = make_model(VISION).train(), batch()
    weights = torch.randn(3, 2 * D, dtype=torch.float64)

    def run() -> list[Tensor]:
        vectors = torch.cat(model.training_pairs(query, target)[0][:2], dim=1)
        return [vectors, *torch.autograd.grad((vectors * weights).sum(), list(model.parameters()), allow_unused=True)]

    seen = count(model, monkeypatch)
    found = run()
    assert seen == [3, 2]
    monkeypatch.setattr("cliplab.models.composed.encode_once", lambda encode, given: encode(given))
    for one, other in zip(found, run(), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    separately = torch.cat([model.encode_query(query), model.encode_target(target)], dim=1)
    torch.testing.assert_close(found[0], separately, rtol=1e-9, atol=1e-11)


def test_images_that_only_look_alike_in_sum_are_told_apart() -> None:
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    images[1] = images[0].flip(-1)
    assert torch.equal(encode_once(lambda x: x.flatten(1).double(), images), images.flatten(1).double())


@pytest.mark.parametrize(
    ("vision", "training"), [(RESNET, True), (RESNET, False), ({**VISION, "patch_dropout": 0.5}, True)], ids=str
)
def test_statistics_and_dropout_see_every_row(
    vision: dict[str, Any], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (query, target) = make_model(vision).train(training), batch(vision["image_size"])
    seen = count(model, monkeypatch)
    model.training_pairs(query, target)
    assert seen == ([3, 2, 3] if training else [3, 2])
