"""Bootstrap over queries (Efron & Tibshirani, 1993): how far would another sample of queries move a mean?"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray


def bootstrap_intervals(
    per_query: Mapping[str, Mapping[str, ArrayLike]], seed: int = 0, samples: int = 10_000
) -> dict[str, list[float]]:
    """Benchmark -> metric -> percent of each query [Q] -> 95 % percentile intervals over resampled queries.

    By `name/R@k` and the like, and `mean/R@k`: queries are drawn within each benchmark.
    """
    generator = np.random.default_rng(seed)
    intervals: dict[str, list[float]] = {}
    for kind in next(iter(per_query.values()), {}):
        draws = []
        for name, values in per_query.items():
            draws.append(resampled_means(np.asarray(values[kind]), generator, samples))
            intervals[f"{name}/{kind}"] = np.percentile(draws[-1], [2.5, 97.5]).round(4).tolist()
        intervals[f"mean/{kind}"] = np.percentile(np.mean(draws, axis=0), [2.5, 97.5]).round(4).tolist()
    return intervals


def resampled_means(values: NDArray[np.float64], generator: np.random.Generator, samples: int) -> NDArray[np.float64]:
    """Values [Q] -> means of samples of Q of them, drawn with replacement [samples].

    To draw Q of Q values is to draw how often each distinct one comes: a multinomial; recalls have few of them.
    """
    distinct, counts = np.unique(values.round(9), return_counts=True)
    distinct, shares = distinct[::-1], counts[::-1] / len(values)
    means = []
    for start in range(0, samples, step := max(1, 2**22 // len(distinct))):
        drawn = generator.multinomial(len(values), shares, min(step, samples - start))
        means.append(drawn @ distinct / len(values))
    return np.concatenate(means).round(9)
