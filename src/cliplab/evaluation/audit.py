"""Which queries need both modalities: solved at K by the image alone, by the text alone, or only by composing them.

A query that a single modality solves says nothing about composing. When it is solved, SOLVED says.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

SHARES = {
    "image_only": "solved by the reference image alone",
    "text_only": "solved by the text alone",
    "either": "solved by at least one of the two alone",
    "composer_only": "solved by the composer, by neither alone: needs both",
    "lost": "solved by one of the two alone, not by the composer",
    "unsolved": "solved by none of the three",
}
SOLVED = {  # at K, by the protocol's `target`
    "hard": "the rank of its target is at most K",
    "soft": "a target of grade 1 is among the first K; lower grades do not count here, while they do in R@K",
}
Audit = dict[str, dict[str, dict[str, float]]]  # benchmark or mean -> R@K -> share -> percent of the queries


def modality_audit(ranks: Mapping[str, Mapping[str, Tensor]], recall_at: Sequence[int]) -> Audit:
    """Ranks [Q] by way of composing ("" = the model's own, image_only, text_only) and benchmark -> shares in percent.

    A rank is the K from which a query is solved. either + composer_only + unsolved = 100, and either + composer_only -
    lost is the composer's recall of hard targets. `mean` is unweighted, over benchmarks. Empty where the baselines were
    not ranked.
    """
    if not {"image_only", "text_only"} <= set(ranks):
        return {}
    audit: Audit = {
        name: {
            f"R@{k}": _shares(ranks[""][name] <= k, ranks["image_only"][name] <= k, ranks["text_only"][name] <= k)
            for k in recall_at
        }
        for name in ranks["image_only"]
    }
    benchmarks = list(audit.values())
    audit["mean"] = {
        f"R@{k}": {share: sum(b[f"R@{k}"][share] for b in benchmarks) / len(benchmarks) for share in SHARES}
        for k in recall_at
    }
    return audit


def _shares(composer: Tensor, image: Tensor, text: Tensor) -> dict[str, float]:
    """Who solves each query, bool [Q] -> percent of the queries."""
    either = image | text
    solved = {
        "image_only": image,
        "text_only": text,
        "either": either,
        "composer_only": composer & ~either,
        "lost": either & ~composer,
        "unsolved": ~(either | composer),
    }
    return {share: 100 * queries.sum().item() / len(queries) for share, queries in solved.items()}
