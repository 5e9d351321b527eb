"""Exact ranking: COCO 5K in both directions beside the bare product, a large gallery beside faiss.

python -m benchmarks.ranking [QUERIES GALLERY]: 10,000 queries in 1,000,000 rows unless given.
"""

import json
import sys
from collections.abc import Callable

import faiss
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import PeakMemory, Row, in_new_process, interleave, show
from cliplab.evaluation.ranking import CPU_BLOCKS, Truth, rank_truths

WIDTH = 512
CAPTIONS, PHOTOGRAPHS = 25_010, 5_000


def features(count: int, seed: int) -> Tensor:
    """Unit rows [count, WIDTH], made in parts so that only they take memory."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(count, WIDTH)
    for part in rows.split(10_000):
        torch.randn(part.shape, generator=generator, out=part)
        F.normalize(part, dim=1, out=part)
    return rows


def near(gallery: Tensor, owner: Tensor, noise: float) -> Tensor:
    """Queries whose target scores 1 / sqrt(1 + noise^2), as a trained model's; noise inf: an untrained one's."""
    rows = features(len(owner), seed=2)
    return rows if noise == float("inf") else F.normalize(gallery[owner] + noise * rows, dim=1)


def blocked(queries: Tensor, gallery: Tensor) -> None:
    """The products of our blocks, and nothing else."""
    scores = torch.empty(CPU_BLOCKS)
    for part in gallery.split(CPU_BLOCKS[1]):
        for rows in queries.split(CPU_BLOCKS[0]):
            torch.mm(rows, part.T, out=scores.view(-1)[: len(rows) * len(part)].view(len(rows), len(part)))


def both_directions(noise: float, label: str) -> list[Row]:
    """COCO's test: 25,010 captions, 5,000 photographs."""
    gallery, owner = features(PHOTOGRAPHS, seed=1), torch.arange(CAPTIONS) % PHOTOGRAPHS
    queries = near(gallery, owner, noise)
    back: list[list[int]] = [[] for _ in range(PHOTOGRAPHS)]
    for caption, photograph in enumerate(owner.tolist()):
        back[photograph].append(caption)
    truths = [Truth([[photograph] for photograph in owner.tolist()]), Truth(back, backward=True)]
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: rank_truths(queries, gallery, truths),
        "one bare product": lambda: queries @ gallery.T,
        "the bare products of our blocks": lambda: blocked(queries, gallery),
    }
    timings = interleave(sides, rounds=9)
    question = f"COCO 5K, both directions, exact ranks, {label}"
    work, floors = CAPTIONS * PHOTOGRAPHS / 1e6, (1 / 1.5, None)
    return [
        timings.row(question, "ours", other, work, "M scores/s", floor)
        for other, floor in zip(list(sides)[1:], floors, strict=True)
    ]


def large(queries: Tensor, gallery: Tensor) -> list[Row]:
    """A gallery that is large beside the queries: exact ranks, faiss' top 1, the bare products."""
    truth = Truth([[query] for query in range(len(queries))])
    index = faiss.IndexFlatIP(WIDTH)
    index.add(gallery.numpy())
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: rank_truths(queries, gallery, [truth]),
        "faiss IndexFlatIP, top 1": lambda: index.search(queries.numpy(), 1),
        "the bare products of our blocks": lambda: blocked(queries, gallery),
    }
    timings = interleave(sides, rounds=3, warmup=0)
    question = f"rank {len(queries):,} queries in {len(gallery):,}"
    work = len(queries) * len(gallery) / 1e6
    return [timings.row(question, "ours", other, work, "M scores/s", 0.85) for other in list(sides)[1:]]


def memory(queries: int, gallery: int, both: bool) -> float:
    """MB above the features."""
    found, owner = features(gallery, seed=1), torch.arange(queries) % gallery
    asked = near(found, owner, 2.0)
    truths = [Truth([[row] for row in owner.tolist()])]
    if both:
        back: list[list[int]] = [[] for _ in range(gallery)]
        for query, row in enumerate(owner.tolist()):
            back[row].append(query)
        truths.append(Truth(back, backward=True))
    with PeakMemory() as peak:
        rank_truths(asked, found, truths)
    return peak.above


def memory_row(queries: int, gallery: int, both: bool) -> Row:
    """In a process of its own."""
    above = in_new_process("benchmarks.ranking", "memory", str(queries), str(gallery), str(int(both)))
    question = f"memory above the features, {queries:,} x {gallery:,}{', both directions' if both else ''}"
    return Row(question, above, 1000, "MB", 1000 / above, "1 GB", 1.0)


def main(arguments: list[str]) -> None:
    """Measure and print."""
    if arguments[:1] == ["memory"]:
        queries, gallery, both = map(int, arguments[1:])
        print(json.dumps(memory(queries, gallery, bool(both))))
        return
    queries, gallery = map(int, arguments or (10_000, 1_000_000))
    rows = both_directions(float("inf"), "untrained") + both_directions(2.0, "trained")
    rows += [memory_row(CAPTIONS, PHOTOGRAPHS, True), memory_row(queries, gallery, False)]
    found = features(gallery, seed=1)
    show(rows + large(near(found, torch.arange(queries), 2.0), found), "ranking")


if __name__ == "__main__":
    main(sys.argv[1:])
