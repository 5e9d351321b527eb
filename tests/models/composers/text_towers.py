"""Text towers of a few words, and their feature of one text written without batch or padding."""

import torch
from torch import Tensor

from cliplab.models.text_transformer import CLIPTextTower, TextTransformer
from tests.words import Words

KNOWN = "a photo of $ * that is red long blue striped"
WIDTH, D, LENGTH = 24, 10, 12
SIZES = {"context_length": LENGTH, "vocab_size": 92, "width": WIDTH, "heads": 3, "layers": 4}


def make_words() -> Words:
    return Words(KNOWN, LENGTH)


def make_tower(**options: object) -> TextTransformer:
    """In float64, with weights that are all random and large enough to matter."""
    torch.manual_seed(0)
    tower = TextTransformer({**SIZES, **options}, D).double()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return tower


def plain_feature(tower: CLIPTextTower, rows: list[Tensor]) -> Tensor:
    """The embeddings [W] of a text from its start to its end -> its feature [D]."""
    x = torch.stack([row + tower.positional_embedding[place] for place, row in enumerate(rows)])
    x = tower.ln_final(tower.transformer(x[None], causal=True))[0, -1]
    assert isinstance(tower.text_projection, torch.nn.Parameter)
    return x @ tower.text_projection


def embedded(tower: CLIPTextTower, numbers: list[int], words: dict[int, Tensor]) -> list[Tensor]:
    """The embeddings of ids, those of some replaced."""
    return [words[number] if number in words else tower.token_embedding.weight[number] for number in numbers]


def to_unit(rows: list[Tensor]) -> Tensor:
    return torch.stack([row / row.square().sum().sqrt() for row in rows])


def assert_same(query: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Values, and the gradients that reach `inputs`."""
    torch.testing.assert_close(query, expected, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn_like(query)
    found = torch.autograd.grad((query * cotangent).sum(), inputs, retain_graph=True)
    wanted = torch.autograd.grad((expected * cotangent).sum(), inputs, retain_graph=True)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    assert all(bool(gradient.any()) for gradient in found)
