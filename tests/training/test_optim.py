import math

import pytest
import torch
from torch import nn

from cliplab.errors import UserError
from cliplab.models.clip import CLIP
from cliplab.models.composed import PARTS, ComposedRetriever
from cliplab.models.composers import TIRG
from cliplab.training.optim import adamw, decayed_by_layer, not_finite, parameter_groups, warmup_then

LAYERS = 3
VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": LAYERS, "head_width": 8}
TEXT = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": LAYERS}


def make_model() -> ComposedRetriever:
    return ComposedRetriever(CLIP(8, VISION, TEXT), TIRG(8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class TestParameterGroups:
    def test_every_trainable_parameter_is_in_one_group(self) -> None:
        model = make_model()
        groups = parameter_groups(model, model.part_parameters(), 1e-3, 0.2, {})
        ids = [id(parameter) for group in groups for parameter in group.parameters]
        assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
        assert {group.part for group in groups} == set(PARTS)
        assert {group.lr for group in groups} == {1e-3}
        assert {group.weight_decay for group in groups} == {0.0, 0.2}

    def test_what_is_not_decayed(self) -> None:
        model = make_model()
        groups = parameter_groups(model, model.part_parameters(), 1e-3, 0.2, {})
        decay = {id(parameter): group.weight_decay for group in groups for parameter in group.parameters}
        names = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
        spared = {name for name, value in names.items() if value == 0}
        for name, parameter in model.named_parameters():
            words = ("ln_", "bias", "positional_embedding", "class_embedding", "logit_scale", "composer.weights")
            batch_norm = name in ("composer.gate.0.weight", "composer.residual.0.weight")
            assert (name in spared) == (any(word in name for word in words) or batch_norm), name
            assert parameter.ndim >= 2 or name in spared
        assert names["clip.token_embedding.weight"] == names["clip.text_projection"] == 0.2
        assert names["clip.visual.proj"] == names["clip.visual.conv1.weight"] == 0.2

    def test_multipliers(self) -> None:
        model = make_model()
        multipliers = {"image_encoder": 0.1, "composer": 10}
        groups = parameter_groups(model, model.part_parameters(), 1e-3, 0.2, multipliers)
        lr = {group.part: group.lr for group in groups}
        assert lr == pytest.approx({"image_encoder": 1e-4, "text_encoder": 1e-3, "composer": 1e-2, "temperature": 1e-3})
        assert all(lr[group.part] == group.lr for group in groups), "with and without decay alike"

    def test_what_is_frozen_is_in_none(self) -> None:
        model = make_model()
        model.freeze(["image_encoder", "temperature"])
        groups = parameter_groups(model, model.part_parameters(), 1e-3, 0.2, {})
        assert {group.part for group in groups} == {"text_encoder", "composer"}

    def test_errors(self) -> None:
        model = make_model()
        model.freeze(PARTS)
        with pytest.raises(UserError, match=r"nothing to train.*model\.freeze"):
            parameter_groups(model, model.part_parameters(), 1e-3, 0.2, {})

    @pytest.mark.parametrize("weight_decay", [0.2, 0.0])
    def test_names_are_unique_as_the_learning_rate_monitor_wants_them(self, weight_decay: float) -> None:
        model = make_model()
        groups = parameter_groups(model, model.part_parameters(), 1e-3, weight_decay, {})
        names = [group.as_group()["name"] for group in groups]
        assert len(names) == len(set(names)), names


class TestSchedule:
    def test_warm_up_then_cosine_by_hand(self) -> None:
        factor = warmup_then("cosine", 0.4, 10)
        cosine = [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
        assert [factor(step) for step in range(10)] == pytest.approx([0.25, 0.5, 0.75, 1.0, *cosine])
        assert factor(4) == 1.0 and factor(10) == pytest.approx(0) and factor(15) == pytest.approx(0)
        assert factor(7) == pytest.approx(0.5)

    def test_warm_up_then_constant_by_hand(self) -> None:
        factor = warmup_then("constant", 0.5, 4)
        assert [factor(step) for step in range(6)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]

    def test_warm_up_then_linear_by_hand(self) -> None:
        factor = warmup_then("linear", 0.2, 10)
        assert [factor(step) for step in range(10)] == pytest.approx([0.5, 1.0, *(1 - k / 8 for k in range(8))])
        assert factor(10) == 0 and factor(12) == 0

    def test_no_warm_up(self) -> None:
        assert [warmup_then("cosine", 0.0, 2)(step) for step in (0, 1)] == pytest.approx([1.0, 0.5])
        assert warmup_then("cosine", 0.05, 3)(0) == 1.0, "a share below one step is none"
        assert warmup_then("cosine", 0.0, 0)(0) == 1.0


def test_steps_are_those_of_adam_by_hand() -> None:
    model = nn.Linear(2, 1).double()
    start, decay, lr, betas, eps = model.weight.detach().clone(), 0.3, 0.1, (0.8, 0.9), 1e-3
    groups = parameter_groups(model, {"head": list(model.parameters())}, lr, decay, {"head": 0.5})
    optimizer, scheduler = adamw(groups, betas, eps, warmup_then("constant", 0.5, 4))
    weight, mean, square = start, torch.zeros(1, 2).double(), torch.zeros(1, 2).double()
    bias = model.bias.detach().clone()
    for step in range(3):
        gradient = torch.tensor([[1.0, -2.0]], dtype=torch.float64) * (step + 1)
        model.weight.grad, model.bias.grad = gradient, torch.zeros(1, dtype=torch.float64)
        optimizer.step()
        scheduler.step()
        rate = lr * 0.5 * (0.5, 1.0, 1.0)[step]
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        corrected = mean / (1 - betas[0] ** (step + 1)), square / (1 - betas[1] ** (step + 1))
        weight = weight * (1 - rate * decay) - rate * corrected[0] / (corrected[1].sqrt() + eps)
        torch.testing.assert_close(model.weight.detach(), weight)
    torch.testing.assert_close(model.bias.detach(), bias, rtol=0, atol=0)  # no gradient, no decay


def test_not_finite_names_the_parameters() -> None:
    model = make_model()
    assert "none" in not_finite(model)
    with torch.no_grad():
        model.clip.visual.proj[0, 0] = torch.nan
        model.composer.weights[1] = torch.inf
    message = not_finite(model)
    assert "['clip.visual.proj', 'composer.weights']" in message and "optim.lr" in message


def test_the_fused_steps_are_the_plain_ones() -> None:
    models = [make_model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    groups = [parameter_groups(model, model.part_parameters(), 1e-2, 0.2, {"composer": 3.0}) for model in models]
    fused, _ = adamw(groups[0], (0.9, 0.98), 1e-6, lambda step: 1.0)
    plain = torch.optim.AdamW([group.as_group() for group in groups[1]], betas=(0.9, 0.98), eps=1e-6)
    assert all(group["fused"] for group in fused.param_groups)
    for step in range(5):
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
            other.grad = one.grad.clone()
        fused.step()
        plain.step()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7, msg=name)


class TestLayerDecay:
    def groups(self, decay: float) -> dict[str, float]:
        """Parameter name -> learning rate."""
        model = make_model()
        groups = parameter_groups(model, model.part_parameters(), 1e-3, 0.2, {"image_encoder": 0.5})
        found = decayed_by_layer(groups, model.part_layers(), decay)
        names = [group.as_group()["name"] for group in found]
        assert len(set(names)) == len(names)
        rates = {id(parameter): group.lr for group in found for parameter in group.parameters}
        assert len(rates) == sum(len(group.parameters) for group in found) == len(list(model.parameters()))
        kept = {id(parameter): group.weight_decay for group in groups for parameter in group.parameters}
        assert all(kept[id(p)] == group.weight_decay for group in found for p in group.parameters)
        return {name: rates[id(parameter)] for name, parameter in model.named_parameters()}

    def depth(self, name: str) -> int:
        """From the top, by name alone: projection 0, last block and its norm 1, embeddings below."""
        if name in ("clip.visual.proj", "clip.text_projection"):
            return 0
        if "resblocks" in name:
            return LAYERS - int(name.split("resblocks.")[1].split(".")[0])
        return 1 if "ln_post" in name or "ln_final" in name else LAYERS + 1

    def test_rates_by_name(self) -> None:
        for name, rate in self.groups(0.7).items():
            part_lr = 5e-4 if name.startswith("clip.visual") else 1e-3
            in_tower = name.startswith("clip.") and "logit" not in name
            expected = part_lr * 0.7 ** self.depth(name) if in_tower else part_lr
            assert rate == pytest.approx(expected), name

    def test_layers_are_named(self) -> None:
        model = make_model()
        groups = parameter_groups(model, model.part_parameters(), 1e-3, 0.2, {})
        names = {group.name for group in decayed_by_layer(groups, model.part_layers(), 0.5)}
        assert {"image_encoder/layer_0", "image_encoder/layer_0/no_decay", "text_encoder/layer_4", "composer"} <= names
        assert not any(name in names for name in ("image_encoder", "text_encoder", "image_encoder/layer_5"))

    def test_a_frozen_tower_has_no_groups_and_no_decay_changes_nothing(self) -> None:
        model = make_model()
        model.freeze(["image_encoder"])
        groups = parameter_groups(model, model.part_parameters(), 1e-3, 0.2, {})
        found = decayed_by_layer(groups, model.part_layers(), 0.5)
        assert {group.part for group in found} == {"text_encoder", "composer", "temperature"}
        assert decayed_by_layer(groups, {}, 1.0) == groups
