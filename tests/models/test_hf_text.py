"""Text towers of Hugging Face, each from a local config folder, against open_clip's."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from cliplab.errors import UserError
from cliplab.models.hf_text import BLIND_TO_PADDING, HFTextTower
from tests.oracles import VIT, assert_close, assert_same_gradients, assert_same_model, gradients, make_pair, pictures

SMALL = {"vocab_size": 70, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 30}
T5 = {"vocab_size": 70, "d_model": 24, "num_layers": 3, "num_heads": 3, "d_kv": 8, "d_ff": 30}
M2M = {"vocab_size": 70, "d_model": 24, "encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 3}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {**SMALL, "max_position_embeddings": 40}),
    "roberta": ("RobertaConfig", {**SMALL, "max_position_embeddings": 40}),
    "xlm": ("XLMRobertaConfig", {**SMALL, "max_position_embeddings": 40}),
    "mt5": ("MT5Config", T5),
    "m2m100": ("M2M100Config", {**M2M, "decoder_attention_heads": 3, "encoder_ffn_dim": 30, "decoder_ffn_dim": 30}),
}
NO_DROPOUT = dict.fromkeys(
    ("dropout", "dropout_rate", "attention_dropout", "activation_dropout", "encoder_layerdrop"), 0.0
)
NO_DROPOUT |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
MORE_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("AlbertConfig", {**SMALL, "embedding_size": 8}),
    "camembert": ("CamembertConfig", SMALL),
    "deberta": ("DebertaV2Config", {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "distilbert": ("DistilBertConfig", {"vocab_size": 70, "dim": 24, "n_layers": 3, "n_heads": 3, "hidden_dim": 30}),
    "electra": ("ElectraConfig", {**SMALL, "embedding_size": 8}),
    "modernbert": ("ModernBertConfig", {**SMALL, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}),
    "mpnet": ("MPNetConfig", SMALL),
    "t5": ("T5Config", T5),
}
POOLERS = ("mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler")


def folder_of(kind: str, tmp_path: Path) -> str:
    name, options = {**KINDS, **MORE_KINDS}[kind]
    getattr(transformers, name)(**options, **NO_DROPOUT).save_pretrained(tmp_path / kind)
    return str(tmp_path / kind)


def config(kind: str, tmp_path: Path, **text: Any) -> dict[str, Any]:
    text = {"hf_model_name": folder_of(kind, tmp_path), "hf_model_pretrained": False, "context_length": 12, **text}
    return {
        "embed_dim": 24 if text.get("hf_proj_type", "") is None else 20,
        "vision_cfg": {**VIT, "layers": 1},
        "text_cfg": text,
    }


def padded(padding: int, batch: int = 4, length: int = 12) -> Tensor:
    text = torch.randint(5, 70, (batch, length), generator=torch.Generator().manual_seed(2))
    for row in range(batch - 1):
        text[row, 3 + 2 * row :] = padding
    return text


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_features_and_gradients_are_open_clips(kind: str, pooler: str, tmp_path: Path) -> None:
    projection = {"mean_pooler": "mlp", "cls_pooler": "linear"}.get(pooler)
    ours, theirs = make_pair(config(kind, tmp_path, hf_pooler_type=pooler, hf_proj_type=projection))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    text = padded(ours.text.config.pad_token_id)
    assert_same_model(ours, theirs, pictures(2, 32), text)
    assert_close(ours.text(text), theirs.text(text))


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_apart_are_the_whole(kind: str, tmp_path: Path) -> None:
    """Embedding, encoding, pooling: what composers use to put a word in the place of another."""
    ours, _ = make_pair(config(kind, tmp_path, hf_proj_type="linear"))
    tower, text = ours.text, padded(ours.text.config.pad_token_id)
    found = tower.pool(tower.encode_embeddings(tower.embed(text), text), text)
    assert_close(found, tower(text))
    other = text.clone()
    other[:, 1] = 11
    embeddings = tower.embed(text).clone()
    embeddings[:, 1] = tower.embed(other)[:, 1]
    assert_close(tower.pool(tower.encode_embeddings(embeddings, text), text), tower(other))


def test_the_largest_of_each_feature_is_pooled_without_padding(tmp_path: Path) -> None:
    """open_clip 3.3.0's max_pooler fails in masked_fill; here is what it means."""
    ours, _ = make_pair(config("bert", tmp_path, hf_proj_type=None))
    tower, text = ours.text, padded(0)
    tower.pooler_type = "max_pooler"
    tokens = torch.randn(4, 12, 24)
    expected = torch.stack([row[: 3 + 2 * i if i < 3 else 12].amax(0) for i, row in enumerate(tokens)])
    assert_close(tower.pool(tokens, text), expected)
    tower.pooler_type = "mean_pooler"
    expected = torch.stack([row[: 3 + 2 * i if i < 3 else 12].mean(0) for i, row in enumerate(tokens)])
    assert_close(tower.pool(tokens, text), expected)


def test_padding_is_not_read(tmp_path: Path) -> None:
    ours, _ = make_pair(config("roberta", tmp_path, hf_pooler_type="cls_last_hidden_state_pooler"))
    text = padded(1)
    assert_close(ours.text(text)[:1], ours.text(text[:1, :3]))


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_last_hidden_state_pooler"])
@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
def test_padding_behind_all_texts_is_not_computed(kind: str, pooler: str, tmp_path: Path) -> None:
    tower = HFTextTower(config(kind, tmp_path, hf_pooler_type=pooler, hf_proj_type="linear")["text_cfg"], 20).eval()
    text = padded(tower.config.pad_token_id)[:3]
    assert tower.config.model_type in BLIND_TO_PADDING
    whole = tower.pool(tower._run(text).last_hidden_state, text)
    expected = gradients([whole], tower)
    lengths, run = [], tower._run
    tower._run = lambda given: lengths.append(given.shape[1]) or run(given)  # type: ignore[method-assign]
    found = tower(text)
    assert_close(found, whole)
    assert_same_gradients(gradients([found], tower), expected)
    assert lengths == [7]


def test_alberts_pooler_gets_the_first_token(tmp_path: Path) -> None:
    given = config("albert", tmp_path, hf_pooler_type="cls_pooler", hf_proj_type="linear")["text_cfg"]
    tower, text = HFTextTower(given, 20).eval(), padded(0)
    expected = tower.transformer(text, attention_mask=(text != 0).long()).pooler_output
    assert_close(tower(text), tower.proj(expected))


def test_hooks_of_the_encoder_see_all_tokens(tmp_path: Path) -> None:
    ours, _ = make_pair(config("bert", tmp_path, hf_proj_type="linear"))
    seen: list[int] = []
    ours.text.transformer.register_forward_hook(lambda *given: seen.append(given[2].last_hidden_state.shape[1]))
    ours.text(padded(0)[:2])
    ours.text(torch.zeros(2, 12, dtype=torch.int64))
    assert seen == [12, 12]


def test_intermediates(tmp_path: Path) -> None:
    ours, _ = make_pair(config("bert", tmp_path))
    text = padded(0)
    found = ours.forward_intermediates(text=text, text_indices=[2, 0])
    hidden = ours.text.transformer(text, attention_mask=(text != 0).long(), output_hidden_states=True).hidden_states
    assert len(found["text_intermediates"]) == 2
    assert_close(found["text_intermediates"][0], hidden[1])
    assert_close(found["text_intermediates"][1], hidden[3])
    assert_close(found["text_features"], ours.encode_text(text, normalize=True))
    assert ours.forward_intermediates(text=text, intermediates_only=True).keys() == {"text_intermediates"}


def test_attention_maps_need_plain_attention(tmp_path: Path) -> None:
    from cliplab.models.attention import set_attention

    ours, _ = make_pair(config("bert", tmp_path))
    set_attention(ours, "sdpa")
    with pytest.raises(UserError, match="with attention=eager only"):
        ours.text.text_attention_maps(padded(0))
    before = ours.encode_text(padded(0))
    set_attention(ours, "eager")
    maps = ours.text.text_attention_maps(padded(0))
    assert [tuple(m.shape) for m in maps] == [(4, 3, 12, 12)] * 3
    assert_close(maps[0].sum(-1), torch.ones(4, 3, 12))
    assert not maps[1][0, :, :, 3:].any(), "padding is not looked at"
    assert_close(ours.encode_text(padded(0)), before)


@pytest.mark.parametrize("freeze_layer_norm", [True, False])
@pytest.mark.parametrize("unlocked", range(6))
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm"])
def test_locking_is_open_clips(kind: str, unlocked: int, freeze_layer_norm: bool, tmp_path: Path) -> None:
    ours, theirs = make_pair(config(kind, tmp_path, hf_pooler_type="cls_pooler"))
    ours.lock_text_tower(unlocked, freeze_layer_norm)
    if kind == "bert" and unlocked:  # its entry in open_clip's table lacks the names of its layers
        layers = [theirs.text.transformer.embeddings, *theirs.text.transformer.encoder.layer][:-unlocked]
        for name, parameter in (pair for layer in layers for pair in layer.named_parameters()):
            parameter.requires_grad = not freeze_layer_norm and "LayerNorm" in name.split(".")
    else:
        theirs.lock_text_tower(unlocked, freeze_layer_norm)
    found = {name: p.requires_grad for name, p in ours.named_parameters()}
    assert found == {name: p.requires_grad for name, p in theirs.named_parameters()}
    assert found["text.proj.0.weight"] and found["logit_scale"]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_loss_and_no_gradient(kind: str, tmp_path: Path) -> None:
    (plain, _), (again, _) = (make_pair(config(kind, tmp_path)) for _ in range(2))
    text = padded(plain.text.config.pad_token_id)
    plain.train(), again.train()
    again.set_grad_checkpointing()
    layers = next(m for m in again.text.transformer.modules() if isinstance(m, nn.ModuleList))
    calls = [0]
    next(m for m in layers[0].modules() if isinstance(m, nn.Linear)).register_forward_hook(
        lambda *_: calls.__setitem__(0, calls[0] + 1)
    )
    found, expected = again.encode_text(text), plain.encode_text(text)
    assert_close(found, expected)
    assert_same_gradients(gradients([found], again.text), gradients([expected], plain.text))
    assert calls == [2], "computed again in the backward pass"
    again.set_grad_checkpointing(False)
    again.encode_text(text).sum().backward()
    assert calls == [3]


@pytest.mark.parametrize("pretrained", [True, False])
def test_the_encoders_own_weights(tmp_path: Path, pretrained: bool) -> None:
    encoder = transformers.BertModel(transformers.BertConfig(**KINDS["bert"][1]))
    encoder.save_pretrained(tmp_path / "bert")
    cfg = {"hf_model_name": str(tmp_path / "bert"), "hf_model_pretrained": pretrained, "hf_pooler_type": "cls_pooler"}
    tower = HFTextTower(cfg, 20)
    expected = encoder.state_dict()
    same = all(torch.equal(value, expected[key]) for key, value in tower.transformer.state_dict().items())
    assert same == pretrained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hf_pooler_type": "mean"}, "unknown text_cfg.hf_pooler_type 'mean': did you mean 'mean_pooler'"),
        ({"hf_proj_type": "mpl"}, "text_cfg.hf_proj_type must be mlp, linear or null, got 'mpl'"),
        ({"hf_proj_type": None}, "hf_proj_type=null: .*24.* embed_dim.* 20"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        HFTextTower({"hf_model_name": folder_of("bert", tmp_path), **options}, 20)


@pytest.mark.parametrize(
    "content", ["{", '{"model_type": "no-such-model"}', "{}", '{"model_type": "bert", "hidden_size": 33}']
)
def test_a_config_that_is_none_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="can't build the text tower of .*text_cfg.hf_model_name") as error:
        HFTextTower({"hf_model_name": str(tmp_path)}, 20)
    assert str(tmp_path) in str(error.value)
