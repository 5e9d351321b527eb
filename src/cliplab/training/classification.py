"""Image classification beside what a Trainer does: zero-shot while a model trains, a linear probe after its test."""

from collections.abc import Iterable

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from cliplab.benchmark import Benchmark, Protocol
from cliplab.data.datamodule import RetrievalDataModule
from cliplab.data.dataset import RetrievalDataset
from cliplab.evaluation.evaluator import Evaluator
from cliplab.evaluation.linear_probe import linear_probe
from cliplab.evaluation.metrics import recalls
from cliplab.training.module import RetrievalModule


class ZeroShot(L.Callback):
    """Classifies an image folder in the validation of every n-th epoch; logs `zero_shot/top1` and `top5` in percent.

    All processes take their share of the pictures, and none draws from the random numbers of the run.
    """

    def __init__(self, dataset: RetrievalDataset, protocol: Protocol, split: str, every_n_epochs: int) -> None:
        self.dataset, self.protocol, self.split, self.every_n_epochs = dataset, protocol, split, every_n_epochs
        self._data: RetrievalDataModule | None = None  # keeps its tables over the epochs

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """When the batches of the validation are through, so that the numbers stand beside its own."""
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        if self._data is None:
            self._data = _datamodule(trainer).beside(self.dataset, self.protocol)
        (benchmark,) = self._data.benchmarks(self.split)
        with isolate_rng():
            evaluator = embed(trainer, pl_module, benchmark, self._data.eval_dataloaders(self.split))
        rank = evaluator.finish()[""][benchmark.name].ranks_under_protocol()
        for k, share in recalls(rank, (1, 5)).items():
            pl_module.log(f"zero_shot/{k.replace('R@', 'top')}", share.item(), prog_bar=k == "R@1")


class Probe(L.Callback):
    """Fits a linear probe on the features that the tested model gives the pictures of the splits train and val."""

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The features of the test split are those of the test itself."""
        assert isinstance(pl_module, RetrievalModule)
        data = _datamodule(trainer)
        (tested,) = pl_module.outcome[""].values()
        parts = [self._features(trainer, pl_module, data, split) for split in ("train", "val")]
        if trainer.is_global_zero:
            pl_module.probe = linear_probe(parts[0], parts[1], (tested.queries, labels(tested.benchmark)))

    def _features(
        self, trainer: L.Trainer, module: L.LightningModule, data: RetrievalDataModule, split: str
    ) -> tuple[Tensor, Tensor]:
        """Unit features [N, D] of a split and their labels [N]."""
        (benchmark,) = data.benchmarks(split)
        pictures, _ = data.eval_dataloaders(split)
        return embed(trainer, module, benchmark, [pictures]).queries(), labels(benchmark)


def labels(benchmark: Benchmark) -> Tensor:
    """The class of each picture of a benchmark of classes: int64 [Q]."""
    return torch.tensor([label for (label,) in benchmark.positives])


def embed(
    trainer: L.Trainer, module: L.LightningModule, benchmark: Benchmark, loaders: Iterable[DataLoader]
) -> Evaluator:
    """Within a validation or a test of the module: what it makes of other loaders' batches, in their own evaluator."""
    assert isinstance(module, RetrievalModule) and not module.training
    evaluator = Evaluator(benchmark)
    for loader in loaders:
        for batch in loader:
            with trainer.precision_plugin.val_step_context():
                module.embed(trainer.strategy.batch_to_device(batch, module.device), evaluator)
    return evaluator


def _datamodule(trainer: L.Trainer) -> RetrievalDataModule:
    return trainer.datamodule  # type: ignore[attr-defined]
