from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cliplab.losses.info_nce import info_nce
from cliplab.models.clip import CLIP, CustomTextCLIP
from cliplab.models.composed import PARTS, ComposedRetriever, composer_inputs
from cliplab.models.composers import COMPOSERS, Composer, ImageOnly, TextOnly
from cliplab.models.composers.artemis import Artemis
from cliplab.models.composers.combiner import Combiner
from cliplab.models.composers.cross_attention import CrossAttention
from cliplab.models.composers.pseudo_word import PseudoWord
from cliplab.models.composers.sum import Sum
from cliplab.registry import build_part
from tests.words import Words

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": 6, "vocab_size": 20, "width": 24, "heads": 2, "layers": 1}
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
D, B = 12, 8


class Toy(Composer):
    """Writes down what it is given."""

    inputs = frozenset({"vectors", "image_tokens", "text_tower"})

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, Any] = {}

    def compose(self, reference: Tensor, text: Tensor, **extra: Any) -> Tensor:
        self.given = {"reference": reference, "text": text, **extra}
        return F.normalize(reference, dim=-1)


def make_model(composer: Composer | None = None, **options: Any) -> ComposedRetriever:
    torch.manual_seed(0)
    return ComposedRetriever(CLIP(D, VISION, TEXT), composer, MEAN, STD, **options)


def make_composer(name: str) -> Composer:
    """With a prompt that leaves room within six tokens."""
    options = {"prompt": "$ {}"} if issubclass(COMPOSERS[name], PseudoWord) else {}
    given = composer_inputs(CLIP(D, VISION, TEXT), Words("a $ *", 6, (None, 19, 0)))
    return build_part("composer", COMPOSERS, {"name": name, **options}, **given)


def make_query(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 19, (B, 6), generator=generator)
    text[:, 4], text[:, 5] = 19, 0
    return {"image": torch.randint(0, 256, (B, 3, 16, 16), dtype=torch.uint8, generator=generator), "text": text}


def normalized(images: Tensor) -> Tensor:
    """(x / 255 - mean) / std, channel by channel."""
    return torch.stack([(images[:, c].float() / 255 - MEAN[c]) / STD[c] for c in range(3)], dim=1)


def test_normalize() -> None:
    images = make_query()["image"]
    expected = normalized(images)
    torch.testing.assert_close(make_model().normalize(images), expected, rtol=1e-5, atol=1e-6)
    assert make_model().double().normalize(images).dtype == torch.float64
    assert "mean" not in make_model().state_dict(), "the preprocessing is no weight"


@pytest.mark.parametrize("composer", [None, Sum()])
def test_a_query_of_one_modality_is_that_towers_unit_feature(composer: Composer | None) -> None:
    model, query = make_model(composer), make_query()
    image = F.normalize(model.clip.encode_image(normalized(query["image"])), dim=-1)
    text = F.normalize(model.clip.encode_text(query["text"]), dim=-1)
    for encode in (model.encode_query, model.encode_target):
        torch.testing.assert_close(encode({"image": query["image"]}), image)
        torch.testing.assert_close(encode({"text": query["text"]}), text)
    several = model.encode_queries({"text": query["text"]}, {"a": composer, "b": TextOnly()})
    assert several.keys() == {"a", "b"}
    assert all(torch.allclose(each, text, atol=1e-6) for each in several.values())


def test_a_composer_gets_features_that_are_not_unit_length() -> None:
    model, query = make_model(Sum()), make_query()
    image, text = model.clip.encode_image(normalized(query["image"])), model.clip.encode_text(query["text"])
    torch.testing.assert_close(model.encode_query(query), F.normalize(image + text, dim=-1))
    unit_sum = F.normalize(F.normalize(image, dim=-1) + F.normalize(text, dim=-1), dim=-1)
    assert (model.encode_query(query) - unit_sum).abs().max() > 1e-3


def test_a_query_of_both_needs_a_composer() -> None:
    with pytest.raises(AssertionError, match="needs a composer"):
        make_model().encode_query(make_query())


def test_several_composers_share_one_pass_through_the_towers() -> None:
    composers = {"": Combiner(D, dropout=0.0), "image_only": ImageOnly(), "text_only": TextOnly(), "toy": Toy()}
    model, query = make_model(composers[""]), make_query()
    passes = {"image": 0, "text": 0}
    transformers = {"image": model.clip.visual.transformer, "text": model.clip.transformer}
    for name, transformer in transformers.items():
        transformer.register_forward_hook(lambda *_, name=name: passes.update({name: passes[name] + 1}))
    found = model.encode_queries(query, composers)
    assert passes == {"image": 1, "text": 1}
    assert found.keys() == composers.keys()
    image, text = model.clip.encode_image(normalized(query["image"])), model.clip.encode_text(query["text"])
    for name in ("", "image_only", "text_only"):
        torch.testing.assert_close(found[name], composers[name].compose(image, text))


def test_what_a_composer_asks_for_is_delivered() -> None:
    toy = Toy()
    model, query = make_model(toy), make_query()
    model.encode_query(query)
    images = normalized(query["image"])
    assert toy.given.keys() == {"reference", "text", "image_tokens", "text_tower", "token_ids"}
    assert toy.given["image_tokens"].shape == (B, 1 + 4, 32)
    torch.testing.assert_close(toy.given["image_tokens"], model.clip.visual.forward_with_tokens(images)[1])
    torch.testing.assert_close(toy.given["reference"], model.clip.encode_image(images))
    torch.testing.assert_close(toy.given["text"], model.clip.encode_text(query["text"]))
    assert toy.given["text_tower"] is model.clip.text_tower
    assert torch.equal(toy.given["token_ids"], query["text"])


@pytest.mark.parametrize("asked", ["vectors", "image_tokens", "text_tower"])
def test_what_it_does_not_ask_for_is_not(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    monkeypatch.setattr(Toy, "inputs", frozenset({asked}))
    make_model(toy).encode_query(make_query())
    extra = {"vectors": set(), "image_tokens": {"image_tokens"}, "text_tower": {"text_tower", "token_ids"}}[asked]
    assert toy.given.keys() == {"reference", "text"} | extra


def test_score_is_cosine_or_the_composers_own() -> None:
    artemis = Artemis(D)
    model, query = make_model(artemis), make_query()
    gallery = F.normalize(torch.randn(5, D), dim=-1)
    pairs = model.encode_query(query)
    assert pairs.shape == (B, 2, D)
    torch.testing.assert_close(model.score(pairs, gallery), artemis.score(pairs, gallery))
    unit = model.encode_query({"text": query["text"]})
    expected = [[(q @ y).item() for y in gallery] for q in unit]
    torch.testing.assert_close(model.score(unit, gallery), torch.tensor(expected))


def test_scale_is_learned_or_fixed() -> None:
    learned, fixed = make_model(Sum()), make_model(Sum(), fixed_scale=100.0)
    learned.scale.backward()
    assert learned.clip.logit_scale.grad == pytest.approx(1 / 0.07, rel=1e-5)
    assert fixed.scale.item() == 100.0 and not fixed.scale.requires_grad
    fixed.freeze([])
    assert not fixed.clip.logit_scale.requires_grad
    learned.freeze([])
    assert all(parameter.requires_grad for parameter in learned.parameters())


@pytest.mark.parametrize("name", [*COMPOSERS, None])
def test_every_parameter_is_in_exactly_one_part(name: str | None) -> None:
    model = make_model(make_composer(name) if name else None)
    parts = model.part_parameters()
    assert tuple(parts) == PARTS
    ids = [id(parameter) for parameters in parts.values() for parameter in parameters]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in model.parameters()}
    assert {id(p) for p in parts["image_encoder"]} == {id(p) for p in model.clip.visual.parameters()}
    assert [id(p) for p in parts["temperature"]] == [id(model.clip.logit_scale)]


@pytest.mark.parametrize("frozen", PARTS)
def test_a_frozen_part_gets_no_gradient_and_the_others_do(frozen: str) -> None:
    model = make_model(Combiner(D, dropout=0.0))
    model.freeze([frozen])
    loss = info_nce(model.encode_query(make_query()), model.encode_target(make_query(1)), model.scale)
    loss.backward()
    for part, parameters in model.part_parameters().items():
        assert all((parameter.grad is None) == (part == frozen) for parameter in parameters), part


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    model = make_model(Combiner(D))
    model.freeze(["image_encoder", "composer"])
    for mode in (True, False, True):
        model.train(mode)
        assert model.training == mode == model.clip.training == model.clip.transformer.training
        assert not any(m.training for m in (*model.clip.visual.modules(), *model.composer.modules()))
    query = make_query()
    torch.testing.assert_close(model.encode_query(query), model.encode_query(query), rtol=0, atol=0)


def test_a_frozen_batch_norm_keeps_its_statistics() -> None:
    model = make_model(make_composer("tirg"))
    model.freeze(["composer"])
    before = {key: value.clone() for key, value in model.composer.state_dict().items()}
    model.train().encode_query(make_query())
    assert all(torch.equal(value, before[key]) for key, value in model.composer.state_dict().items())


def test_freezing_again_keeps_what_is_frozen() -> None:
    model = make_model(Combiner(D))
    model.freeze(["composer"])
    model.freeze(["image_encoder"])
    model.train()
    for part in ("composer", "image_encoder"):
        assert not any(parameter.requires_grad for parameter in model.part_parameters()[part])
    assert not model.composer.training and not model.clip.visual.training


@pytest.mark.parametrize("name", COMPOSERS)
def test_gradients_reach_every_trainable_parameter(name: str) -> None:
    model = make_model(make_composer(name)).train()
    if isinstance(model.composer, CrossAttention):
        for layer in model.composer.layers:  # closed gates let nothing through
            torch.nn.init.constant_(layer.gates, 0.5)
    query, target = make_query(), {"image": make_query(1)["image"]}
    info_nce(model.encode_query(query), model.encode_target(target), model.scale, model.score).backward()
    not_used = model.part_parameters()["text_encoder"] if name == "image_only" else []
    unused = {id(parameter) for parameter in not_used}
    for key, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == (id(parameter) not in unused), key
        assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all()), key


def test_composers_that_learn_from_images_or_texts_alone_get_no_more() -> None:
    query, target = make_query(), {"image": make_query(1)["image"]}
    model = make_model(make_composer("pic2word")).eval()
    features, tower = model.image_features(target), model.clip.text_tower
    (pair,), (expected,) = (
        model.training_pairs({}, target),
        model.composer.training_pairs(None, None, features, text_tower=tower),
    )
    torch.testing.assert_close(pair[:2], expected[:2])
    model = make_model(make_composer("lincir")).eval()
    torch.manual_seed(4)
    (pair,) = model.training_pairs({"text": query["text"]}, {})
    torch.manual_seed(4)
    given = {"text_tower": model.clip.text_tower, "token_ids": query["text"]}
    (expected,) = model.composer.training_pairs(None, model.text_features(query), None, **given)
    torch.testing.assert_close(pair[:2], expected[:2])


def test_a_dual_encoder_trains_without_a_composer() -> None:
    model, query = make_model().train(), make_query()
    text, image = model.encode_query({"text": query["text"]}), model.encode_target({"image": query["image"]})
    info_nce(text, image, model.scale).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert not model.baselines, "no composer, no baselines"


def test_the_state_dict_holds_the_towers_under_clip() -> None:
    model = make_model(Combiner(D))
    clip = {f"clip.{key}" for key in model.clip.state_dict()}
    composer = {f"composer.{key}" for key in model.composer.state_dict()}
    assert model.state_dict().keys() == clip | composer


def test_features_may_stand_for_inputs() -> None:
    model, query = make_model(Sum()), make_query()
    given = {"image_features": model.image_features(query), "text_features": model.text_features(query)}
    assert torch.equal(model.encode_query(given), model.encode_query(query))
    for name, feature in given.items():
        assert torch.equal(model.encode_target({name: feature}), F.normalize(feature, dim=-1))


def test_a_frozen_text_tower_of_its_own_keeps_evaluating() -> None:
    model = ComposedRetriever(CustomTextCLIP(D, VISION, TEXT), Sum(), MEAN, STD)
    model.freeze(["text_encoder"])
    model.train()
    assert not model.clip.text_tower.training and model.clip.visual.training


def test_negatives_are_targets_of_a_query_each() -> None:
    model = make_model(Sum())
    images = make_query()["image"].unflatten(0, (4, 2))
    found = model.encode_negatives({"image": images})
    assert found.shape == (4, 2, D)
    for row in range(4):
        torch.testing.assert_close(found[row], model.encode_target({"image": images[row]}))


@pytest.mark.parametrize("layout", [CLIP, CustomTextCLIP])
def test_layers_hold_every_parameter_of_a_tower_once(layout: Any) -> None:
    model = ComposedRetriever(layout(D, VISION, TEXT), Combiner(D), MEAN, STD)
    layers, parts = model.part_layers(), model.part_parameters()
    assert layers.keys() == {"image_encoder", "text_encoder"}
    for part, found in layers.items():
        own = [id(parameter) for layer in found for parameter in layer]
        assert len(own) == len(set(own)) and set(own) == {id(parameter) for parameter in parts[part]}
        assert len(found) == 3, "embedding, the one block with its norm, projection"
