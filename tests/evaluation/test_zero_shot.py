import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cliplab
from cliplab.data.templates import CIFAR, IMAGENET
from cliplab.errors import UserError
from cliplab.evaluation.zero_shot import zero_shot_weights
from tests.conftest import TINY

NAMES = ["dress", "t-shirt", "polar bear", "hat", "a {curly} shoe"]


@pytest.fixture(scope="module")
def model() -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(**TINY).eval()


@pytest.fixture(scope="module")
def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=32)


def test_it_is_part_of_the_package() -> None:
    assert cliplab.zero_shot_weights is zero_shot_weights


@pytest.mark.parametrize("templates", [IMAGENET, CIFAR[:2], [lambda name: f"{name}, upper case"]])
@pytest.mark.parametrize("batch_size", [7, 256])
def test_the_weights_are_open_clips(model, tokenizer, templates, batch_size) -> None:
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, templates)
    found = zero_shot_weights(model, tokenizer, NAMES, templates, batch_size)
    assert found.shape == (16, 5) and not found.requires_grad
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.norm(dim=0), torch.ones(5))


def test_features_are_normalised_before_and_after_the_mean() -> None:
    """Prompts of even and of odd length have the features (3, 0) and (0, 1): their raw mean would point elsewhere."""

    class Table:
        def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
            features = torch.tensor([[3.0, 0.0], [0.0, 1.0]])[text[:, 0]]
            return F.normalize(features, dim=-1) if normalize else features

    def tokenizer(texts: list[str]) -> Tensor:
        return torch.tensor([[len(text) % 2] for text in texts])

    found = zero_shot_weights(Table(), tokenizer, ["a"], ["{}", "a{}"])
    torch.testing.assert_close(found, torch.full((2, 1), 0.5**0.5))


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["{}"], "none of them empty"),
        (["a"], [], "none of them empty"),
        ("hat", ["{}"], "a list of class names"),
        (["a"], "a {}", "a list of templates"),
        (["a"], ["a photo"], r"'a photo' has no \{\}"),
        (["a"], ["{} and {}"], "must hold {} once"),
        (["a"], ["{name}"], "must hold {} once"),
        (["a"], ["{"], "must hold {} once"),
    ],
)
def test_bad_names_and_templates_are_refused(model, tokenizer, names, templates, message) -> None:
    with pytest.raises(UserError, match=message):
        zero_shot_weights(model, tokenizer, names, templates)
