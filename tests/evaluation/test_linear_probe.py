import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cliplab.errors import UserError
from cliplab.evaluation.linear_probe import STRENGTHS, fit_path, linear_probe, objective

D, K = 6, 4


def make_features(count: int, seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Unit features in a narrow cone, as CLIP's are, around one centre per class."""
    centres = torch.randn(K, D, generator=torch.Generator().manual_seed(0)) + 4.0
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(K, (count,), generator=generator)
    return F.normalize(centres[labels] + noise * torch.randn(count, D, generator=generator), dim=-1), labels


def newton(features: Tensor, labels: Tensor, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """The optimum by Newton's method on the summed objective in NumPy: weight [K, D], bias [K] of mean 0."""
    x = np.hstack([features.double().numpy(), np.ones((len(features), 1))])
    y = np.eye(K)[labels.numpy()]
    penalty = strength * np.tile([*[1.0] * D, 0.0], K)
    theta = np.zeros(K * (D + 1))

    def value(theta: np.ndarray) -> float:
        logits = x @ theta.reshape(K, D + 1).T
        return float((np.log(np.exp(logits).sum(1)) - (y * logits).sum(1)).sum() + (penalty * theta**2).sum() / 2)

    for _ in range(100):
        logits = x @ theta.reshape(K, D + 1).T
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = ((p - y).T @ x).ravel() + penalty * theta
        blocks = [[np.einsum("n,nd,ne->de", p[:, i] * ((i == j) - p[:, j]), x, x) for j in range(K)] for i in range(K)]
        step = np.linalg.pinv(np.block(blocks) + np.diag(penalty)) @ gradient
        size = 1.0
        while value(theta - size * step) > value(theta) and size > 1e-8:
            size /= 2
        theta = theta - size * step
    found = theta.reshape(K, D + 1)
    return found[:, :D], found[:, D] - found[:, D].mean()


@pytest.mark.parametrize("strength", [1e-3, 1e-1, 1.0, 30.0])
def test_the_fit_is_newtons_optimum(strength: float) -> None:
    features, labels = make_features(60, seed=1)
    weight, bias, kinds = fit_path(features.double(), labels, [strength])[strength]
    expected_weight, expected_bias = newton(features, labels, strength)
    assert kinds.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(weight.numpy(), expected_weight, atol=1e-4 * np.abs(expected_weight).max())
    np.testing.assert_allclose((bias - bias.mean()).numpy(), expected_bias, atol=1e-4 * np.abs(expected_bias).max())


def test_the_gradient_vanishes_along_the_whole_path() -> None:
    features, labels = make_features(60, seed=1, noise=3.0)
    path = fit_path(features.double(), labels, STRENGTHS)
    assert list(path) == sorted(STRENGTHS, reverse=True) and len(path) == 25
    for strength, (weight, bias, _) in path.items():
        point = [weight.requires_grad_(), bias.requires_grad_()]
        for gradient in torch.autograd.grad(objective(features.double(), labels, weight, bias, strength), point):
            assert gradient.abs().max() < 2e-7 * max(1.0, (strength / 60) ** 0.5), strength  # curvature: strength / N
    norms = [float(weight.detach().norm()) for weight, _, _ in path.values()]
    assert norms == sorted(norms), "a weaker penalty allows larger weights"


def test_the_objective_is_the_sum_over_pictures_divided_by_their_number() -> None:
    features, labels = torch.tensor([[1.0, 2.0], [0.0, -1.0]]).double(), torch.tensor([0, 1])
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double(), torch.tensor([0.5, 0.0]).double()
    # logits (1.5, 2) and (0.5, -1), the right ones 1.5 and -1; ||W||^2 = 2
    total = math.log(1 + math.exp(0.5)) + math.log(1 + math.exp(1.5)) + 3.0 / 2 * 2
    assert float(objective(features, labels, weight, bias, strength=3.0)) == pytest.approx(total / 2)


def test_two_points_by_hand() -> None:
    """n at +1 and n at -1: strength w = 2 n sigmoid(-2 w), so that strength = n / ln 3 gives w = ln(3) / 2."""
    features = torch.tensor([[1.0], [-1.0]]).repeat(5, 1).double()
    labels = torch.tensor([1, 0]).repeat(5)
    strength = 5 / math.log(3)
    weight, bias, _ = fit_path(features, labels, [strength])[strength]
    torch.testing.assert_close(weight, torch.tensor([[-1.0], [1.0]]).double() * math.log(3) / 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(bias, torch.zeros(2).double(), atol=1e-6, rtol=0)


def test_without_information_the_bias_tells_the_frequencies() -> None:
    features, labels = torch.zeros(6, 3).double(), torch.tensor([0, 0, 0, 1, 1, 2])
    weight, bias, _ = fit_path(features, labels, [1.0])[1.0]
    torch.testing.assert_close(bias.softmax(0), torch.tensor([3.0, 2.0, 1.0]).double() / 6, atol=1e-6, rtol=0)
    assert not weight.any()


def test_the_strength_is_chosen_on_validation_and_the_rest_is_refitted() -> None:
    train, validation, test = (make_features(40, seed, noise=2.0) for seed in (1, 2, 3))
    probe = linear_probe(train, validation, test)

    def percent(fit: tuple[Tensor, Tensor, Tensor], part: tuple[Tensor, Tensor]) -> float:
        weight, bias, kinds = fit
        hits = [int(kinds[(weight @ x.double() + bias).argmax()]) == int(y) for x, y in zip(*part, strict=True)]
        return 100 * sum(hits) / len(hits)

    path = fit_path(train[0].double(), train[1], STRENGTHS)
    accuracies = {strength: percent(path[strength], validation) for strength in STRENGTHS}
    best = max(accuracies.values())
    winners = [strength for strength, accuracy in accuracies.items() if accuracy == best]
    assert len(set(accuracies.values())) > 2 and len(winners) > 1, "the case must be worth it"
    assert (probe.strength, probe.validation_accuracy) == (max(winners), pytest.approx(best))
    both = torch.cat([train[0], validation[0]]).double(), torch.cat([train[1], validation[1]])
    refitted = fit_path(*both, [probe.strength])[probe.strength]
    torch.testing.assert_close((probe.weight, probe.bias, probe.labels), refitted)
    assert probe.test_accuracy == pytest.approx(percent(refitted, test))
    assert probe.test_accuracy != percent(path[probe.strength], test), "the refit must matter"
    torch.testing.assert_close(probe.logits(test[0]), test[0].double() @ probe.weight.T + probe.bias)


def test_equal_logits_are_no_hit() -> None:
    """Pictures without information and as many of each class: both logits are 0."""
    part = torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])
    probe = linear_probe(part, part, part, strengths=[1.0])
    assert (probe.validation_accuracy, probe.test_accuracy) == (0.0, 0.0)


def test_labels_may_be_missing_from_a_split_and_need_not_count_from_zero() -> None:
    axes = 5 * torch.eye(3)
    train = axes[[0, 1, 0, 1]], torch.tensor([10, 20, 10, 20])
    validation = axes[[0, 0, 2]], torch.tensor([10, 10, 30])  # no 20, and a 30 that train has not
    test = axes[[0, 1, 2, 2]], torch.tensor([10, 20, 30, 99])  # nobody can know 99
    probe = linear_probe(train, validation, test, strengths=[0.01])
    assert probe.labels.tolist() == [10, 20, 30]
    assert probe.validation_accuracy == pytest.approx(200 / 3)
    assert probe.test_accuracy == 75.0


def test_features_of_an_evaluation_can_be_fitted_and_the_random_state_stays() -> None:
    with torch.inference_mode():
        parts = [make_features(20, seed) for seed in (1, 2, 3)]
        before = torch.get_rng_state()
        found = linear_probe(parts[0], parts[1], parts[2], strengths=[1.0])
    assert torch.equal(torch.get_rng_state(), before)
    parts = [(features.clone(), labels.clone()) for features, labels in parts]
    assert torch.equal(found.weight, linear_probe(parts[0], parts[1], parts[2], strengths=[1.0]).weight)
    assert found.weight.dtype == torch.float64


def test_what_can_not_be_fitted_is_named() -> None:
    good = make_features(8, seed=1)
    one = good[0], torch.full((8,), 3)
    with pytest.raises(UserError, match=r"all 8 labels to fit are \[3\]: two classes are needed"):
        linear_probe(one, good, good)
    with pytest.raises(UserError, match=r"validation must be features \[N, D\].*\[8, 6\] and \[7\]"):
        linear_probe(good, (good[0], good[1][:7]), good)
    with pytest.raises(UserError, match="test must be features"):
        linear_probe(good, good, (good[0][:0], good[1][:0]))
    with pytest.raises(UserError, match="a feature of train is not finite"):
        linear_probe((good[0] / 0, good[1]), good, good)
    for strengths in ([], [0.0], [-1.0], [math.inf], [math.nan]):
        with pytest.raises(UserError, match="strengths must be finite numbers above 0"):
            linear_probe(good, good, good, strengths)
