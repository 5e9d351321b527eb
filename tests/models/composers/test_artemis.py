import torch
from torch import Tensor, nn

from cliplab.models.composers.artemis import Artemis

D, Q, G = 7, 4, 6


def unit(x: Tensor) -> Tensor:
    return x / x.pow(2).sum().sqrt()


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.get_parameter("weight") @ x + layer.get_parameter("bias")


def attention(layers: nn.Sequential, m: Tensor) -> Tensor:
    exponents = torch.exp(linear(layers[2], linear(layers[0], m).relu()))
    return exponents / exponents.sum()


def pair_score(artemis: Artemis, r: Tensor, m: Tensor, y: Tensor) -> Tensor:
    """EM + IS of one query and one target, as the paper has it."""
    r, m = unit(r), unit(m)
    explicit = unit(linear(artemis.transform, m)) @ unit(attention(artemis.attention_em, m) * y)
    weight = attention(artemis.attention_is, m)
    return explicit + unit(weight * r) @ unit(weight * y)


def by_hand(artemis: Artemis, references: Tensor, texts: Tensor, gallery: Tensor) -> Tensor:
    rows = [
        torch.stack([pair_score(artemis, r, m, y) for y in gallery]) for r, m in zip(references, texts, strict=True)
    ]
    return torch.stack(rows)


def make_inputs() -> tuple[Artemis, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    artemis = Artemis(D).double()
    with torch.no_grad():
        for parameter in artemis.parameters():
            parameter += torch.randn_like(parameter)
    reference, text = (3 * torch.randn(Q, D, dtype=torch.float64)).requires_grad_(), torch.randn(Q, D).double()
    gallery = nn.functional.normalize(torch.randn(G, D, dtype=torch.float64), dim=-1).requires_grad_()
    return artemis, reference, text.requires_grad_(), gallery


def test_the_matrix_form_is_the_papers_pair_form() -> None:
    artemis, reference, text, gallery = make_inputs()
    scores = artemis.score(artemis.compose(reference, text), gallery)
    expected = by_hand(artemis, reference, text, gallery)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    cotangent, inputs = torch.randn_like(scores), (reference, text, gallery, *artemis.parameters())
    found = torch.autograd.grad((scores * cotangent).sum(), inputs)
    wanted = torch.autograd.grad((expected * cotangent).sum(), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_a_query_is_the_unit_pair() -> None:
    artemis, reference, text, _ = make_inputs()
    query = artemis.compose(reference, text)
    assert query.shape == (Q, 2, D) and artemis.output == "score"
    for row in range(Q):
        torch.testing.assert_close(query[row], torch.stack([unit(reference[row]), unit(text[row])]))


def test_the_text_decides_how_the_target_counts() -> None:
    artemis, reference, text, gallery = make_inputs()
    scores = artemis.score(artemis.compose(reference, text), gallery)
    other = artemis.score(artemis.compose(reference, text.flip(0)), gallery)
    assert (scores - other).abs().max() > 0.01
    assert scores.abs().max() <= 2


def test_weights_on_one_dimension_give_finite_values_and_gradients() -> None:
    artemis = Artemis(D)
    with torch.no_grad():
        for layers in (artemis.attention_em, artemis.attention_is):
            layers[2].bias[0] += 60  # all weight on one dimension, the others at 1e-26
    gallery = torch.zeros(2, D)
    gallery[0, 1] = gallery[1, 0] = 1  # the first target is zero where the weight is
    reference = torch.ones(1, D, requires_grad=True)
    scores = artemis.score(artemis.compose(reference, torch.ones(1, D)), gallery)
    scores.sum().backward()
    assert scores.isfinite().all() and reference.grad is not None and reference.grad.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in artemis.parameters())
