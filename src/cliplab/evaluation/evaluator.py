"""Collects the embeddings of one benchmark, ranks its queries under its protocol. Knows ids and vectors, no model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torchmetrics.utilities.distributed import gather_all_tensors

from cliplab.benchmark import Benchmark
from cliplab.evaluation.metrics import average_precision, full_grade_ranks, mean_per_class, rank_metrics, soft_recall
from cliplab.evaluation.nearest import top_k
from cliplab.evaluation.ranking import Ranks, Truth, by_query, rank_truths, subset_ranks
from cliplab.evaluation.scoring import CosineScorer, Scorer
from cliplab.evaluation.truth import check_submittable, check_truth, excluded_rows, truths_of


@dataclass
class RankedBenchmark:
    """The outcome of one benchmark (or its transpose) for one way of composing."""

    benchmark: Benchmark
    metrics: dict[str, float]
    per_query: dict[str, Tensor]  # by metric that is a mean over queries: percent by query_id, float64 [Q], on the CPU
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
        return {benchmark.name: RankedBenchmark(benchmark, {}, {}, Ranks(unknown, unknown), queries, gallery, scorer)}
    truths = [truths_of(each, bool(number)) for number, each in enumerate(benchmark.directions)]
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
        precision = _precision_at(direction, ranks["each"], asked["each"]) if "each" in asked else {}
        per_query = _per_query(direction, ranks, graded) | {f"mAP@{k}": precision[k] for k in direction.protocol.map_at}
        metrics = _metrics(direction, ranks["best"], per_query, precision.get(10))
        full_grade = full_grade_ranks(*graded) if graded is not None else None
        per_query = {kind: values.cpu() for kind, values in per_query.items()}
        ranked = RankedBenchmark(direction, metrics, per_query, ranks["best"], *sides, scorer, full_grade)
        outcome[direction.name] = ranked
    return outcome


def _graded(benchmark: Benchmark, ranks: Ranks) -> tuple[list[Tensor], list[list[float]]]:
    """By query the ranks of its graded rows and their gains; a row that the protocol keeps out is never found."""
    assert benchmark.gains is not None
    places = by_query(ranks.under(benchmark.protocol.ties), [len(rows) for rows in benchmark.gains])
    gains = [
        [0.0 if row in excluded else gain for row, gain in rows.items()]
        for rows, excluded in zip(benchmark.gains, excluded_rows(benchmark), strict=True)
    ]
    return places, gains


def _per_query(
    benchmark: Benchmark, ranks: dict[str, Ranks], graded: tuple[list[Tensor], list[list[float]]] | None
) -> dict[str, Tensor]:
    """R@K and the like of each query in percent, under the protocol's tie rule."""
    protocol = benchmark.protocol
    rank = ranks["best"].under(protocol.ties)
    found = {
        f"R@{k}": 100 * ((rank <= k).double() if graded is None else soft_recall(*graded, k))
        for k in protocol.recall_at
    }
    if "subset" in ranks:
        within = ranks["subset"].under(protocol.ties)
        found |= {f"Rsubset@{k}": 100 * (within <= k).double() for k in protocol.subset_at}
        if {"R@5", "Rsubset@1"} <= found.keys():
            found["Avg"] = (found["R@5"] + found["Rsubset@1"]) / 2
    return found


def _precision_at(benchmark: Benchmark, ranks: Ranks, truth: Truth) -> dict[int, Tensor]:
    """K -> AP@K of each query in percent."""
    counts = [len(rows) for rows in truth.positives]
    places = by_query(ranks.under(benchmark.protocol.ties), [min(count, truth.depth or count) for count in counts])
    cuts = {*benchmark.protocol.map_at, *([10] if benchmark.groups else [])}
    return {k: 100 * average_precision(places, k, counts) for k in cuts}


def _metrics(
    benchmark: Benchmark, best: Ranks, per_query: dict[str, Tensor], precision_at_10: Tensor | None
) -> dict[str, float]:
    """Means over the queries, median and mean rank, and mAP@10 of each group of queries."""
    protocol = benchmark.protocol
    found = rank_metrics(best.pessimistic, best.ties, protocol.recall_at, protocol.ties)
    if benchmark.gains is not None:
        found = {key: value for key, value in found.items() if not key.startswith("R@")}
    metrics = {key: float(value) for key, value in found.items()}
    if protocol.hit == "class":
        classes = torch.tensor([label for (label,) in benchmark.positives])
        metrics["mean_per_class"] = mean_per_class(best.under(protocol.ties), classes)
    metrics |= {key: float(values.mean()) for key, values in per_query.items()}
    if precision_at_10 is not None:
        for aspect, query_ids in (benchmark.groups or {}).items():
            metrics[f"mAP@10/{aspect}"] = float(precision_at_10[query_ids].mean())
    return metrics


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
