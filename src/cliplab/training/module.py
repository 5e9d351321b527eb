"""The one LightningModule: query versus target, whatever the data set, the towers and the composer."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from cliplab.benchmark import Benchmark
from cliplab.config import OptimConfig
from cliplab.evaluation.evaluator import Evaluator, RankedBenchmark
from cliplab.evaluation.linear_probe import LinearProbe
from cliplab.evaluation.metrics import with_mean
from cliplab.evaluation.scoring import CosineScorer, JointScorer, Scorer
from cliplab.models.composed import ComposedRetriever
from cliplab.models.composers import Pair
from cliplab.training.optim import ParameterGroup, adamw, decayed_by_layer, not_finite, parameter_groups, warmup_then
from cliplab.training.teacher import Teacher

Loss = Callable[..., Tensor]  # of query, target and those of LOSS_INPUTS that it names
Outcome = dict[str, dict[str, RankedBenchmark]]  # way of composing ("" = the model's own) -> benchmark -> outcome


class RetrievalModule(L.LightningModule):
    """Trains with a loss of (query, target, ...); evaluates the benchmarks of its data module.

    What a lone checkpoint file is rebuilt from is put in with `save_hyperparameters` by build.py.
    """

    def __init__(
        self, model: ComposedRetriever, loss: Loss, optim: OptimConfig, seed: int = 0, positives: bool = False
    ) -> None:
        super().__init__()
        self.model, self.loss, self.optim, self.seed = model, loss, optim, seed
        self.positives = positives  # the loss counts equal targets of a batch as positives
        self.loss_inputs = frozenset(inspect.signature(loss).parameters)
        self.evaluators: list[Evaluator] = []
        self.outcome: Outcome = {}
        self.teacher: Teacher | None = None  # set by build.py where the loss learns from one
        self.probe: LinearProbe | None = None  # fitted beside the test by training/classification.py

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Batch in the vocabulary of data/datamodule.py -> scalar loss."""
        pairs = self.model.training_pairs(batch["query"], batch["target"])
        given = zip(pairs, self._given(pairs, batch), strict=True)
        loss = torch.stack([pair.weight * self._loss_of(pair, each) for pair, each in given]).sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss {loss.item()} at step {self.global_step}; {not_finite(self)}")
        size = len(pairs[0].target)
        self.log("train/loss", loss, prog_bar=True, batch_size=size, sync_dist=self.trainer.world_size > 1)
        self.log("train/scale", self.model.scale, batch_size=size)
        return loss

    def _given(self, pairs: list[Pair], batch: dict[str, Any]) -> list[dict[str, Tensor | None]]:
        """Per pair what a loss may take of LOSS_INPUTS beside its vectors."""
        model = self.model
        shared: dict[str, Any] = {"scale": model.scale, "score": model.score, "bias": model.clip.logit_bias}
        forward: dict[str, Any] = {}
        if "negatives" in self.loss_inputs and "negatives" in batch:
            forward["negatives"] = model.encode_negatives(batch["negatives"])
        taught = self.teacher.outputs(batch, len(pairs)) if self.teacher is not None else [{}] * len(pairs)
        found = []
        for pair, outputs in zip(pairs, taught, strict=True):
            given = {**shared, **outputs, "reference": pair.reference} | ({} if pair.is_reversed else forward)
            if self.positives:
                given["target_id"] = batch["reference_id" if pair.is_reversed else "target_id"]
            found.append(given)
        return found

    def _loss_of(self, pair: Pair, given: dict[str, Tensor | None]) -> Tensor:
        """With those of LOSS_INPUTS that it takes."""
        wanted = {name: value for name, value in given.items() if name in self.loss_inputs}
        return self.loss(pair.query, pair.target, **wanted)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Each step draws from a seed of its own, so that a resumed run repeats the uninterrupted one."""
        torch.manual_seed((self.seed + 1) * 1_000_003 + self.global_step * self.trainer.world_size + self.global_rank)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Clamp the scale to [1, 100] after every step (Radford et al., 2021)."""
        with torch.no_grad():
            self.model.clip.logit_scale.clamp_(0, math.log(100))

    def groups(self) -> list[ParameterGroup]:
        """The optimiser's groups; what is in none is frozen."""
        optim, parts = self.optim, self.model.part_parameters()
        groups = parameter_groups(self.model, parts, optim.lr, optim.weight_decay, optim.lr_multipliers)
        layers = self.model.part_layers() if optim.layer_decay != 1 else {}
        return decayed_by_layer(groups, layers, optim.layer_decay)

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule per step."""
        steps = int(self.trainer.estimated_stepping_batches)
        factor = warmup_then(self.optim.schedule, self.optim.warmup, steps)
        optimizer, scheduler = adamw(self.groups(), self.optim.betas, self.optim.eps, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def start_evaluation(self, benchmarks: list[Benchmark], baselines: bool) -> None:
        """One evaluator per benchmark; with `baselines` the composers image_only and text_only are ranked as well."""
        composer, cosine = self.model.composer, CosineScorer()
        joint = JointScorer(composer) if composer is not None and composer.output == "score" else cosine
        composed = any(benchmark.protocol.hit == "single_target" for benchmark in benchmarks)
        others: dict[str, Scorer] = dict.fromkeys(self.model.baselines, cosine) if baselines and composed else {}
        self.evaluators = [Evaluator(b, {"": joint} | others) for b in benchmarks]

    def evaluation_step(self, batch: dict[str, Any], dataloader_idx: int) -> None:
        """A batch of queries (even loaders) or of gallery rows (odd ones)."""
        self.embed(batch, self.evaluators[dataloader_idx // 2])

    def embed(self, batch: dict[str, Any], evaluator: Evaluator) -> None:
        """Give an evaluator the queries or the gallery rows of a batch."""
        if "query" in batch:
            composers = {"": self.model.composer, **self.model.baselines}
            wanted = {label: composers[label] for label in evaluator.scorers}
            evaluator.add_queries(batch["row_id"], self.model.encode_queries(batch["query"], wanted))
        else:
            evaluator.add_gallery(batch["row_id"], self.model.encode_target(batch["target"]))

    def finish_evaluation(self, prefix: str) -> dict[str, float]:
        """Rank; the outcome stays in `outcome` for pictures and results. Returns the model's own metrics."""
        self.outcome = {}
        for evaluator in self.evaluators:
            for label, ranked in evaluator.finish().items():
                self.outcome.setdefault(label, {}).update(ranked)
        self.evaluators = []
        metrics = with_mean({name: ranked.metrics for name, ranked in self.outcome[""].items()})
        return {f"{prefix}/{key}": value for key, value in metrics.items()}

    def on_validation_epoch_start(self) -> None:
        """Benchmarks of the split `val`."""
        self.start_evaluation(self._datamodule().benchmarks("val"), baselines=False)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embed."""
        self.evaluation_step(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Rank and log `val/...`."""
        for key, value in self.finish_evaluation("val").items():
            self.log(key, value, prog_bar="/mean/R@" in key)

    def on_test_epoch_start(self) -> None:
        """Benchmarks of the data set's test split, baselines included."""
        self.start_evaluation(self._datamodule().benchmarks(self._datamodule().dataset.test_split), baselines=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embed."""
        self.evaluation_step(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Rank and log `test/...`."""
        self.log_dict(self.finish_evaluation("test"))

    def _datamodule(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]
