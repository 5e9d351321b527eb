import pytest
import torch
from torch import Tensor

from cliplab.errors import UserError
from cliplab.models.composers.cross_attention import Attention, CrossAttention, GatedLayer, Resampler
from cliplab.models.text_transformer import TextTransformer
from tests.models.composers.text_towers import WIDTH, D, assert_same, make_tower, make_words, to_unit

V, N, B, HEADS = 7, 5, 3, 3
TEXTS = ["is long", "", "red " * 20]


def make_composer(is_open: bool = True, **options: int) -> CrossAttention:
    torch.manual_seed(1)
    composer = CrossAttention(V, WIDTH, 4, latents=4, depth=2, heads=HEADS, **options).double()
    with torch.no_grad():
        for name, parameter in composer.named_parameters():
            if is_open or "gates" not in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return composer


def norm(layer: torch.nn.Module, x: Tensor) -> Tensor:
    mean, variance = x.mean(), ((x - x.mean()) ** 2).mean()
    return (x - mean) / (variance + 1e-5).sqrt() * layer.get_parameter("weight") + layer.get_parameter("bias")


def attended(layer: Attention, rows: list[Tensor], context: list[Tensor]) -> list[Tensor]:
    """Head by head, token by token."""
    size, found = WIDTH // HEADS, []
    keys = [(layer.kv.weight @ row)[:WIDTH] for row in context]
    values = [(layer.kv.weight @ row)[WIDTH:] for row in context]
    for row in rows:
        q, heads = layer.q.weight @ norm(layer.norm, row), []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            weights = torch.stack([q[part] @ key[part] / size**0.5 for key in keys]).exp()
            heads.append(sum(w * value[part] for w, value in zip(weights / weights.sum(), values, strict=True)))
        found.append(layer.out.weight @ torch.cat(heads))
    return found


def fed_forward(layers: torch.nn.Sequential, row: Tensor) -> Tensor:
    hidden = layers[1].get_parameter("weight") @ norm(layers[0], row)
    return layers[3].get_parameter("weight") @ (hidden / 2 * (1 + torch.erf(hidden / 2**0.5)))


def resampled(resampler: Resampler, tokens: Tensor) -> list[Tensor]:
    x = [resampler.project.weight @ token + resampler.project.bias for token in tokens]
    z = list(resampler.latents)
    for layer in resampler.layers:
        context = [norm(layer.norm, row) for row in x] + [norm(layer.attention.norm, row) for row in z]
        z = [row + seen for row, seen in zip(z, attended(layer.attention, z, context), strict=True)]
        z = [row + fed_forward(layer.mlp, row) for row in z]
    return [norm(resampler.norm, row) for row in z]


def looked(layer: GatedLayer, x: list[Tensor], z: list[Tensor]) -> list[Tensor]:
    first, second = torch.tanh(layer.gates)
    x = [row + first * seen for row, seen in zip(x, attended(layer.attention, x, z), strict=True)]
    return [row + second * fed_forward(layer.mlp, row) for row in x]


def by_hand(composer: CrossAttention, tower: TextTransformer, tokens: Tensor, ids: list[int]) -> Tensor:
    """One text [from its start to its end] that looks at one picture -> feature [D]."""
    z = resampled(composer.resampler, tokens)
    x = torch.stack(
        [tower.token_embedding.weight[number] + tower.positional_embedding[p] for p, number in enumerate(ids)]
    )
    for number, block in enumerate(tower.transformer.resblocks, start=1):
        x = block(x[None], causal=True)[0]
        if number % composer.every == 0:
            x = torch.stack(looked(composer.layers[number // composer.every - 1], list(x), z))
    return norm(tower.ln_final, x[-1]) @ tower.text_projection


def given() -> tuple[Tensor, dict[str, object]]:
    tokens = torch.randn(B, N, V, dtype=torch.float64, requires_grad=True)
    return tokens, {"image_tokens": tokens, "token_ids": make_words().batch(*TEXTS)}


@pytest.mark.parametrize("every", [1, 2, 3])
def test_values_and_gradients(every: int) -> None:
    tower, words, composer = make_tower(), make_words(), make_composer(every=every)
    assert len(composer.layers) == 4 // every
    tokens, extra = given()
    query = composer.compose(torch.empty(B, D), torch.empty(B, 0), text_tower=tower, **extra)
    numbers = [[90, *words.numbers(text)[:10], 91] for text in TEXTS]
    rows = [by_hand(composer, tower, picture, ids) for picture, ids in zip(tokens, numbers, strict=True)]
    assert_same(query, to_unit(rows), (tokens, *composer.parameters(), *tower.parameters()))


def test_it_begins_as_text_only_and_the_gates_open_first() -> None:
    tower, composer = make_tower(), make_composer(is_open=False)
    tokens, extra = given()
    query = composer.compose(torch.empty(B, D), torch.empty(B, 0), text_tower=tower, **extra)
    texts = tower.forward_text(extra["token_ids"])
    torch.testing.assert_close(query, to_unit(list(texts)), rtol=0, atol=1e-12)
    (query * torch.randn_like(query)).sum().backward()
    gates = [layer.gates for layer in composer.layers]
    assert all(bool((gate.grad != 0).all()) for gate in gates)
    assert not composer.resampler.latents.grad.any() and not tokens.grad.any(), "behind closed gates"
    with torch.no_grad():
        for gate in gates:
            gate.sub_(0.1 * gate.grad)
    query = composer.compose(torch.empty(B, D), torch.empty(B, 0), text_tower=tower, **extra)
    (query * torch.randn_like(query)).sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in composer.parameters()) and bool(tokens.grad.any())


@pytest.mark.parametrize("pool", ["last", "argmax"])
def test_a_tower_that_sees_its_padding_keeps_it(pool: str) -> None:
    tower, composer = make_tower(no_causal_mask=True, pool_type=pool), make_composer(is_open=False)
    _, extra = given()
    extra = {name: rows[:2] for name, rows in extra.items()}  # shorter than the context
    query = composer.compose(torch.empty(2, D), torch.empty(2, 0), text_tower=tower, **extra)
    torch.testing.assert_close(query, to_unit(list(tower.forward_text(extra["token_ids"]))), rtol=0, atol=1e-12)


def test_other_text_towers_and_other_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="cross_attention.*blocks of CLIP's text tower"):
        CrossAttention(V, WIDTH, None)
    for options in ({"heads": 5}, {"every": 5}, {"latents": 0}):
        with pytest.raises(UserError, match="heads that divide"):
            CrossAttention(V, WIDTH, 4, **options)
