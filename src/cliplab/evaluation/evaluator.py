"""Collects the embeddings of one benchmark, ranks its queries under its protocol. Knows ids and vectors, no model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torchmetrics.utilities.distributed import gather_all_tensors

from cliplab.benchmark import Benchmark
from cliplab.evaluation.metrics import RetrievalMetric, mean_per_class
from cliplab.evaluation.ranking import CosineScorer, Ranks, Scorer, rank_positives, top_k


@dataclass
class RankedBenchmark:
    """The outcome of one benchmark (or its transpose) for one way of composing."""

    benchmark: Benchmark
    metrics: dict[str, float]
    ranks: Ranks  # by query_id
    queries: Tensor  # unit, by query_id [Q, ...]
    gallery: Tensor  # unit [G, D]
    scorer: Scorer

    def ranks_under_protocol(self) -> Tensor:
        """float64 [Q]."""
        return self.ranks.under(self.benchmark.protocol.ties)

    def nearest(self, query_ids: list[int], k: int) -> Tensor:
        """Gallery rows of the k best candidates of some queries [n, k]."""
        excluded = excluded_rows(self.benchmark)
        chosen = [excluded[query_id] for query_id in query_ids]
        return top_k(self.queries[query_ids], self.gallery, k, chosen, self.scorer)


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
        self.benchmark = benchmark
        self.scorers = dict(scorers or {"": CosineScorer()})
        self._queries: dict[str, list[Tensor]] = {label: [] for label in self.scorers}
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
        """Unit queries by query_id [Q, ...], from all processes."""
        rows = _assemble(self._query_rows, self._queries[label], len(self.benchmark.queries))
        return average_wordings(rows, torch.tensor(self.benchmark.queries["query_id"]))

    def finish(self) -> dict[str, dict[str, RankedBenchmark]]:
        """label -> benchmark name -> outcome; the transpose of a benchmark is ranked from the same embeddings."""
        gallery = _assemble(self._gallery_rows, self._gallery, len(self.benchmark.gallery))
        if self.benchmark.wording_of is not None:
            gallery = average_wordings(gallery, torch.tensor(self.benchmark.wording_of))
        outcome: dict[str, dict[str, RankedBenchmark]] = {}
        for label, scorer in self.scorers.items():
            queries = self.queries(label)
            if queries.dim() == 2:  # a query of one modality is a vector, whatever composes the others
                scorer = CosineScorer()
            sides = ((queries, gallery), (gallery, queries))
            outcome[label] = {
                direction.name: rank_benchmark(direction, *side, scorer)
                for direction, side in zip(self.benchmark.directions, sides, strict=False)
            }
        return outcome


def rank_benchmark(benchmark: Benchmark, queries: Tensor, gallery: Tensor, scorer: Scorer) -> RankedBenchmark:
    """Rank unit queries by query_id [Q, ...] in a unit gallery [G, D]; each process ranks its share of the queries."""
    world, rank = (distributed.get_world_size(), distributed.get_rank()) if distributed.is_initialized() else (1, 0)
    share = torch.arange(rank, len(queries), world)
    excluded = excluded_rows(benchmark)
    ours = rank_positives(
        queries[share],
        gallery,
        [benchmark.positives[query_id] for query_id in share.tolist()],
        [excluded[query_id] for query_id in share.tolist()],
        scorer,
    )
    metric = RetrievalMetric(benchmark.protocol.recall_at, benchmark.protocol.ties).to(gallery.device)
    metric.update(share.to(gallery.device), ours.pessimistic.to(gallery.device), ours.ties.to(gallery.device))
    metrics = {key: float(value) for key, value in metric.compute().items()}
    with metric.sync_context():
        _, pessimistic, ties = metric.table()
    ranks = Ranks(pessimistic.cpu(), ties.cpu())
    if benchmark.protocol.hit == "class":
        classes = torch.tensor([label for (label,) in benchmark.positives])
        metrics["mean_per_class"] = mean_per_class(ranks.under(benchmark.protocol.ties), classes)
    return RankedBenchmark(benchmark, metrics, ranks, queries, gallery, scorer)


def average_wordings(rows: Tensor, ids: Tensor) -> Tensor:
    """Unit rows [R, ..., D] and what each words [R] -> unit [Q, ..., D] by id: mean over the wordings, normalised.

    What has one wording keeps its embedding bit for bit.
    """
    ids = ids.to(rows.device)
    counts = torch.bincount(ids)
    if int(counts.max()) == 1:
        return rows[ids.argsort()]
    total = torch.zeros(len(counts), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    return F.normalize(total.index_add_(0, ids, rows), dim=-1)


def _assemble(row_ids: list[Tensor], embeddings: list[Tensor], count: int) -> Tensor:
    """What all processes embedded, in the order of the table [count, ...]; repeated rows are dropped."""
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        row_ids, embeddings = _gather_rows(row_ids, embeddings)
    rows, vectors = torch.cat(row_ids), torch.cat(embeddings)
    assert len(rows.unique()) == count, f"{count} rows expected, {len(rows.unique())} embedded"
    table = torch.empty(count, *vectors.shape[1:], dtype=vectors.dtype, device=vectors.device)
    table[rows] = vectors
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
