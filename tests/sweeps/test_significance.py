"""Against plain loops that draw query after query."""

import random

import numpy as np
import pytest

from cliplab.sweeps import significance
from cliplab.sweeps.significance import hits_of, interval, p_value, same_queries


def ranks(counts, seed, names=("dress", "shirt")):
    generator = np.random.default_rng(seed)
    return {
        n: ([f"{n}{q}" for q in range(c)], {"rank": generator.integers(1, 60, c).astype(float)})
        for n, c in zip(names, counts, strict=True)
    }


def plain_recall(own, name, k):
    values = own[name][1]["rank"]
    return 100 * sum(rank <= k for rank in values) / len(values)


def plain_mean(own, k):
    return sum(plain_recall(own, name, k) for name in own) / len(own)


def plain_bootstrap(per_benchmark, samples, seed):
    """Means over benchmarks of means over queries, drawn one by one."""
    generator = random.Random(seed)
    found = []
    for _ in range(samples):
        means = []
        for values in per_benchmark:
            drawn = [values[generator.randrange(len(values))] for _ in values]
            means.append(sum(drawn) / len(drawn))
        found.append(sum(means) / len(means))
    return sorted(found)


def test_hits_are_averaged_over_seeds_query_by_query():
    runs = [ranks((30, 40), seed) for seed in range(3)]
    found = hits_of("test/dress/R@10", runs, [plain_recall(own, "dress", 10) for own in runs])
    for query in range(30):
        assert found["dress"][query] == pytest.approx(
            sum(100 * (own["dress"][1]["rank"][query] <= 10) for own in runs) / 3
        )
    assert list(found) == ["dress"]


def test_means_and_averages_are_recognised_by_their_value():
    runs = [ranks((30, 40), seed) for seed in range(2)]
    for metric, value in (
        ("test/mean/R@10", lambda own: plain_mean(own, 10)),
        ("test/mean/Avg", lambda own: (plain_mean(own, 10) + plain_mean(own, 50)) / 2),
    ):
        found = hits_of(metric, runs, [value(own) for own in runs])
        assert set(found) == {"dress", "shirt"}
        assert np.mean([found[n].mean() for n in found]) == pytest.approx(np.mean([value(own) for own in runs]))
        assert hits_of(metric, runs, [value(own) + 0.1 for own in runs]) is None


@pytest.mark.parametrize("kind", ["Rsubset@1", "mAP@5", "Avg"])
def test_a_column_of_its_own_counts_before_the_ranks(kind):
    runs = [ranks((30, 40), seed) for seed in range(2)]
    for seed, own in enumerate(runs):
        for _, columns in own.values():
            columns[kind] = 100 * np.random.default_rng(seed).random(len(columns["rank"]))
    dress = hits_of(f"test/dress/{kind}", runs, [own["dress"][1][kind].mean() for own in runs])
    assert np.allclose(dress["dress"], (runs[0]["dress"][1][kind] + runs[1]["dress"][1][kind]) / 2)
    both = hits_of(f"test/mean/{kind}", runs, [np.mean([c[kind].mean() for _, c in own.values()]) for own in runs])
    assert set(both) == {"dress", "shirt"}


@pytest.mark.parametrize(
    "metric",
    ["test/dress/Rsubset@1", "test/dress/mAP@5", "test/dress/mAP@10/color", "test/dress/median_rank", "test/hat/R@10"]
    + ["test/dress/R@10_optimistic", "test/linear_probe"],
)
def test_what_is_no_mean_over_queries_has_no_hits(metric):
    assert hits_of(metric, [ranks((30, 40), 0)], [50.0]) is None


def test_the_interval_is_that_of_a_plain_bootstrap():
    generator = np.random.default_rng(5)
    hits = {"a": generator.choice([0.0, 50.0, 100.0], 25), "b": generator.choice([0.0, 100.0], 60, p=[0.8, 0.2])}
    drawn = plain_bootstrap([list(values) for values in hits.values()], 4000, 1)
    low, high = interval(hits)
    assert low == pytest.approx(drawn[100], abs=1.2) and high == pytest.approx(drawn[-100], abs=1.2)


@pytest.mark.parametrize("gain", [0.0, 0.12, 0.3])
def test_p_is_that_of_a_plain_paired_bootstrap(gain):
    generator = np.random.default_rng(7)
    base = {"a": generator.choice([0.0, 100.0], 50), "b": generator.choice([0.0, 100.0], 70)}
    row = {name: np.where(generator.random(len(v)) < gain, 100.0, v) for name, v in base.items()}
    row = {name: np.where(generator.random(len(v)) < 0.06, 0.0, v) for name, v in row.items()}
    drawn = plain_bootstrap([list(row[n] - base[n]) for n in base], 4000, 2)
    fewer = min(sum(d <= 1e-9 for d in drawn), sum(d >= -1e-9 for d in drawn))
    assert p_value(row, base) == pytest.approx(min(1, 2 * (1 + fewer) / 4001), abs=0.03)
    assert p_value(base, row) == pytest.approx(p_value(row, base), abs=0.03), "two-sided"


def test_pairs_tell_what_separate_intervals_do_not():
    """Hard and easy queries spread both rows alike; the pairs differ in the same direction."""
    base = np.repeat([0.0, 100.0], 100)
    row = base.copy()
    row[:12] = 100.0
    assert interval({"a": base})[1] > interval({"a": row})[0], "their intervals overlap"
    assert p_value({"a": row}, {"a": base}) < 0.01


def test_equal_rows_differ_in_nothing():
    hits = {"a": np.repeat([0.0, 100.0], 20)}
    assert p_value(hits, hits) == 1


def test_p_is_never_zero_and_as_small_as_the_samples_allow():
    assert p_value({"a": np.full(50, 100.0)}, {"a": np.zeros(50)}) == 2 / (significance.SAMPLES + 1)


def test_rows_that_were_asked_other_queries_are_not_paired():
    one, other = ranks((3, 4), 0), ranks((3, 4), 1)
    assert same_queries([one], [other])
    other["dress"][0][0] = "another"
    assert not same_queries([one], [other])
    assert not same_queries([one], [ranks((3,), 0, ("dress",))])
