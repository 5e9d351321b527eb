"""What is ranked for a protocol's metrics, and what a benchmark must tell for that."""

from cliplab.benchmark import Benchmark
from cliplab.errors import UserError
from cliplab.evaluation.ranking import Truth

SUBMITTED_IN_SUBSET = 3  # names per query that the test server of a blind benchmark with subsets takes


def check_truth(benchmark: Benchmark) -> None:
    """Raises UserError for what a protocol asks and the benchmark lacks; it names the query that has no truth."""
    empty = [query_id for query_id, rows in enumerate(benchmark.positives) if not rows]
    tables = {"positives": benchmark.positives}
    if not empty:  # excluded rows are known from the positives
        tables |= {"relevant": relevant_rows(benchmark), "gains": benchmark.gains, "subsets": benchmark.subsets}
    for name, found in tables.items():
        empty = [query_id for query_id, rows in enumerate(found or []) if not rows]
        if empty:
            query = benchmark.query_names[empty[0]]
            also = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
            raise UserError(
                f"benchmark '{benchmark.name}': no {name} for query '{query}'{also}; leave such queries out"
            )
    if benchmark.protocol.subset_at and benchmark.subsets is None:
        raise UserError(f"benchmark '{benchmark.name}' has no subsets, but its protocol has subset_at")
    for aspect, query_ids in (benchmark.groups or {}).items():
        if not query_ids:
            raise UserError(f"benchmark '{benchmark.name}': no query carries the aspect '{aspect}'")


def check_submittable(benchmark: Benchmark) -> None:
    """Raises UserError for a query whose subset is too small for the list that a test server takes (CIRR)."""
    short = [query_id for query_id, rows in enumerate(benchmark.subsets or []) if len(rows) < SUBMITTED_IN_SUBSET]
    if short:
        assert benchmark.subsets is not None
        also = f" and of {len(short) - 1} more" if len(short) > 1 else ""
        raise UserError(
            f"benchmark '{benchmark.name}': in the subset of query '{benchmark.query_names[short[0]]}'{also} are "
            f"{len(benchmark.subsets[short[0]])} images, a submission names {SUBMITTED_IN_SUBSET} of them: add the "
            "missing pictures"
        )


def truths_of(benchmark: Benchmark, backward: bool) -> dict[str, Truth]:
    """What has to be ranked for a protocol's metrics."""
    excluded = excluded_rows(benchmark)
    truths = {"best": Truth(benchmark.positives, excluded, backward=backward)}
    depth = max([*benchmark.protocol.map_at, 10 if benchmark.groups else 0])
    if depth:
        truths["each"] = Truth(relevant_rows(benchmark), excluded, "each", backward, depth)
    if benchmark.gains is not None:
        truths["graded"] = Truth([[*rows] for rows in benchmark.gains], excluded, "graded", backward)
    return truths


def relevant_rows(benchmark: Benchmark) -> list[list[int]]:
    """By query_id: what counts for mAP and is not kept out of the ranking, each row once."""
    rows = benchmark.relevant if benchmark.relevant is not None else benchmark.positives
    return [sorted({*own} - {*out}) for own, out in zip(rows, excluded_rows(benchmark), strict=True)]


def excluded_rows(benchmark: Benchmark) -> list[list[int]]:
    """By query_id: the gallery rows that the protocol keeps out of its ranking."""
    if not benchmark.protocol.exclude_reference:
        return [[] for _ in benchmark.positives]
    return [
        [row] if row >= 0 and row not in p else []
        for row, p in zip(benchmark.references(), benchmark.positives, strict=True)
    ]
