from typing import Any

import open_clip.model
import open_clip.transformer
import pytest
import torch

from cliplab.errors import UserError
from cliplab.models.text_transformer import TextTransformer, resize_text_positions
from tests.oracles import TEXT, VIT, assert_close, assert_same_gradients, gradients, make_pair, open_clip_model
from tests.oracles import sentences as padded

SIZES = {"context_length": 9, "vocab_size": 40, "width": 24, "heads": 3, "layers": 2}
END = 39  # the end token has the largest id


def make_tower() -> TextTransformer:
    return TextTransformer({**SIZES, "mlp_ratio": 3.0}, 10)


def sentences(count: int, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Random ids, an end token somewhere, zeros behind it."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, END, (count, length), generator=generator)
    for row in range(count):
        end = 1 + row % (length - 1)
        text[row, end], text[row, end + 1 :] = END, 0
    return text


@pytest.fixture
def towers() -> tuple[TextTransformer, open_clip.transformer.TextTransformer]:
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
    towers: tuple[TextTransformer, open_clip.transformer.TextTransformer],
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


def test_padding_may_be_left_away(towers: tuple[TextTransformer, open_clip.transformer.TextTransformer]) -> None:
    ours, theirs = towers
    text = sentences(4)  # the last end token is at position 4
    torch.testing.assert_close(ours.forward_text(text[:, :5]), theirs(text), rtol=1e-9, atol=1e-10)


def test_the_first_end_token_is_pooled(towers: tuple[TextTransformer, open_clip.transformer.TextTransformer]) -> None:
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
    width, layers = 64, 3
    sizes = {"context_length": 50, "vocab_size": 200, "width": width, "heads": 4, "layers": layers}
    tower = TextTransformer(sizes, 80)
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


VARIANTS: dict[str, dict[str, Any]] = {
    "argmax": {},
    "eos": {"pool_type": "eos", "eos_id": 7},
    "first": {"pool_type": "first", "no_causal_mask": True},
    "last": {"pool_type": "last"},
    "none": {"pool_type": "none"},
    "proj_bias": {"proj_bias": True},
    "no_projection": {"proj_type": "none"},
    "bidirectional": {"no_causal_mask": True},
    "layer_scale": {"ls_init_value": 0.3},
    "eps": {"norm_kwargs": {"eps": 0.1}},
    "tanh": {"act_kwargs": {"approximate": "tanh"}},
    "siglip": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}},
}


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_open_clips(variant: str, custom_text: bool) -> None:
    config = {"embed_dim": 20, "vision_cfg": {**VIT, "layers": 1}, "text_cfg": {**TEXT, **VARIANTS[variant]}}
    ours, theirs = make_pair({**config, "custom_text": custom_text})
    text = padded(5, TEXT["context_length"], TEXT["vocab_size"])
    text[0, 4] = text[0, 6] = text[1, 0] = 7  # twice, first, and in the other rows never
    found, expected = ours.encode_text(text), theirs.encode_text(text)
    assert_close(found, expected)
    assert_same_gradients(gradients([found], ours), gradients([expected], theirs))


def test_a_shorter_text_takes_the_first_positions() -> None:
    """As open_clip's bidirectional tower does; its causal ones fail."""
    text_cfg = {**TEXT, "no_causal_mask": True, "pool_type": "last"}
    config = {"embed_dim": 20, "vision_cfg": {**VIT, "layers": 1}, "text_cfg": text_cfg}
    ours, theirs = make_pair({**config, "custom_text": True})
    text = padded(3, 7, TEXT["vocab_size"])
    assert_close(ours.encode_text(text), theirs.encode_text(text))


def test_a_text_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="10 tokens are longer than the text tower's context of 9"):
        make_tower()(sentences(2, length=10))


def test_masked_tokens_change_nothing() -> None:
    """What Hugging Face calls attention_mask: other ids under the mask give the same tokens."""
    tower = TextTransformer({**SIZES, "no_causal_mask": True}, 10)
    text, mask = sentences(4), torch.ones(4, 9, dtype=torch.bool)
    mask[:, 6:] = False
    other = torch.where(mask, text, 11)
    tokens, changed = (tower.encode_embeddings(tower.embed(ids), ids, mask) for ids in (text, other))
    torch.testing.assert_close(tokens[:, :6], changed[:, :6])
    seen, unmasked = (tower.encode_embeddings(tower.embed(ids), ids) for ids in (text, other))
    assert (seen[:, :6] - unmasked[:, :6]).abs().max() > 1e-3, "else the mask would prove nothing"


def test_initialisation_with_a_bias() -> None:
    torch.manual_seed(0)
    projection = TextTransformer({**SIZES, "width": 96, "proj_bias": True}, 50).text_projection
    assert not projection.bias.any() and projection.weight.std().item() == pytest.approx(96**-0.5, rel=0.05)


@pytest.mark.parametrize("length", [5, 16])
@pytest.mark.parametrize("custom_text", [False, True])
def test_positions_are_resized_as_open_clip_does(length: int, custom_text: bool) -> None:
    text = {**TEXT, "context_length": length}
    config = {"embed_dim": 20, "vision_cfg": {**VIT, "layers": 1}, "text_cfg": text, "custom_text": custom_text}
    theirs = open_clip_model(config)
    key = "text.positional_embedding" if custom_text else "positional_embedding"
    stored = {key: torch.randn(11, 32)}
    found = resize_text_positions(stored[key], length)
    open_clip.model.resize_text_pos_embed(stored, theirs)
    assert_close(found, stored[key], tolerance=1e-6)
    assert resize_text_positions(found.half(), 7).dtype == torch.float16
