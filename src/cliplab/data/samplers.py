"""The order of the training samples: shuffled by seed and epoch, split over processes, equal targets kept apart."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data.distributed import DistributedSampler

from cliplab.errors import UserError


class EpochSampler(DistributedSampler):
    """Yields (row, epoch): what is drawn at random for a row depends on seed, epoch and row alone.

    A resumed run so draws the captions and crops that the uninterrupted one would have drawn.
    """

    def __iter__(self) -> Iterator[Any]:
        return ((row, self.epoch) for row in super().__iter__())


class SeparateSampler(EpochSampler):
    """No two samples of a global batch (batch_size x processes) share a target.

    Each epoch has as many full batches as can be made so; the samples that are left over, chosen anew by seed and
    epoch, wait for another epoch. Raises UserError where not one batch can be made.
    """

    def __init__(self, target_ids: Sequence[int], batch_size: int, replicas: int, rank: int, seed: int) -> None:
        super().__init__(target_ids, replicas, rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.target_ids, self.batch_size = np.asarray(target_ids), batch_size
        self.global_batch = batch_size * replicas
        counts = np.unique(self.target_ids, return_counts=True)[1]
        batches = full_batches(counts, self.global_batch)
        if batches == 0:
            raise UserError(
                f"{len(counts)} images are fewer than one batch ({batch_size} x {replicas} processes) that holds no "
                "image twice: lower data.batch_size or set data.same_image=positives"
            )
        self.num_samples, self.total_size = batches * batch_size, batches * self.global_batch

    def notice(self) -> str:
        """What the rule does to an epoch."""
        left = len(self.target_ids) - self.total_size
        return (
            f"no image twice in a batch of {self.global_batch}: {self.total_size} of {len(self.target_ids)} training "
            f"samples in each epoch; left out, others each time: {left}"
        )

    def __iter__(self) -> Iterator[Any]:
        order = separated(self.target_ids, self.global_batch, np.random.default_rng((self.seed, self.epoch)))
        assert len(order) == self.total_size
        return ((row, self.epoch) for row in order[self.rank :: self.num_replicas])


def full_batches(counts: np.ndarray, size: int) -> int:
    """How many batches of `size` different targets can be made; counts [T]: samples of each target.

    K batches can be made if and only if sum_t min(counts_t, K) >= K * size.
    """
    low, high = 0, int(counts.sum()) // size
    while low < high:  # it holds for all K up to the largest, because the left side is concave in K
        middle = (low + high + 1) // 2
        fits = np.minimum(counts, middle).sum() >= middle * size
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def separated(target_ids: np.ndarray, size: int, generator: np.random.Generator) -> list[int]:
    """Rows of target_ids [N] in an order whose consecutive blocks of `size` hold each target once at most.

    Each block takes the targets with the most samples left, ties at random: no other rule makes more full blocks. So
    every target comes once before any comes twice, where all have equally many samples.
    """
    shuffled = generator.permutation(len(target_ids))
    rows = shuffled[np.argsort(target_ids[shuffled], kind="stable")]  # by target, in random order within one
    _, start, left = np.unique(target_ids[rows], return_index=True, return_counts=True)
    order: list[np.ndarray] = []

    def take(targets: np.ndarray) -> None:
        left[targets] -= 1
        order.append(rows[start[targets] + left[targets]])

    while np.count_nonzero(left) >= size:
        most = generator.permutation(np.flatnonzero(left == left.max()))
        full = len(most) // size * size
        rest = most[full:]
        take(most[:full])
        others = np.setdiff1d(np.flatnonzero(left), rest)
        if len(rest) and len(others) + len(rest) >= size:
            keys = left[others] + generator.random(len(others))
            take(np.concatenate([rest, others[np.argsort(-keys)[: size - len(rest)]]]))
    return np.concatenate(order).tolist() if order else []
