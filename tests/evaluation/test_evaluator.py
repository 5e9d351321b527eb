from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from cliplab.benchmark import PROTOCOLS, Benchmark, Protocol
from cliplab.data.dataset import GALLERY_FEATURES, QUERY_FEATURES
from cliplab.evaluation.evaluator import Evaluator, RankedBenchmark, average_wordings, rank_benchmark
from cliplab.evaluation.scoring import CosineScorer, JointScorer
from cliplab.evaluation.truth import excluded_rows
from tests.evaluation.plain import integers, precision_at, ranking
from tests.processes import in_processes

G, D = 9, 6
QUERY_IDS = [0, 0, 1, 2, 2, 2, 3, 4]  # queries 0 and 2 are asked in several wordings
REFERENCES = {0: 5, 1: -1, 2: 8, 3: 3, 4: 0}
POSITIVES = [[1], [2, 4], [7], [3, 6], [4]]  # the reference of query 3 is a positive of its own


def make_benchmark(protocol: Protocol, transpose: bool = False) -> Benchmark:
    rows = len(QUERY_IDS)
    queries = {
        "query_id": QUERY_IDS,
        "reference_id": [REFERENCES[query_id] for query_id in QUERY_IDS],
        "image": [None] * rows,
        "text": [f"wording {row}" for row in range(rows)],
    }
    gallery = {"id": [f"picture {row}" for row in range(G)], "image": [None] * G, "text": [None] * G}
    return Benchmark(
        name="t2i" if transpose else "dress",
        protocol=protocol,
        queries=Dataset.from_dict(queries, features=QUERY_FEATURES),
        gallery=Dataset.from_dict(gallery, features=GALLERY_FEATURES),
        positives=POSITIVES,
        query_names=[f"query {query_id}" for query_id in range(5)],
        transpose=make_transpose(protocol) if transpose else None,
    )


def make_transpose(protocol: Protocol) -> Benchmark:
    """Pictures ask, the five queries are the gallery."""
    queries = {
        "query_id": list(range(G)),
        "reference_id": [-1] * G,
        "image": [f"{row}.png" for row in range(G)],
        "text": [None] * G,
    }
    gallery = {"id": [f"query {row}" for row in range(5)], "image": [None] * 5, "text": ["a text"] * 5}
    return Benchmark(
        "i2t",
        protocol,
        Dataset.from_dict(queries, features=QUERY_FEATURES),
        Dataset.from_dict(gallery, features=GALLERY_FEATURES),
        [[row % 5, (row + 1) % 5] for row in range(G)],
        [f"picture {row}" for row in range(G)],
    )


def embeddings(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, gallery = (torch.randn(count, D, generator=generator) for count in (len(QUERY_IDS), G))
    return F.normalize(rows, dim=-1), F.normalize(gallery, dim=-1)


def averaged(rows: Tensor) -> Tensor:
    """By query id: the mean of its wordings, normalised; written as loops."""
    means = []
    for query_id in range(5):
        wordings = [rows[row] for row, found in enumerate(QUERY_IDS) if found == query_id]
        mean = sum(wordings) / len(wordings)
        means.append(mean / mean.norm(dim=-1, keepdim=True))
    return torch.stack(means)


def ranks_by_hand(queries: Tensor, gallery: Tensor, positives: list[list[int]], kept_out: Mapping[int, int]) -> list:
    ranks = []
    for query_id, query in enumerate(queries):
        scores = (gallery.double() @ query.double()).tolist()
        best = max(scores[row] for row in positives[query_id])
        others = [row for row in range(len(gallery)) if row not in positives[query_id] + [kept_out.get(query_id)]]
        ranks.append(1 + sum(scores[row] >= best for row in others))
    return ranks


def evaluate(benchmark: Benchmark, rows: Tensor, gallery: Tensor) -> dict[str, RankedBenchmark]:
    evaluator = Evaluator(benchmark)
    for part in torch.arange(len(rows)).split(3):
        evaluator.add_queries(part, {"": rows[part]})
    for part in torch.arange(G).flip(0).split(4):
        evaluator.add_gallery(part, gallery[part])
    return evaluator.finish()[""]


def test_the_wordings_of_a_query_are_averaged() -> None:
    rows, gallery = embeddings()
    (ranked,) = evaluate(make_benchmark(PROTOCOLS["searle"]), rows, gallery).values()
    torch.testing.assert_close(ranked.queries, averaged(rows))
    ranks = ranks_by_hand(averaged(rows), gallery, POSITIVES, {})
    assert ranked.ranks_under_protocol().tolist() == ranks
    assert ranked.metrics["R@10"] == 100 and ranked.metrics["mean_rank"] == pytest.approx(sum(ranks) / 5)
    first = torch.stack([rows[QUERY_IDS.index(query_id)] for query_id in range(5)])
    assert ranks != ranks_by_hand(first, gallery, POSITIVES, {}), "the case must be worth it"


def test_one_wording_keeps_its_embedding_bit_for_bit() -> None:
    rows = torch.randn(5, D)  # not of unit length, to see that nothing is done to them
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(average_wordings(rows, order)[order], rows)
    pairs = torch.randn(4, 2, D)
    mean = average_wordings(pairs, torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(mean, F.normalize(torch.stack([pairs[0] + pairs[2], pairs[1] + pairs[3]]), dim=-1))


def test_the_wordings_of_a_target_are_averaged_too() -> None:
    """Five pictures among three classes; the classes are worded 3, 1 and 2 times."""
    wording_of, classes = [0, 2, 0, 1, 2, 0], [2, 0, 1, 1, 2]
    queries = {"query_id": list(range(5)), "reference_id": [-1] * 5, "image": ["a.png"] * 5, "text": [None] * 5}
    gallery = {"id": [str(row) for row in wording_of], "image": [None] * 6, "text": ["a text"] * 6}
    benchmark = Benchmark(
        "zero_shot",
        PROTOCOLS["zero_shot_plain"],
        Dataset.from_dict(queries, features=QUERY_FEATURES),
        Dataset.from_dict(gallery, features=GALLERY_FEATURES),
        [[label] for label in classes],
        [str(row) for row in range(5)],
        wording_of=wording_of,
    )
    pictures, wordings = embeddings(seed=3)
    pictures, wordings = pictures[:5], wordings[:6]
    evaluator = Evaluator(benchmark)
    evaluator.add_queries(torch.arange(5), {"": pictures})
    for part in torch.arange(6).flip(0).split(4):
        evaluator.add_gallery(part, wordings[part])
    assert torch.equal(evaluator.queries(), pictures)
    ranked = evaluator.finish()[""]["zero_shot"]
    means = [sum(wordings[row] for row in range(6) if wording_of[row] == label) for label in range(3)]
    expected = torch.stack([mean / mean.norm() for mean in means])
    torch.testing.assert_close(ranked.gallery, expected)
    ranks = ranks_by_hand(pictures, expected, benchmark.positives, {})
    assert ranked.ranks_under_protocol().tolist() == ranks
    assert len(set(ranks)) == 3, "the case must be worth it"
    assert ranked.metrics["R@1"] == pytest.approx(20 * ranks.count(1)) and ranked.metrics["R@5"] == 100
    shares = [[rank == 1 for rank, c in zip(ranks, classes, strict=True) if c == label] for label in range(3)]
    assert ranked.metrics["mean_per_class"] == pytest.approx(100 * sum(sum(s) / len(s) for s in shares) / 3)


def test_rows_come_in_any_order_and_more_than_once() -> None:
    benchmark = make_benchmark(PROTOCOLS["clip4cir"])
    rows, gallery = embeddings()
    expected = evaluate(benchmark, rows, gallery)["dress"]
    evaluator = Evaluator(benchmark)
    for part in ([6, 1, 0], [7, 6, 2], [3, 5, 4, 0]):
        evaluator.add_queries(torch.tensor(part), {"": rows[part]})
    for part in ([8, 8, 0, 3], [1, 2, 7], [4, 5, 6, 0]):
        evaluator.add_gallery(torch.tensor(part), gallery[part])
    found = evaluator.finish()[""]["dress"]
    assert torch.equal(found.queries, expected.queries) and torch.equal(found.gallery, gallery)
    assert torch.equal(found.ranks.pessimistic, expected.ranks.pessimistic)
    assert found.metrics == expected.metrics


def test_a_row_that_is_missing_is_an_error() -> None:
    rows, gallery = embeddings()
    evaluator = Evaluator(make_benchmark(PROTOCOLS["clip4cir"]))
    evaluator.add_queries(torch.arange(7), {"": rows[:7]})
    evaluator.add_gallery(torch.arange(G), gallery)
    with pytest.raises(AssertionError, match="8 rows expected, 7 embedded"):
        evaluator.finish()


def test_the_reference_is_kept_out_where_the_protocol_says_so() -> None:
    kept, dropped = make_benchmark(PROTOCOLS["clip4cir"]), make_benchmark(PROTOCOLS["covr"])
    assert excluded_rows(kept) == [[]] * 5
    assert excluded_rows(dropped) == [[5], [], [8], [], [0]], "no reference and a positive one exclude nothing"
    rows, gallery = embeddings()
    gallery[[5, 8, 0]] = averaged(rows)[[0, 2, 4]]  # the references are what the queries look like
    with_reference = evaluate(kept, rows, gallery)["dress"]
    without = evaluate(dropped, rows, gallery)["dress"]
    kept_out = {0: 5, 2: 8, 4: 0}
    assert with_reference.ranks.pessimistic.tolist() == ranks_by_hand(averaged(rows), gallery, POSITIVES, {})
    assert without.ranks.pessimistic.tolist() == ranks_by_hand(averaged(rows), gallery, POSITIVES, kept_out)
    assert (with_reference.ranks.pessimistic - without.ranks.pessimistic)[[0, 2, 4]].tolist() == [1, 1, 1]
    assert with_reference.nearest([0, 2, 4], 1).flatten().tolist() == [5, 8, 0]
    assert not set(without.nearest([0, 2, 4], 1).flatten().tolist()) & {5, 8, 0}


def test_the_transpose_is_ranked_from_the_same_embeddings() -> None:
    benchmark = make_benchmark(PROTOCOLS["clip_benchmark"], transpose=True)
    rows, gallery = embeddings()
    found = evaluate(benchmark, rows, gallery)
    assert found.keys() == {"t2i", "i2t"}
    queries, transpose = averaged(rows), benchmark.directions[1]
    assert found["t2i"].ranks.pessimistic.tolist() == ranks_by_hand(queries, gallery, POSITIVES, {})
    assert found["i2t"].ranks.pessimistic.tolist() == ranks_by_hand(gallery, queries, transpose.positives, {})
    assert found["i2t"].benchmark is transpose


def test_the_tie_rule_of_the_protocol() -> None:
    rows, _ = embeddings()
    same = F.normalize(torch.ones(G, D), dim=-1)
    for ties, rank in (("pessimistic", 9.0), ("optimistic", 1.0), ("mean", 5.0)):
        ranked = evaluate(make_benchmark(Protocol(ties=ties)), rows, same)["dress"]
        assert ranked.ranks_under_protocol()[0] == rank
        assert ranked.metrics["median_rank"] == rank


class Bilinear(nn.Module):
    """Scores pairs [Q, 2, D] jointly with the gallery."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.weight = nn.Parameter(torch.randn(D, D))

    def score(self, query: Tensor, gallery: Tensor) -> Tensor:
        return query[:, 0] @ gallery.T + query[:, 1] @ self.weight @ gallery.T


def make_evaluator() -> Evaluator:
    scorers = {"": JointScorer(Bilinear()), "image_only": CosineScorer()}
    return Evaluator(make_benchmark(PROTOCOLS["searle"]), scorers)


def label_embeddings() -> dict[str, Tensor]:
    return {"": torch.stack([embeddings(1)[0], embeddings(2)[0]], dim=1), "image_only": embeddings(3)[0]}


def add(evaluator: Evaluator, query_rows: list[int], gallery_rows: list[int]) -> None:
    """A process without rows calls nothing."""
    if query_rows:
        given = {label: rows[query_rows] for label, rows in label_embeddings().items()}
        evaluator.add_queries(torch.tensor(query_rows), given)
    if gallery_rows:
        evaluator.add_gallery(torch.tensor(gallery_rows), embeddings(1)[1][gallery_rows])


def summary(evaluator: Evaluator) -> dict[str, Any]:
    found = {label: outcome["dress"] for label, outcome in evaluator.finish().items()}
    return {
        label: (ranked.metrics, ranked.ranks.pessimistic.tolist(), ranked.ranks.ties.tolist(), ranked.queries)
        for label, ranked in found.items()
    }


SHARES = {  # what each of two processes embeds: rows of the queries, rows of the gallery
    "no queries on the second": (([*range(8)], [0, 2, 4, 6, 8]), ([], [1, 3, 5, 7])),
    "nothing on the first": (([], []), ([*range(8)], [*range(9)])),
    "a sampler that repeats": (([0, 2, 4, 6], [0, 2, 4, 6, 8]), ([1, 3, 5, 7], [1, 3, 5, 7, 0])),
}


def of_one_process(rank: int) -> dict[str, Any]:
    found = {}
    for name, shares in SHARES.items():
        evaluator = make_evaluator()
        add(evaluator, *shares[rank])
        found[name] = summary(evaluator)
    return found


def test_labels_are_ranked_by_their_own_scorers() -> None:
    evaluator = make_evaluator()
    add(evaluator, [*range(8)], [*range(9)])
    found = {label: outcome["dress"] for label, outcome in evaluator.finish().items()}
    rows, gallery = label_embeddings(), embeddings(1)[1]
    assert found["image_only"].ranks.pessimistic.tolist() == ranks_by_hand(
        averaged(rows["image_only"]), gallery, POSITIVES, {}
    )
    pairs = averaged(rows[""])
    single = pairs[:, 0] + pairs[:, 1] @ Bilinear().weight.detach()
    assert found[""].ranks.pessimistic.tolist() == ranks_by_hand(single, gallery, POSITIVES, {})


def test_two_processes_rank_as_one_does() -> None:
    alone = make_evaluator()
    add(alone, [*range(8)], [*range(9)])
    expected = summary(alone)
    for outcome in in_processes(of_one_process, 2):
        for name in SHARES:
            for label, (metrics, ranks, ties, queries) in expected.items():
                found = outcome[name][label]
                assert found[:3] == (metrics, ranks, ties), (name, label)
                assert torch.equal(found[3], queries), (name, label)


# What composed retrieval and any pair of modalities ask beyond R@K

COMPOSED = Protocol(recall_at=(1, 5, 50), map_at=(1, 3, 50), subset_at=(1, 2), exclude_reference=True)
RELEVANT = [[1, 4, 6], [4, 2], [7, 0, 1, 3], [6], [8, 4]]
SUBSETS = [[1, 5, 0, 2], [3, 4, 8], [7, 6], [1, 6, 3, 0, 5], [4, 8, 0]]
GROUPS = {"addition": [0, 2, 4], "negation": [3]}
GAINS = [{1: 1.0, 5: 0.7}, {4: 0.5, 2: 1.0, 0: -1.0}, {7: 1.0}, {3: 0.2, 8: 0.5}, {4: 1.0}]


def make_composed(soft: bool = False, backward: bool = True, **changes: Any) -> Benchmark:
    """Five queries with subsets, groups and more relevant rows than positives; five more things of a transpose."""
    protocol = replace(COMPOSED, **changes)
    benchmark = replace(
        make_benchmark(protocol),
        relevant=RELEVANT,
        subsets=SUBSETS,
        groups=GROUPS,
        gains=GAINS if soft else None,
    )
    other = replace(make_transpose(protocol), protocol=replace(protocol, subset_at=(), exclude_reference=False))
    return replace(benchmark, transpose=other) if backward else benchmark


def whole_embeddings(seed: int) -> tuple[Tensor, Tensor]:
    """Whole numbers, so that scores tie; all wordings of a query are the same, so that their mean is (nearly) it."""
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = integers(5, generator, 3), integers(G, generator, 3)
    return queries, gallery


def measured(benchmark: Benchmark, queries: Tensor, gallery: Tensor) -> dict[str, float]:
    """All of it from sorted lists."""
    out = [set(rows) for rows in excluded_rows(benchmark)]
    positives, count, protocol = benchmark.positives, len(queries), benchmark.protocol
    found: dict[str, float] = {}

    def places(q: int, rows: list[int], within: list[int] | None = None) -> list[int]:
        order = ranking(queries[q], gallery, rows, out[q])
        order = [row for row in order if within is None or row in within or row in rows]
        return [order.index(row) + 1 for row in rows]

    for k in protocol.recall_at:
        hits = [min(places(q, positives[q])) <= k for q in range(count)]
        if benchmark.gains is not None:
            hits = []
            for q, gains in enumerate(benchmark.gains):
                inside = [g for row, g in gains.items() if row not in out[q] and places(q, [row])[0] <= k]
                hits.append(max([0.0, *inside]))
        found[f"R@{k}"] = 100 * sum(hits) / count
    for k in protocol.subset_at:
        ranks = [min(places(q, positives[q], (benchmark.subsets or [])[q])) for q in range(count)]
        found[f"Rsubset@{k}"] = 100 * sum(rank <= k for rank in ranks) / count
    if "Rsubset@1" in found:
        found["Avg"] = (found["R@5"] + found["Rsubset@1"]) / 2

    def precision(q: int, k: int) -> float:
        relevant = (benchmark.relevant or positives)[q]
        relevant = [row for row in relevant if row not in out[q]]
        return precision_at(ranking(queries[q], gallery, relevant, out[q]), relevant, k)

    for k in protocol.map_at:
        found[f"mAP@{k}"] = 100 * sum(precision(q, k) for q in range(count)) / count
    for aspect, chosen in (benchmark.groups or {}).items():
        found[f"mAP@10/{aspect}"] = 100 * sum(precision(q, 10) for q in chosen) / len(chosen)
    return found


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_everything_equals_sorted_lists(soft: bool, seed: int) -> None:
    benchmark = make_composed(soft)
    queries, gallery = whole_embeddings(seed)
    found = rank_benchmark(benchmark, queries, gallery, CosineScorer())
    sides = {"dress": (benchmark, queries, gallery), "i2t": (benchmark.directions[1], gallery, queries)}
    assert found.keys() == sides.keys()
    for name, (direction, *tables) in sides.items():
        expected = measured(direction, *tables)
        metrics = {key: value for key, value in found[name].metrics.items() if not key.endswith("optimistic")}
        assert metrics.keys() == expected.keys() | {"median_rank", "mean_rank"}
        for key, value in expected.items():
            assert metrics[key] == pytest.approx(value), (name, key)
        assert found[name].queries is tables[0] and found[name].gallery is tables[1]


@pytest.mark.parametrize("seed", range(3))
def test_a_query_with_soft_targets_is_solved_where_one_of_grade_1_is_found(seed: int) -> None:
    queries, gallery = whole_embeddings(seed)
    benchmark = make_composed(soft=True, backward=False)
    ranked = rank_benchmark(benchmark, queries, gallery, CosineScorer())["dress"]
    out = [set(rows) for rows in excluded_rows(benchmark)]
    for q, solved_from in enumerate(ranked.solved_from().tolist()):
        full = [row for row, gain in GAINS[q].items() if gain == 1 and row not in out[q]]
        places = [ranking(queries[q], gallery, [row], out[q]).index(row) + 1 for row in full]
        assert solved_from == min(places, default=float("inf")), q
    assert ranked.solved_from()[3] == float("inf")  # no row of grade 1
    hard = rank_benchmark(make_composed(), queries, gallery, CosineScorer())["dress"]
    assert torch.equal(hard.solved_from(), hard.ranks_under_protocol())


def test_a_collapsed_model_scores_chance_or_below() -> None:
    queries, gallery = torch.ones(5, 3), torch.ones(G, 3)
    for soft in (False, True):
        for ranked in rank_benchmark(make_composed(soft), queries, gallery, CosineScorer()).values():
            small = [value for key, value in ranked.metrics.items() if key in ("R@1", "Rsubset@1", "mAP@1")]
            assert small and max(small) == 0
            assert ranked.metrics["mAP@50"] < 60


@pytest.mark.parametrize(("ties", "value"), [("pessimistic", 0.0), ("optimistic", 100.0), ("mean", 0.0)])
def test_the_tie_rule_holds_for_all_of_them(ties: str, value: float) -> None:
    ranked = rank_benchmark(
        make_composed(backward=False, ties=ties), torch.ones(5, 3), torch.ones(G, 3), CosineScorer()
    )["dress"]
    assert [ranked.metrics[key] for key in ("R@1", "Rsubset@1", "mAP@1")] == [value] * 3
    soft = rank_benchmark(make_composed(True, False, ties=ties), torch.ones(5, 3), torch.ones(G, 3), CosineScorer())[
        "dress"
    ]
    assert (soft.metrics["R@1"] == 0) == (value == 0)


def test_positives_are_what_is_relevant_where_nothing_else_is_said() -> None:
    benchmark = replace(make_composed(backward=False), relevant=None, groups=None)
    queries, gallery = whole_embeddings(2)
    found = rank_benchmark(benchmark, queries, gallery, CosineScorer())["dress"].metrics
    assert found["mAP@3"] == pytest.approx(measured(benchmark, queries, gallery)["mAP@3"])


def test_a_second_finish_finds_the_same() -> None:
    rows, gallery = embeddings()
    evaluator = Evaluator(make_benchmark(PROTOCOLS["clip_benchmark"], transpose=True))
    evaluator.add_queries(torch.arange(8), {"": rows})
    for part in torch.arange(G).split(2):
        evaluator.add_gallery(part, gallery[part])
    first, second = (evaluator.finish()[""] for _ in range(2))
    for name in ("t2i", "i2t"):
        assert first[name].metrics == second[name].metrics and torch.equal(first[name].gallery, second[name].gallery)


def in_one_of_three(rank: int) -> dict[str, dict[str, float]]:
    found = {}
    for soft in (False, True):
        evaluator = Evaluator(make_composed(soft))
        queries, gallery = whole_embeddings(3)
        rows = torch.arange(rank, 8, 3)
        evaluator.add_queries(rows, {"": queries[torch.tensor(QUERY_IDS)][rows]})
        if rank != 1:
            mine = torch.arange(rank // 2, G, 2)
            evaluator.add_gallery(mine, gallery[mine])
        ranked = evaluator.finish()[""]
        found |= {f"{soft} {name}": each.metrics for name, each in ranked.items()}
        found |= {f"{soft} {name} ranks": each.ranks.pessimistic.tolist() for name, each in ranked.items()}
    return found


def test_three_processes_measure_what_one_does() -> None:
    queries, gallery = whole_embeddings(3)
    normal = average_wordings(queries[torch.tensor(QUERY_IDS)], torch.tensor(QUERY_IDS))
    expected: dict[str, Any] = {}
    for soft in (False, True):
        for name, each in rank_benchmark(make_composed(soft), normal, gallery, CosineScorer()).items():
            expected |= {f"{soft} {name}": each.metrics, f"{soft} {name} ranks": each.ranks.pessimistic.tolist()}
    for outcome in in_processes(in_one_of_three, 3):
        assert outcome == expected
