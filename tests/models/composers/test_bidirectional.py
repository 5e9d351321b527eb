import pytest
import torch
from torch import Tensor

from cliplab.errors import UserError
from cliplab.models.composers.bidirectional import Bidirectional
from cliplab.models.composers.combiner import Combiner
from cliplab.models.text_transformer import TextTransformer
from tests.models.composers.test_combiner import by_hand as combined
from tests.models.composers.text_towers import (
    WIDTH,
    D,
    assert_same,
    embedded,
    make_tower,
    make_words,
    plain_feature,
    to_unit,
)

TEXTS = ["is long", "", "red " * 20, "blue and striped"]  # the third fills the context


def make_composer(**options: object) -> Bidirectional:
    torch.manual_seed(1)
    composer = Bidirectional(D, WIDTH, make_words(), **options).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        composer.directions += torch.randn_like(composer.directions)
    return composer


def features(tower: TextTransformer, direction: Tensor) -> Tensor:
    rows = []
    for text in TEXTS:
        numbers = [90, *make_words().numbers(text)[:9]]  # start, nine words, direction and end are the twelve
        rows.append(plain_feature(tower, [*embedded(tower, numbers, {}), direction, tower.token_embedding.weight[91]]))
    return torch.stack(rows)


def plain_query(composer: Bidirectional, i: Tensor, t: Tensor) -> Tensor:
    if isinstance(composer.base, Combiner):
        return combined(composer.base, i, t)
    return to_unit(list(i + t))


@pytest.mark.parametrize("base", ["sum", "combiner"])
def test_both_directions(base: str) -> None:
    tower, words, composer = make_tower(), make_words(), make_composer(base=base, reverse_weight=0.3)
    i, y = (torch.randn(4, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    extra = {"text_tower": tower, "token_ids": words.batch(*TEXTS)}
    forward, backward = composer.training_pairs(i, torch.empty(4, 0), y, **extra)
    there = plain_query(composer, i, features(tower, composer.directions[0]))
    back = plain_query(composer, y, features(tower, composer.directions[1]))
    inputs = (composer.directions, *composer.base.parameters(), *tower.parameters())
    assert_same(forward.query, there, (i, *inputs))
    assert_same(backward.query, back, (y, *inputs))
    assert (forward.weight, backward.weight) == (1, 0.3)
    for found, expected in ((forward.target, y), (backward.target, i), (forward.reference, i), (backward.reference, y)):
        torch.testing.assert_close(found, to_unit(list(expected)))
    torch.testing.assert_close(composer.compose(i, torch.empty(4, 0), **extra), forward.query, rtol=0, atol=0)


def test_options() -> None:
    composer = make_composer()
    assert composer.reverse_weight == 0.4 and not list(composer.base.parameters())
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="bidirectional.*reverse_weight"):
            make_composer(reverse_weight=weight)
