from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cliplab.models.ragged import Ragged
from cliplab.models.text_transformer import TextTransformer
from cliplab.models.transformer import Attention

SIZES = {"context_length": 9, "vocab_size": 40, "width": 24, "heads": 3, "layers": 3, "mlp_ratio": 3.0}
END = 39
ENDS = [2, 6, 4, 1]


def make_tower(**options: Any) -> TextTransformer:
    torch.manual_seed(0)
    tower = TextTransformer({**SIZES, **options}, 10).double()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return tower


def sentences(ends: list[int]) -> Tensor:
    """Ids with zeros among them, and behind the first end token anything at all."""
    text = torch.randint(0, END, (len(ends), 9))
    text[:, 0] = 0
    text[range(len(ends)), ends] = END
    return text


def whole(tower: TextTransformer, text: Tensor) -> Tensor:
    return tower.pool(tower.encode_embeddings(tower.embed(text)), text)


def gradients(module: nn.Module, features: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    (features * torch.linspace(-1, 2, features.numel(), dtype=features.dtype).view_as(features)).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each attention layer is given."""
    counts: list[int] = []
    for name, place in (("forward", 0), ("attend_from", 1)):
        original = getattr(Attention, name)

        def counted(self: Attention, *given: Any, original: Any = original, place: int = place) -> Tensor:
            counts.append(given[place].numel() // given[place].shape[-1])
            return original(self, *given)

        monkeypatch.setattr(Attention, name, counted)
    return counts


def test_what_is_packed_comes_back() -> None:
    ragged, x = Ragged(torch.tensor(ENDS)), torch.randn(4, 9, 5)
    packed = ragged.pack(x)
    assert torch.equal(packed, torch.cat([row[: end + 1] for row, end in zip(x, ENDS, strict=True)]))
    padded = ragged.pad(packed)
    assert padded.shape == (4, 7, 5)
    assert torch.equal(padded, x[:, :7] * (torch.arange(7) <= torch.tensor(ENDS)[:, None])[..., None])
    assert torch.equal(packed[ragged.last], x[torch.arange(4), ENDS])


def test_equal_lengths_are_only_cut() -> None:
    ragged, x = Ragged(torch.tensor([3, 3])), torch.randn(2, 9, 5)
    assert torch.equal(ragged.pack(x), x[:, :4]) and ragged.pad(x[:, :4]).shape == (2, 4, 5)
    assert ragged.last.tolist() == [3, 7]


@pytest.mark.parametrize("ends", [ENDS, [3, 3, 3], [8, 0, 8], [5]], ids=str)
@pytest.mark.parametrize("rule", ["argmax", "eos"])
def test_features_and_gradients_are_those_of_all_tokens(ends: list[int], rule: str, seen: list[int]) -> None:
    tower, text = make_tower(pool_type=rule, eos_id=END), sentences(ends)
    expected = whole(tower, text)
    assert seen == [len(ends) * 9] * 3
    found = tower(text)
    assert seen[3:] == [sum(ends) + len(ends)] * 3
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    wanted, got = gradients(tower, expected), gradients(tower, found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


def test_without_packing_a_row_is_only_cut_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""

    def cut(self: Ragged, ends: Tensor, original: Any = Ragged.__init__) -> None:
        original(self, ends)
        self._kept = None

    monkeypatch.setattr(Ragged, "__init__", cut)
    tower, text = make_tower(), sentences(ENDS)
    found, expected = tower(text), whole(tower, text)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    wanted, got = gradients(tower, expected), gradients(tower, found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize(
    "options", [{"pool_type": "first"}, {"pool_type": "last"}, {"pool_type": "none"}, {"no_causal_mask": True}], ids=str
)
def test_a_tower_that_sees_all_of_a_text_computes_all(options: dict[str, Any], seen: list[int]) -> None:
    tower, text = make_tower(**options), sentences(ENDS)
    found = tower(text)
    assert seen == [4 * 9] * 3
    assert torch.equal(found, whole(tower, text))


@pytest.mark.parametrize("place", ["", "resblocks.1", "resblocks.2.mlp"])
def test_a_hook_sees_all_tokens(place: str) -> None:
    tower, shapes = make_tower(), []
    hook = tower.transformer.get_submodule(place).register_forward_hook(lambda *given: shapes.append(given[2].shape))
    text = sentences(ENDS)
    torch.testing.assert_close(tower(text), whole(tower, text), rtol=0, atol=0)
    assert {tuple(shape) for shape in shapes} == {(4, 9, 24)} and len(shapes) == 2
    hook.remove()


def test_recomputed_activations_give_the_same_gradients() -> None:
    tower, text = make_tower(), sentences(ENDS)
    expected = gradients(tower, tower(text))
    tower.set_grad_checkpointing()
    for name, gradient in gradients(tower, tower(text)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0, msg=name)
