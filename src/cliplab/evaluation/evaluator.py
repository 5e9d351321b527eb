"""Collects the embeddings of one benchmark, ranks its queries under its protocol. Knows ids and vectors, no model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torchmetrics.utilities.distributed import gather_all_tensors

from cliplab.benchmark import Benchmark
from cliplab.errors import UserError
from cliplab.evaluation.metrics import (
    full_grade_ranks,
    mean_average_precision,
    mean_per_class,
    rank_metrics,
    soft_recall,
)
from cliplab.evaluation.nearest import top_k
from cliplab.evaluation.ranking import Ranks, Truth, by_query, rank_truths, subset_ranks
from cliplab.evaluation.scoring import CosineScorer, Scorer

SUBMITTED_IN_SUBSET = 3  # names per query that the test server of a blind benchmark with subsets takes


@dataclass
class RankedBenchmark:
    """The outcome of one benchmark (or its transpose) for one way of composing."""

    benchmark: Benchmark
    metrics: dict[str, float]
    ranks: Ranks  # by query_id
    queries: Tensor  # unit, by query_id [Q, ...]
    gallery: Tensor  # unit [G, D]
    scorer: Scorer
    full_grade: Tensor | None = None  # soft targets: rank of a query's best row of grade 1, float64 [Q]

    def ranks_under_protocol(self) -> Tensor:
        """float64 [Q]."""
        return self.ranks.under(self.benchmark.protocol.ties)

    def solved_from(self) -> Tensor:
        """The smallest K at which each query counts as solved, float64 [Q]."""
        return self.ranks_under_protocol() if self.full_grade is None else self.full_grade

    def nearest(self, query_ids: list[int], k: int) -> Tensor:
        """Gallery rows of the k best candidates of some queries [n, k]."""
        excluded = excluded_rows(self.benchmark)
        chosen = [excluded[query_id] for query_id in query_ids]
        return top_k(self.queries[query_ids], self.gallery, k, chosen, self.scorer)

    def nearest_in_subset(self, query_id: int, k: int) -> list[int]:
        """The k best rows of a query's own subset, best first."""
        assert self.benchmark.subsets is not None
        rows = torch.tensor(self.benchmark.subsets[query_id])
        best = top_k(self.queries[[query_id]], self.gallery[rows], k, [[]], self.scorer)[0]
        return rows[best.cpu()].tolist()


def excluded_rows(benchmark: Benchmark) -> list[list[int]]:
    """By query_id: the gallery rows that the protocol keeps out of its ranking."""
    if not benchmark.protocol.exclude_reference:
        return [[] for _ in benchmark.positives]
    return [
        [row] if row >= 0 and row not in p else []
        for row, p in zip(benchmark.references(), benchmark.positives, strict=True)
    ]


class Evaluator:
    """Takes rows in any order, repeated rows included, from any number of processes.

    `scorers` maps a label (a way of composing) to how its queries are compared with the gallery.
    """

    def __init__(self, benchmark: Benchmark, scorers: Mapping[str, Scorer] | None = None) -> None:
        for direction in benchmark.directions:
            check = check_submittable if direction.blind else check_truth
            check(direction)
        self.benchmark = benchmark
        self.scorers = dict(scorers or {"": CosineScorer()})
        self._queries: dict[str, list[Tensor]] = {label: [] for label in self.scorers}
        self._by_id: dict[str, Tensor] = {}
        self._targets: Tensor | None = None
        self._query_rows: list[Tensor] = []
        self._gallery: list[Tensor] = []
        self._gallery_rows: list[Tensor] = []

    def add_queries(self, row_id: Tensor, embeddings: Mapping[str, Tensor]) -> None:
        """Rows [B] of the query table and, per label, their unit embeddings [B, ...]."""
        self._query_rows.append(row_id)
        for label, embedding in embeddings.items():
            self._queries[label].append(embedding.detach().float())

    def add_gallery(self, row_id: Tensor, embedding: Tensor) -> None:
        """Rows [B] of the gallery table and their unit embeddings [B, D]."""
        self._gallery_rows.append(row_id)
        self._gallery.append(embedding.detach().float())

    def queries(self, label: str = "") -> Tensor:
        """Unit queries by query_id [Q, ...], from all processes, once all are added."""
        if label not in self._by_id:
            rows = _assemble(self._query_rows, self._queries[label], len(self.benchmark.queries))
            self._by_id[label] = average_wordings(rows, torch.tensor(self.benchmark.queries["query_id"]))
        return self._by_id[label]

    def gallery(self) -> Tensor:
        """Unit targets [G, D] from all processes, once all are added; wordings of a target are averaged."""
        if self._targets is None:
            self._targets = _assemble(self._gallery_rows, self._gallery, len(self.benchmark.gallery))
            if self.benchmark.wording_of is not None:
                self._targets = average_wordings(self._targets, torch.tensor(self.benchmark.wording_of))
        return self._targets

    def finish(self) -> dict[str, dict[str, RankedBenchmark]]:
        """label -> benchmark name -> outcome; the transpose of a benchmark is ranked from the same embeddings."""
        gallery = self.gallery()
        outcome: dict[str, dict[str, RankedBenchmark]] = {}
        for label, scorer in self.scorers.items():
            queries = self.queries(label)
            if queries.dim() == 2:  # a query of one modality is a vector, whatever composes the others
                scorer = CosineScorer()
            outcome[label] = rank_benchmark(self.benchmark, queries, gallery, scorer)
        return outcome


def rank_benchmark(
    benchmark: Benchmark, queries: Tensor, gallery: Tensor, scorer: Scorer
) -> dict[str, RankedBenchmark]:
    """Rank unit queries by query_id [Q, ...] in a unit gallery [G, D], and the transpose from the same scores.

    By name of the direction. All processes share the work.
    """
    if benchmark.blind:
        unknown = torch.empty(0, dtype=torch.int64)
        return {benchmark.name: RankedBenchmark(benchmark, {}, Ranks(unknown, unknown), queries, gallery, scorer)}
    truths = [_truths(each, bool(number)) for number, each in enumerate(benchmark.directions)]
    flat = [truth for of_direction in truths for truth in of_direction.values()]
    found = iter(rank_truths(queries, gallery, flat, scorer, spread=True))
    outcome: dict[str, RankedBenchmark] = {}
    for number, (direction, asked) in enumerate(zip(benchmark.directions, truths, strict=True)):
        ranks = {key: next(found) for key in asked}
        sides = (gallery, queries) if number else (queries, gallery)
        if direction.protocol.subset_at and direction.subsets is not None:
            where = (direction.positives, direction.subsets, excluded_rows(direction))
            ranks["subset"] = subset_ranks(*sides, *where, scorer)
        graded = _graded(direction, ranks["graded"]) if "graded" in ranks else None
        metrics = _metrics(direction, ranks, asked, graded)
        full_grade = full_grade_ranks(*graded) if graded is not None else None
        outcome[direction.name] = RankedBenchmark(direction, metrics, ranks["best"], *sides, scorer, full_grade)
    return outcome


def check_truth(benchmark: Benchmark) -> None:
    """Raises UserError for what a protocol asks and the benchmark lacks; it names the query that has no truth."""
    empty = [query_id for query_id, rows in enumerate(benchmark.positives) if not rows]
    tables = {"positives": benchmark.positives}
    if not empty:  # excluded rows are known from the positives
        tables |= {"relevant": _relevant(benchmark), "gains": benchmark.gains, "subsets": benchmark.subsets}
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


def _relevant(benchmark: Benchmark) -> list[list[int]]:
    """By query_id: what counts for mAP and is not kept out of the ranking, each row once."""
    rows = benchmark.relevant if benchmark.relevant is not None else benchmark.positives
    return [sorted({*own} - {*out}) for own, out in zip(rows, excluded_rows(benchmark), strict=True)]


def _truths(benchmark: Benchmark, backward: bool) -> dict[str, Truth]:
    """What has to be ranked for a protocol's metrics."""
    excluded = excluded_rows(benchmark)
    truths = {"best": Truth(benchmark.positives, excluded, backward=backward)}
    depth = max([*benchmark.protocol.map_at, 10 if benchmark.groups else 0])
    if depth:
        truths["each"] = Truth(_relevant(benchmark), excluded, "each", backward, depth)
    if benchmark.gains is not None:
        truths["graded"] = Truth([[*rows] for rows in benchmark.gains], excluded, "graded", backward)
    return truths


def _graded(benchmark: Benchmark, ranks: Ranks) -> tuple[list[Tensor], list[list[float]]]:
    """By query the ranks of its graded rows and their gains; a row that the protocol keeps out is never found."""
    assert benchmark.gains is not None
    places = by_query(ranks.under(benchmark.protocol.ties), [len(rows) for rows in benchmark.gains])
    gains = [
        [0.0 if row in excluded else gain for row, gain in rows.items()]
        for rows, excluded in zip(benchmark.gains, excluded_rows(benchmark), strict=True)
    ]
    return places, gains


def _metrics(
    benchmark: Benchmark,
    ranks: dict[str, Ranks],
    asked: dict[str, Truth],
    graded: tuple[list[Tensor], list[list[float]]] | None,
) -> dict[str, float]:
    """R@K and the like in percent, under the protocol's tie rule."""
    protocol, best = benchmark.protocol, ranks["best"]
    found = rank_metrics(best.pessimistic, best.ties, protocol.recall_at, protocol.ties)
    metrics = {key: float(value) for key, value in found.items()}
    if protocol.hit == "class":
        classes = torch.tensor([label for (label,) in benchmark.positives])
        metrics["mean_per_class"] = mean_per_class(best.under(protocol.ties), classes)
    if graded is not None:
        metrics = {key: value for key, value in metrics.items() if not key.startswith("R@")}
        metrics |= {f"R@{k}": soft_recall(*graded, k) for k in protocol.recall_at}
    if "subset" in ranks:
        within = ranks["subset"].under(protocol.ties)
        metrics |= {f"Rsubset@{k}": 100 * float((within <= k).double().mean()) for k in protocol.subset_at}
        if {"R@5", "Rsubset@1"} <= metrics.keys():
            metrics["Avg"] = (metrics["R@5"] + metrics["Rsubset@1"]) / 2
    return metrics | (_map_metrics(benchmark, ranks["each"], asked["each"]) if "each" in asked else {})


def _map_metrics(benchmark: Benchmark, ranks: Ranks, truth: Truth) -> dict[str, float]:
    """mAP@K, and mAP@10 of each group of queries."""
    counts = [len(rows) for rows in truth.positives]
    places = by_query(ranks.under(benchmark.protocol.ties), [min(count, truth.depth or count) for count in counts])
    found = {f"mAP@{k}": mean_average_precision(places, k, counts) for k in benchmark.protocol.map_at}
    for aspect, query_ids in (benchmark.groups or {}).items():
        chosen = [places[query_id] for query_id in query_ids], 10, [counts[query_id] for query_id in query_ids]
        found[f"mAP@10/{aspect}"] = mean_average_precision(*chosen)
    return found


def average_wordings(rows: Tensor, ids: Tensor) -> Tensor:
    """Unit rows [R, ..., D] and what each words [R] -> unit [Q, ..., D] by id: mean over the wordings, normalised.

    What has one wording keeps its embedding bit for bit.
    """
    ids = ids.to(rows.device)
    counts = torch.bincount(ids)
    if int(counts.max()) == 1:
        order = ids.argsort()
        return rows if torch.equal(order, torch.arange(len(order), device=order.device)) else rows[order]
    total = torch.zeros(len(counts), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    return F.normalize(total.index_add_(0, ids, rows), dim=-1)


def _assemble(row_ids: list[Tensor], embeddings: list[Tensor], count: int) -> Tensor:
    """What all processes embedded, in the order of the table [count, ...]; repeated rows are dropped.

    Empties the list of embeddings as it goes.
    """
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        row_ids, embeddings = _gather_rows(row_ids, embeddings)
    found = len(torch.cat(row_ids).unique())
    assert found == count, f"{count} rows expected, {found} embedded"
    table = embeddings[0].new_empty(count, *embeddings[0].shape[1:])
    for rows in row_ids:
        table[rows] = embeddings.pop(0)  # a large gallery must not be held twice
    return table


def _gather_rows(row_ids: list[Tensor], embeddings: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The rows of all processes; one without rows knows no shape, so vectors travel flat."""
    shapes: list[tuple[int, ...] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(shapes, tuple(embeddings[0].shape[1:]) if embeddings else None)
    shape = next(found for found in shapes if found is not None)
    rows = torch.cat(row_ids) if row_ids else torch.empty(0, dtype=torch.int64)
    flat = torch.cat([each.flatten() for each in embeddings]) if embeddings else torch.empty(0)
    rows, flat = gather_all_tensors(rows), gather_all_tensors(flat)
    return rows, [each.view(-1, *shape) for each in flat]
