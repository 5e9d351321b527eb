"""Linear probe: multinomial logistic regression on frozen features (Radford et al., 2021, appendix A.3).

    min_{W, b}  sum_n -log softmax(W x_n + b)_{y_n} + strength / 2 ||W||^2

It is scikit-learn's LogisticRegression with C = 1 / strength (its objective times 1 / C); as there, b goes unpunished.
The strength is chosen by the accuracy on validation, then W, b are fitted to train and validation together.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cliplab.errors import UserError

log = logging.getLogger(__name__)

Labelled = tuple[Tensor, Tensor]  # features [N, D] of any precision, labels [N] int64
Fit = tuple[Tensor, Tensor, Tensor]  # weight [K, D], bias [K], labels [K]
# CLIP's range; CLIP searches it in steps of an eighth of a decade.
STRENGTHS = tuple(10 ** (exponent / 2) for exponent in range(-12, 13))
GRADIENT = 1e-7  # of the scaled mean objective: its square is about what the objective could still fall by
ROUNDS, ITERATIONS = 20, 100


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe; accuracies (top-1) in percent."""

    strength: float
    validation_accuracy: float  # of the fit to train alone
    test_accuracy: float
    weight: Tensor  # float64 [K, D]
    bias: Tensor  # float64 [K]
    labels: Tensor  # int64 [K]: the label that each row of weight stands for, sorted

    def logits(self, features: Tensor) -> Tensor:
        """[N, D] -> float64 [N, K]."""
        return features.to(self.weight) @ self.weight.T + self.bias


def linear_probe(
    train: Labelled, validation: Labelled, test: Labelled, strengths: Sequence[float] = STRENGTHS
) -> LinearProbe:
    """Choose the strength on validation, refit on train + validation, test.

    Of strengths that are equally accurate the largest is taken. A label that is in none of the fitted features, and a
    logit that another one equals, count as mistakes. Raises UserError for features or labels that can't be used.
    """
    if not strengths or not all(0 < strength < float("inf") for strength in strengths):
        raise UserError(f"linear_probe: strengths must be finite numbers above 0, got {list(strengths)}")
    named = (train, "train"), (validation, "validation"), (test, "test")
    # Features of an evaluation are tensors of inference mode, which can't take part in a gradient.
    with torch.inference_mode(False), torch.enable_grad():
        parts = [_checked(*part, name) for part, name in named]
        path = fit_path(*parts[0], strengths)
        accuracies = {strength: _accuracy(path[strength], *parts[1]) for strength in path}
        best = max(accuracies.values())
        strength = max(s for s, accuracy in accuracies.items() if accuracy == best)
        both = [torch.cat(pair) for pair in zip(*parts[:2], strict=True)]
        weight, bias, labels = fit_path(both[0], both[1], [strength])[strength]
        accuracy = _accuracy((weight, bias, labels), *parts[2])
    return LinearProbe(strength, best, accuracy, weight, bias, labels)


def fit_path(features: Tensor, labels: Tensor, strengths: Sequence[float]) -> dict[float, Fit]:
    """The optimum for each strength, from the largest down, each from the one before it. Features float64 [N, D]."""
    kinds, targets = labels.unique(return_inverse=True)
    if len(kinds) < 2:
        raise UserError(f"linear_probe: all {len(labels)} labels to fit are {kinds.tolist()}: two classes are needed")
    # Centred features in their principal axes have the same optimum, as b and rotations cost nothing.
    mean = features.mean(0)
    variances, axes = torch.linalg.eigh((features - mean).T @ (features - mean) / len(features))
    rotated = (features - mean) @ axes
    weight, bias = features.new_zeros(len(kinds), features.shape[1]), features.new_zeros(len(kinds))
    path: dict[float, Fit] = {}
    for strength in sorted(strengths, reverse=True):
        weight, bias = _minimise(rotated, targets, strength, (weight, bias), variances.clamp_min(0))
        path[strength] = weight @ axes.T, bias - weight @ axes.T @ mean, kinds
    return path


def objective(features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, strength: float) -> Tensor:
    """The mean objective [] of [N, D], int64 [N], [K, D], [K]: the equation above over N."""
    return F.cross_entropy(features @ weight.T + bias, targets) + strength / (2 * len(targets)) * weight.square().sum()


def _minimise(
    features: Tensor, targets: Tensor, strength: float, start: tuple[Tensor, Tensor], variances: Tensor
) -> tuple[Tensor, Tensor]:
    """L-BFGS with a strong Wolfe line search, in rounds, until the gradient is small. `variances` [D] of the features.

    Each round searches variables scaled by the curvature where it starts, along the principal axes; unscaled, features
    of a narrow cone, weak penalties and strong ones take thousands of steps.
    """
    weight, bias = start
    size = torch.inf
    for _ in range(ROUNDS):
        shares = (features @ weight.T + bias).softmax(1)
        spread = (shares * (1 - shares)).mean().clamp_min(torch.finfo(torch.float64).eps)
        scales = (spread * variances + strength / len(targets)).rsqrt(), spread.rsqrt()
        weight, bias, size = _one_round(features, targets, strength, (weight, bias), scales)
        if size <= GRADIENT:
            break
    if size > 100 * GRADIENT:  # rounding may stop a weak penalty a little earlier
        log.warning("linear_probe: strength %g stopped at a gradient of %.1e, not %.0e", strength, size, GRADIENT)
    return weight, bias


def _one_round(
    features: Tensor, targets: Tensor, strength: float, start: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, float]:
    """At most ITERATIONS steps; weight, bias and the largest entry of the scaled gradient there."""
    scaled = [(value / scale).requires_grad_() for value, scale in zip(start, scales, strict=True)]
    optimizer = torch.optim.LBFGS(
        scaled,
        max_iter=ITERATIONS,
        tolerance_grad=GRADIENT,
        tolerance_change=1e-16,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(features, targets, scaled[0] * scales[0], scaled[1] * scales[1], strength)
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    size = max(float(each.grad.abs().max()) for each in scaled if each.grad is not None)
    weight, bias = (value.detach() * scale for value, scale in zip(scaled, scales, strict=True))
    return weight, bias, size


def _accuracy(fit: Fit, features: Tensor, labels: Tensor) -> float:
    """Percent of [N, D], [N] whose own logit is above all others."""
    weight, bias, kinds = fit
    logits = features @ weight.T + bias
    own = labels[:, None] == kinds
    best_other = logits.masked_fill(own, -torch.inf).amax(1)
    return 100 * float((logits.masked_fill(~own, -torch.inf).amax(1) > best_other).double().mean())


def _checked(features: Tensor, labels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """As float64 [N, D] and int64 [N] outside inference mode. Raises UserError."""
    if features.dim() != 2 or labels.dim() != 1 or len(features) != len(labels) or not len(labels):
        raise UserError(
            f"linear_probe: {name} must be features [N, D] and labels [N] with N of 1 or more, got "
            f"{list(features.shape)} and {list(labels.shape)}"
        )
    if not bool(torch.isfinite(features).all()):
        raise UserError(f"linear_probe: a feature of {name} is not finite")
    device = features.device if features.device.type != "mps" else torch.device("cpu")  # mps has no float64
    return features.detach().to(device, torch.float64).clone(), labels.to(device, torch.int64).clone()
