"""Against real resampling of queries."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cliplab.evaluation.bootstrap import bootstrap_intervals, resampled_means


def test_no_benchmark_no_interval() -> None:
    assert bootstrap_intervals({}) == {}


def hits(rank: Tensor, *cuts: int) -> dict[str, Tensor]:
    return {f"R@{k}": 100 * (rank <= k).double() for k in cuts}


def test_intervals_are_those_of_real_resampling() -> None:
    rng = np.random.default_rng(0)
    ranks = {"dress": torch.from_numpy(rng.integers(1, 60, 150)), "shirt": torch.from_numpy(rng.integers(1, 25, 220))}
    precision = {name: torch.from_numpy(100 * rng.random(len(rank)) ** 3) for name, rank in ranks.items()}
    given = {name: hits(rank, 10, 50) | {"mAP@5": precision[name]} for name, rank in ranks.items()}
    found = bootstrap_intervals(given)
    assert found.keys() == {f"{name}/{k}" for name in ("dress", "shirt", "mean") for k in ("R@10", "R@50", "mAP@5")}
    for kind in ("R@10", "R@50", "mAP@5"):
        draws = {}
        for name, values in given.items():
            sample = rng.integers(0, len(values[kind]), (8000, len(values[kind])))
            draws[name] = values[kind].numpy()[sample].mean(axis=1)
        draws["mean"] = (draws["dress"] + draws["shirt"]) / 2
        for name, values in draws.items():
            low, high = found[f"{name}/{kind}"]
            assert [low, high] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist(), abs=0.8), (name, kind)
            assert isinstance(low, float) and low <= values.mean() <= high
    mean, dress = found["mean/R@10"], found["dress/R@10"]
    assert mean[1] - mean[0] < dress[1] - dress[0], "the mean of two benchmarks is surer than one"


def test_many_distinct_values_are_drawn_in_parts() -> None:
    values = np.random.default_rng(1).random(3000)
    parts = resampled_means(values, np.random.default_rng(2), 3000)  # 9 million counts: three parts
    assert parts.shape == (3000,) and len(set(parts.tolist())) > 2900
    assert parts.std() == pytest.approx(values.std() / 3000**0.5, rel=0.05) and abs(parts.mean() - values.mean()) < 1e-3


def test_intervals_depend_on_the_seed_alone() -> None:
    given = {"t2i": hits(torch.arange(1, 101), 10, 37)}
    assert bootstrap_intervals(given, seed=3) == bootstrap_intervals(given, seed=3)
    draws = {tuple(bootstrap_intervals(given, seed, samples=200)["t2i/R@37"]) for seed in range(5)}
    assert len(draws) > 1
    sure = bootstrap_intervals({"t2i": hits(torch.ones(9), 1)})
    assert sure == {"t2i/R@1": [100, 100], "mean/R@1": [100, 100]}
