"""From a data set to batches in one vocabulary, the same for every data set and split.

Batch: {query: {image?, text?}, target: {image? | text?}, negatives?: {image [B, N, 3, H, W]}, row_id, query_id,
target_id, reference_id}; images [B, 3, H, W] uint8, text [B, L] and ids [B] int64. Evaluation loaders give queries (no
target) and gallery rows (no query). A composer that learns from images or texts alone gets batches of these only: query
or target is empty then.

What a feature cache holds of a batch stands as `image_row` or `text_row` [B] int64 in place of `image` or `text`, from
the loader to the device; there it becomes `image_features` or `text_features` [B, D], what the frozen tower gave.
"""

import copy
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils import data
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from cliplab.benchmark import Benchmark, Protocol
from cliplab.data.circo import CIRCO
from cliplab.data.cirr import CIRR
from cliplab.data.coco import COCO
from cliplab.data.dataset import RetrievalDataset
from cliplab.data.fashioniq import FashionIQ
from cliplab.data.flickr30k import Flickr8k, Flickr30k
from cliplab.data.images import ImageTransform, Preprocess
from cliplab.data.karpathy import Karpathy
from cliplab.data.rows import (
    LESSONS,
    EvalRows,
    FeatureSource,
    Tokenize,
    TrainRows,
    cached_rows,
    evaluation_columns,
    training_columns,
)
from cliplab.data.samplers import EpochSampler, SeparateSampler
from cliplab.errors import UserError
from cliplab.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class RetrievalDataModule(L.LightningDataModule):
    """Loaders over any data set: training samples, and per benchmark its queries and its gallery."""

    def __init__(
        self,
        dataset: RetrievalDataset,
        protocol: Protocol | None = None,
        preprocess: Preprocess | None = None,
        tokenize: Tokenize | None = None,
        *,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        pad: str = "none",
        crop_scale: float = 1.0,
        flip: bool = False,
        separate: bool | None = None,
        image_backend: str = "exact",
        learns_from: str = "triplets",
        hard_negatives: int = 0,
    ) -> None:
        super().__init__()
        self.hard_negatives = hard_negatives
        # Whether the targets of a global training batch all differ; None = as the data set has it.
        self.separate = dataset.same_image == "separate" if separate is None else separate
        self.dataset = dataset
        self.protocol = protocol or dataset.make_protocol({})
        self.tokenize = tokenize or Tokenizer()
        self.transform = ImageTransform(preprocess or Preprocess(), pad, crop_scale, flip, image_backend)
        self.batch_size, self.eval_batch_size, self.num_workers, self.seed = (
            batch_size,
            eval_batch_size,
            num_workers,
            seed,
        )
        self.columns = LESSONS[learns_from]  # what a training batch is made of
        self.features: FeatureSource | None = None
        self._benchmarks: dict[str, list[Benchmark]] = {}

    def prepare_data(self) -> None:
        """Render what is rendered; runs on one process."""
        self.dataset.prepare()

    def benchmarks(self, split: str) -> list[Benchmark]:
        """The benchmarks of a split under the protocol, built once."""
        if split not in self._benchmarks:
            self._benchmarks[split] = self.dataset.benchmarks(self.protocol, split)
        return self._benchmarks[split]

    def train_dataloader(self) -> DataLoader:
        """Shuffled by (seed, epoch); an incomplete last batch is dropped, as every process needs equal batches.

        With `separate` no target is twice in a global batch; what finds no place is left out of the epoch and logged.
        """
        table = self.dataset.train_table(self.protocol)
        asked = training_columns(table, self.columns)
        cached = cached_rows(self.features, asked, self._loads(), self.trainer, training=True)
        rows = TrainRows(table, self.transform, self.tokenize, self.seed, cached, self.columns)
        rows.hard_negatives = self.hard_negatives
        replicas, rank = self._processes()
        if not len(rows):
            raise UserError(
                f"no training sample is left: {len(self.dataset.missing)} pictures are missing in "
                f"{self.dataset.image_root}, and data.protocol.missing_images=report leaves their samples out"
            )
        if len(rows) < self.batch_size * replicas:
            raise UserError(
                f"{len(rows)} training samples are fewer than one batch ({self.batch_size} x {replicas} processes): "
                "lower data.batch_size"
            )
        sampler = EpochSampler(rows, replicas, rank, shuffle=True, seed=self.seed, drop_last=True)
        target_ids = rows.table["target_id"][:] if self.separate else []
        if len(set(target_ids)) < len(target_ids):
            sampler = SeparateSampler(target_ids, self.batch_size, replicas, rank, self.seed)
            log.info("%s", sampler.notice())
        return self._loader(rows, self.batch_size, sampler, drop_last=True)

    def val_dataloader(self) -> list[DataLoader]:
        """Two loaders per benchmark of the split `val`: queries, gallery."""
        return self.eval_dataloaders("val")

    def test_dataloader(self) -> list[DataLoader]:
        """The same for the data set's test split (`val` where test targets are not public)."""
        return self.eval_dataloaders(self.dataset.test_split)

    def eval_dataloaders(self, split: str) -> list[DataLoader]:
        """[queries, gallery] of each benchmark, in order."""
        replicas, rank = self._processes()
        pairs = [(("query", each.queries), ("target", each.gallery)) for each in self.benchmarks(split)]
        tables = list(itertools.chain.from_iterable(pairs))
        cached = cached_rows(self.features, evaluation_columns(tables), self._loads(), self.trainer)
        loaders = []
        for number, (role, table) in enumerate(tables):
            own = {modality: rows for (of, modality), rows in cached.items() if of == number}
            rows = EvalRows(table, role, self.transform, self.tokenize, own)
            sampler = DistributedSampler(rows, replicas, rank, shuffle=False)  # repeats rows to even the processes
            loaders.append(self._loader(rows, self.eval_batch_size, sampler))
        return loaders

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Cached features in place of their rows."""
        return batch if self.features is None else self.features.look_up(batch)

    def beside(self, dataset: RetrievalDataset, protocol: Protocol) -> "RetrievalDataModule":
        """The same loaders over another data set."""
        other = copy.copy(self)
        other.dataset, other.protocol, other._benchmarks = dataset, protocol, {}
        return other

    def _loads(self) -> dict[str, Callable[[str], Tensor]]:
        return {"image": self.transform, "text": lambda text: self.tokenize(text)[0]}

    def _processes(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader(
        self, rows: data.Dataset, batch_size: int, sampler: DistributedSampler, drop_last: bool = False
    ) -> DataLoader:
        return DataLoader(
            rows,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            drop_last=drop_last,
            collate_fn=_as_it_is,
            persistent_workers=drop_last and self.num_workers > 0,  # only the training loader outlives its epoch
            pin_memory=torch.cuda.is_available(),
        )


def _as_it_is(batch: Any) -> Any:
    """The rows make whole batches."""
    return batch


class FashionIQDataModule(RetrievalDataModule):
    """FashionIQ behind the shared loaders; `loaders` are RetrievalDataModule's keyword arguments."""

    def __init__(
        self,
        root: str | Path,
        images: str | Path | None = None,
        categories: tuple[str, ...] | None = None,
        protocol: str | dict[str, Any] = "clip4cir",
        **loaders: Any,
    ) -> None:
        part = {"name": protocol} if isinstance(protocol, str) else protocol
        super().__init__(FashionIQ(root, images, categories), FashionIQ.make_protocol(part), **loaders)


class CIRRDataModule(RetrievalDataModule):
    """CIRR behind the shared loaders; `loaders` are RetrievalDataModule's keyword arguments."""

    def __init__(
        self,
        root: str | Path,
        images: str | Path | None = None,
        protocol: str | dict[str, Any] = "clip4cir",
        **loaders: Any,
    ) -> None:
        part = {"name": protocol} if isinstance(protocol, str) else protocol
        super().__init__(CIRR(root, images), CIRR.make_protocol(part), **loaders)


class CIRCODataModule(RetrievalDataModule):
    """CIRCO behind the shared loaders; it has no training split."""

    def __init__(
        self,
        root: str | Path,
        images: str | Path | None = None,
        protocol: str | dict[str, Any] = "searle",
        **loaders: Any,
    ) -> None:
        part = {"name": protocol} if isinstance(protocol, str) else protocol
        super().__init__(CIRCO(root, images), CIRCO.make_protocol(part), **loaders)


class KarpathyDataModule(RetrievalDataModule):
    """Captions in any of the released forms behind the shared loaders; base of COCO, Flickr30k and Flickr8k.

    `annotations` names their file, a pattern of files below root, or hub:ORG/NAME; None = the one set that is there.
    """

    dataset_class: type[Karpathy] = Karpathy

    def __init__(
        self,
        root: str | Path,
        images: str | Path | None = None,
        annotations: str | None = None,
        protocol: str | dict[str, Any] | Protocol = "clip_benchmark",
        **loaders: Any,
    ) -> None:
        if not isinstance(protocol, Protocol):
            protocol = self.dataset_class.make_protocol({"name": protocol} if isinstance(protocol, str) else protocol)
        super().__init__(self.dataset_class(root, images, annotations=annotations), protocol, **loaders)


class COCODataModule(KarpathyDataModule):
    """COCO: Karpathy's splits or the official ones; all captions of an image, or exactly five.

    The latter: `protocol={"captions_per_image": 5}`. A prompt: `protocol={"prompt": "a photo of {}"}`.
    """

    dataset_class = COCO


class Flickr30kDataModule(KarpathyDataModule):
    """Flickr30k, or Flickr8k where its file dataset_flickr8k.json is the only one that root holds."""

    dataset_class = Flickr30k

    def __init__(self, root: str | Path, *arguments: Any, **options: Any) -> None:
        if Flickr8k(root).annotation_files() and not Flickr30k(root).annotation_files():
            self.dataset_class = Flickr8k
        super().__init__(root, *arguments, **options)
