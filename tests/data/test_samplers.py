import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data.distributed import DistributedSampler

from cliplab.data.samplers import EpochSampler, SeparateSampler, full_batches, separated
from cliplab.errors import UserError

FIVE_EACH = [target for target in range(11) for _ in range(5)]
UNEVEN = [0] * 9 + [1] * 7 + [2] * 2 + list(range(3, 20))


def epoch_of(targets: list[int], batch_size: int, epoch: int, world: int = 1, seed: int = 0) -> list[list[int]]:
    """By step: the rows of the global batch, put together from all processes as their loaders cut them."""
    ranks = []
    for rank in range(world):
        sampler = SeparateSampler(targets, batch_size, world, rank, seed)
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert [given for _, given in drawn] == [epoch] * len(sampler)
        ranks.append([row for row, _ in drawn])
    steps = range(0, len(ranks[0]), batch_size)
    assert len({len(rows) for rows in ranks}) == 1 and len(ranks[0]) % batch_size == 0
    return [[row for rows in ranks for row in rows[step : step + batch_size]] for step in steps]


# Order


def test_an_epoch_is_torchs_permutation_with_the_epoch_beside_each_row() -> None:
    for rank in (0, 1):
        ours = EpochSampler(range(10), 2, rank, shuffle=True, seed=3, drop_last=True)  # type: ignore[arg-type]
        torchs = DistributedSampler(range(10), 2, rank, shuffle=True, seed=3, drop_last=True)  # type: ignore[arg-type]
        for sampler in (ours, torchs):
            sampler.set_epoch(4)
        assert list(ours) == [(row, 4) for row in torchs]


@pytest.mark.parametrize("targets", [FIVE_EACH, UNEVEN], ids=["five each", "uneven"])
@pytest.mark.parametrize(("batch_size", "world"), [(2, 1), (7, 1), (11, 1), (2, 2), (3, 3), (1, 5)])
def test_no_target_is_twice_in_a_global_batch(targets: list[int], batch_size: int, world: int) -> None:
    for epoch in range(4):
        batches = epoch_of(targets, batch_size, epoch, world)
        assert batches
        for batch in batches:
            assert len(batch) == batch_size * world == len({targets[row] for row in batch})
        rows = list(itertools.chain.from_iterable(batches))
        assert len(rows) == len(set(rows))


def test_nothing_is_left_out_that_has_a_place() -> None:
    assert sorted(itertools.chain.from_iterable(epoch_of(FIVE_EACH, 11, 0))) == list(range(55))
    assert len(epoch_of(FIVE_EACH, 6, 0)) == 9  # 54 of 55


def test_what_is_left_out_changes_with_the_epoch_and_every_row_gets_its_turn() -> None:
    seen: Counter[int] = Counter()
    for epoch in range(60):
        seen.update(itertools.chain.from_iterable(epoch_of(UNEVEN, 7, epoch)))
    assert set(seen) == set(range(len(UNEVEN)))
    nine = [seen[row] for row in range(9)]  # of the target that occurs nine times, at most once a batch
    assert max(nine) < 2 * min(nine)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {(seed, epoch): epoch_of(FIVE_EACH, 4, epoch, seed=seed) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert epoch_of(FIVE_EACH, 4, 2, seed=1) == orders[1, 2]  # a resumed run starts in the middle
    assert all(one != other for one, other in itertools.combinations(orders.values(), 2))


def test_batches_of_an_epoch_mix_other_images_each_time() -> None:
    """The second caption of an image meets other images than its first."""
    batches = epoch_of([target for target in range(40) for _ in range(2)], 4, 0)
    pairs = Counter(pair for batch in batches for pair in itertools.combinations(sorted(row // 2 for row in batch), 2))
    assert sum(count == 1 for count in pairs.values()) > 0.7 * len(pairs)


# How many batches


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_as_many_full_batches_as_a_search_finds(size: int) -> None:
    def search(counts: tuple[int, ...]) -> int:
        best = 0
        for chosen in itertools.combinations([t for t, count in enumerate(counts) if count], size):
            left = tuple(sorted((count - (t in chosen) for t, count in enumerate(counts)), reverse=True))
            known.setdefault(left, None)
            if known[left] is None:
                known[left] = search(left)
            best = max(best, 1 + (known[left] or 0))
        return best

    known: dict[tuple[int, ...], int | None] = {}
    for counts in itertools.combinations_with_replacement((4, 3, 2, 1), 5):
        expected = search(counts)
        assert full_batches(np.array(counts), size) == expected, counts
        targets = np.repeat(np.arange(5), counts)
        assert len(separated(targets, size, np.random.default_rng(0))) == expected * size, counts


def test_the_notice_counts_what_is_left_out() -> None:
    sampler = SeparateSampler(FIVE_EACH, 3, 2, 0, 0)
    assert len(sampler) == 27
    assert sampler.notice() == (
        "no image twice in a batch of 6: 54 of 55 training samples in each epoch; left out, others each time: 1"
    )


def test_fewer_images_than_a_batch_names_the_options() -> None:
    with pytest.raises(
        UserError, match=r"^11 images are fewer than one batch \(6 x 2 processes\) .*same_image=positives"
    ):
        SeparateSampler(FIVE_EACH, 6, 2, 0, 0)


def test_the_sampler_serves_a_loader() -> None:
    sampler = SeparateSampler(FIVE_EACH, 5, 1, 0, 0)
    rows = [f"row {row}" for row in range(55)]

    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, key: tuple[int, int]) -> str:
            return rows[key[0]]

        def __len__(self) -> int:
            return len(rows)

    loader = torch.utils.data.DataLoader(Rows(), batch_size=5, sampler=sampler, drop_last=True)
    assert len(loader) == len(list(loader)) == 11
