"""Bootstrap over queries: intervals of a row, and whether it differs from another one (Efron & Tibshirani, 1993).

A query counts with the mean of its hits (or AP@K) over the seeds of a row. So both tell how far another sample of
queries would move the numbers of these trained models; how far another training would is the ± over seeds.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cliplab.evaluation.bootstrap import resampled_means
from cliplab.sweeps.held import Ranks, per_query

Hits = dict[str, NDArray[np.float64]]  # benchmark -> percent per query [Q]
SAMPLES = 10_000


def hits_of(metric: str, ranks: Sequence[Ranks], expected: Sequence[float]) -> Hits | None:
    """A metric of results.json and the columns of each seed -> percent per query, averaged over seeds.

    None for a metric that is no mean over queries (a median rank, a mean over classes), or of some of them: then the
    mean over queries, and over the benchmarks of a mean, is not `expected`, by seed.
    """
    _, name, kind = [*metric.split("/", 2), "", ""][:3]
    per_seed = []
    for own, value in zip(ranks, expected, strict=True):
        names = list(own) if name == "mean" else [name]
        try:
            hits = {each: per_query(own[each][1], kind) for each in names}
        except KeyError:
            return None
        if not hits or abs(_mean(hits) - value) > 1e-6:
            return None
        per_seed.append(hits)
    if not per_seed or any(hits.keys() != per_seed[0].keys() for hits in per_seed):
        return None
    return {each: np.mean([hits[each] for hits in per_seed], axis=0) for each in per_seed[0]}


def interval(hits: Hits, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over queries, averaged over benchmarks."""
    low, high = np.percentile(_resampled(hits, seed), [2.5, 97.5])
    return float(low), float(high)


def p_value(row: Hits, baseline: Hits, seed: int = 0) -> float:
    """Two-sided p of the paired bootstrap: queries are drawn together with both of their hits.

    p = 2 (1 + min(#{d <= 0}, #{d >= 0})) / (1 + samples), at most 1, with d the resampled differences.
    """
    drawn = _resampled({name: row[name] - baseline[name] for name in row}, seed)
    fewer = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * (1 + fewer) / (1 + len(drawn)))


def same_queries(one: Sequence[Ranks], other: Sequence[Ranks]) -> bool:
    """Whether all runs were asked the same queries in the same order."""
    asked = [{name: names for name, (names, _) in ranks.items()} for ranks in (*one, *other)]
    return all(each == asked[0] for each in asked)


def _mean(hits: Mapping[str, NDArray[np.float64]]) -> float:
    return float(np.mean([values.mean() for values in hits.values()]))


def _resampled(hits: Hits, seed: int) -> NDArray[np.float64]:
    """Means of SAMPLES samples of queries [SAMPLES], drawn within each benchmark."""
    generator = np.random.default_rng(seed)
    return np.mean([resampled_means(values, generator, SAMPLES) for values in hits.values()], axis=0)
