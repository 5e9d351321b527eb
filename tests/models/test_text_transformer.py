import open_clip.transformer
import pytest
import torch
from torch import nn

from cliplab.models.text_transformer import TextTower

SIZES = {"context_length": 9, "vocab_size": 40, "width": 24, "heads": 3, "layers": 2}
END = 39  # the end token has the largest id


def make_tower() -> TextTower:
    tower = TextTower()
    tower.build_text(**SIZES, embed_dim=10, activation=nn.GELU, mlp_ratio=3.0)
    return tower


def sentences(count: int, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Random ids, an end token somewhere, zeros behind it."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, END, (count, length), generator=generator)
    for row in range(count):
        end = 1 + row % (length - 1)
        text[row, end], text[row, end + 1 :] = END, 0
    return text


@pytest.fixture
def towers() -> tuple[TextTower, open_clip.transformer.TextTransformer]:
    """Ours and open_clip's with the same random weights, in float64."""
    torch.manual_seed(0)
    theirs = open_clip.transformer.TextTransformer(**SIZES, mlp_ratio=3.0, output_dim=10).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours = make_tower().double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_features_and_gradients_are_open_clips(
    towers: tuple[TextTower, open_clip.transformer.TextTransformer],
) -> None:
    ours, theirs = towers
    text = sentences(8)
    features, expected = ours.forward_text(text), theirs(text)
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn_like(features)
    (features * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-8, atol=1e-9, msg=name)


def test_padding_may_be_left_away(towers: tuple[TextTower, open_clip.transformer.TextTransformer]) -> None:
    ours, theirs = towers
    text = sentences(4)  # the last end token is at position 4
    torch.testing.assert_close(ours.forward_text(text[:, :5]), theirs(text), rtol=1e-9, atol=1e-10)


def test_the_first_end_token_is_pooled(towers: tuple[TextTower, open_clip.transformer.TextTransformer]) -> None:
    ours, theirs = towers
    text = torch.tensor([[5, 6, END, 7, END, 8, END, END, END]])
    expected = ours.encode_embeddings(ours.embed(text))[:, 2] @ ours.text_projection
    torch.testing.assert_close(ours.forward_text(text), expected)
    torch.testing.assert_close(ours.forward_text(text), theirs(text), rtol=1e-9, atol=1e-10)


def test_a_token_does_not_see_those_behind_it() -> None:
    torch.manual_seed(0)
    tower = make_tower()
    text, changed = sentences(1, seed=1).repeat(2, 1), 5
    text[1, changed] = (text[0, changed] + 1) % END
    tokens = tower.encode_embeddings(tower.embed(text))
    torch.testing.assert_close(tokens[0, :changed], tokens[1, :changed])
    assert (tokens[0, changed:] - tokens[1, changed:]).abs().amax(dim=-1).min() > 1e-4


def test_an_embedding_can_stand_in_for_a_token() -> None:
    torch.manual_seed(0)
    tower = make_tower()
    text = sentences(4)
    other = text.clone()
    other[:, 0] = 17
    embeddings = tower.embed(text).clone()
    embeddings[:, 0] = tower.token_embedding.weight[17]
    torch.testing.assert_close(tower.pool(tower.encode_embeddings(embeddings), text), tower.forward_text(other))


def test_text_parameters_are_all_of_them_once() -> None:
    tower = make_tower()
    ids = [id(parameter) for parameter in tower.text_parameters()]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in tower.parameters()}


def test_initial_standard_deviations() -> None:
    torch.manual_seed(0)
    tower, width, layers = TextTower(), 64, 3
    tower.build_text(50, 200, width, 4, layers, 80, nn.GELU)
    expected = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": width**-0.5,
        "transformer.resblocks.1.attn.in_proj_weight": width**-0.5,
        "transformer.resblocks.1.attn.out_proj.weight": (width * 2 * layers) ** -0.5,
        "transformer.resblocks.1.mlp.c_fc.weight": (2 * width) ** -0.5,
        "transformer.resblocks.1.mlp.c_proj.weight": (width * 2 * layers) ** -0.5,
    }
    for name, std in expected.items():
        assert tower.get_parameter(name).std().item() == pytest.approx(std, rel=0.05), name
    assert (tower.context_length, tower.vocab_size) == (50, 200)
