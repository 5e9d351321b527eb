import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from cliplab.benchmark import PROTOCOLS, Benchmark
from cliplab.config import OptimConfig
from cliplab.data.dataset import GALLERY_FEATURES, QUERY_FEATURES
from cliplab.losses.info_nce import info_nce
from cliplab.models.clip import CLIP
from cliplab.models.composed import ComposedRetriever
from cliplab.models.composers import COMPOSERS, Pair
from cliplab.registry import build_part
from cliplab.training.module import RetrievalModule

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": 5, "vocab_size": 12, "width": 32, "heads": 2, "layers": 1}
D, COLOURS, END = 16, 6, 11
ROWS = [(reference, text) for reference in range(COLOURS) for text in range(COLOURS) if reference != text]


def picture(colour: int) -> Tensor:
    """uint8 [3, 16, 16] of one colour."""
    channels = [255 * (colour >> bit & 1) for bit in range(3)]
    return torch.tensor(channels, dtype=torch.uint8)[:, None, None].expand(3, 16, 16)


def words(colour: int) -> Tensor:
    return torch.tensor([10, 1 + colour, END, 0, 0])


def composed(rows: list[tuple[int, int]]) -> dict[str, Tensor]:
    """References of one colour whose text names the colour of the target."""
    images, text = torch.stack([picture(r) for r, _ in rows]), torch.stack([words(t) for _, t in rows])
    return {"image": images, "text": text}


def loader(batches: Sequence[dict[str, Any]]) -> DataLoader:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class Toy(L.LightningDataModule):
    """The text alone says the target's colour. Two queries a target, six pictures to find it among."""

    dataset = SimpleNamespace(test_split="test")

    def __init__(self, batches: int = 8, single: bool = False) -> None:
        super().__init__()
        self.batches, self.single = batches, single
        self.asked: list[str] = []

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(self.batches):
            targets = torch.randperm(COLOURS, generator=generator).tolist()
            shift = 1 + int(torch.randint(COLOURS - 1, (), generator=generator))
            rows = [((target + shift) % COLOURS, target) for target in targets]
            images = torch.stack([picture(target) for target in targets])
            batches.append({"query": self.query(rows), "target": {"image": images}})
        return loader(batches)

    def query(self, rows: list[tuple[int, int]]) -> dict[str, Tensor]:
        query = composed(rows)
        return {"text": query["text"]} if self.single else query

    def val_dataloader(self) -> list[DataLoader]:
        gallery = {"image": torch.stack([picture(colour) for colour in range(COLOURS)])}
        halves = torch.arange(len(ROWS)).split(16)
        queries = [{"query": self.query([ROWS[row] for row in half]), "row_id": half} for half in halves]
        return [loader(queries), loader([{"target": gallery, "row_id": torch.arange(COLOURS)}])]

    test_dataloader = val_dataloader

    def benchmarks(self, split: str) -> list[Benchmark]:
        self.asked.append(split)
        count = len(ROWS)
        queries = {
            "query_id": list(range(count)),
            "reference_id": [-1 if self.single else reference for reference, _ in ROWS],
            "image": [None] * count,
            "text": [f"colour {text}" for _, text in ROWS],
        }
        gallery = {"id": [str(c) for c in range(COLOURS)], "image": [f"{c}.png" for c in range(COLOURS)]}
        return [
            Benchmark(
                "toy",
                PROTOCOLS["val"],  # the reference is kept out; R@1, 10, 50
                Dataset.from_dict(queries, features=QUERY_FEATURES),
                Dataset.from_dict(gallery | {"text": [None] * COLOURS}, features=GALLERY_FEATURES),
                [[text] for _, text in ROWS],
                [f"{reference} to {text}" for reference, text in ROWS],
            )
        ]


def make_module(composer: str | None = "sum", fixed_scale: float | None = None, **optim: Any) -> RetrievalModule:
    torch.manual_seed(0)
    part = build_part("composer", COMPOSERS, {"name": composer}, embed_dim=D) if composer else None
    model = ComposedRetriever(CLIP(D, VISION, TEXT), part, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), fixed_scale)
    model.freeze([])
    return RetrievalModule(model, partial(info_nce, symmetric=True), OptimConfig(**{"lr": 3e-3, **optim}))


def make_trainer(epochs: int = 1, logger: Any = False, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **options,
    )


class Curves(L.Callback):
    """The loss of every step, and the scale that the next one starts with."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.scales: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        assert isinstance(pl_module, RetrievalModule)
        self.scales.append(pl_module.model.scale.item())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *rest: Any) -> None:
        self.losses.append(outputs["loss"].item())


@pytest.mark.parametrize("composer", ["sum", "artemis"])
def test_the_loss_falls_and_the_targets_are_found(composer: str) -> None:
    module, data, seen = make_module(composer), Toy(), Curves()
    trainer = make_trainer(10, callbacks=[seen], check_val_every_n_epoch=10)
    trainer.fit(module, data)
    assert sum(seen.losses[-8:]) < 0.2 * sum(seen.losses[:8])
    assert trainer.callback_metrics["val/toy/R@1"] >= 90, "about 20 before training"
    assert data.asked == ["val"]


def test_one_training_step_by_hand() -> None:
    module, data = make_module(), Toy(batches=1)
    start = {name: value.detach().clone() for name, value in module.model.named_parameters()}
    by_hand = make_module().model
    batch = next(iter(data.train_dataloader()))
    query, target = by_hand.encode_query(batch["query"]), by_hand.encode_target(batch["target"])
    logits = by_hand.clip.logit_scale.exp() * query @ target.T
    loss = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    loss.backward()
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(module, data)
    assert trainer.callback_metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert trainer.callback_metrics["train/scale"] == pytest.approx(1 / 0.07, rel=1e-4)
    for name, parameter in by_hand.named_parameters():
        step = module.model.get_parameter(name).detach() - start[name]
        large = parameter.grad.abs() > 1e-3
        assert (step[large] * parameter.grad[large] < 0).all(), name  # Adam's first step goes down every gradient


@pytest.mark.parametrize("positives", [True, False])
def test_the_loss_hears_of_the_targets_only_where_equal_ones_count(positives: bool) -> None:
    seen: list[Tensor | None] = []

    def loss(
        query: Tensor, target: Tensor, scale: Tensor, score: Any, *, target_id: Tensor | None = None, steep: bool = True
    ) -> Tensor:
        seen.append(target_id)
        return info_nce(query, target, scale, score, target_id=target_id)

    data, module = Toy(batches=1), make_module()
    (batch,) = data.train_dataloader()
    batch["target_id"] = torch.tensor([3, 3, 1, 0, 2, 1])
    module = RetrievalModule(module.model, loss, module.optim, positives=positives)
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(module, loader([batch]))
    (heard,) = seen
    assert (heard is not None) == positives
    assert heard is None or heard.tolist() == [3, 3, 1, 0, 2, 1]


def test_a_reversed_pair_has_the_ids_of_its_own_targets_and_no_hard_negatives() -> None:
    def loss(query: Tensor, target: Tensor, scale: Tensor, *, target_id: Tensor, negatives: Tensor) -> Tensor:
        return query.sum()

    made = make_module()
    module = RetrievalModule(made.model, loss, made.optim, positives=True)
    vectors = torch.eye(2, D)
    batch = {"target_id": torch.tensor([1, 1]), "reference_id": torch.tensor([4, 5])}
    batch["negatives"] = {"image_features": torch.randn(2, 3, D)}  # type: ignore[assignment]
    module.model.encode_negatives = lambda given: given["image_features"]  # type: ignore[method-assign]
    forward, backward = module._given([Pair(vectors, vectors), Pair(vectors, vectors, 0.4, is_reversed=True)], batch)
    assert forward["target_id"] is batch["target_id"] and backward["target_id"] is batch["reference_id"]
    assert forward["negatives"] is not None and "negatives" not in backward


@pytest.mark.parametrize(("start", "expected"), [(math.log(99.99), 100.0), (0.001, 1.0)])
def test_the_scale_stays_between_1_and_100(start: float, expected: float) -> None:
    def pull(query: Tensor, target: Tensor, scale: Tensor, score: Any) -> Tensor:
        return scale * (1 if expected == 1 else -1) + 0 * (query.sum() + target.sum())

    module, seen = make_module(lr=0.5, warmup=0.0, schedule="constant"), Curves()
    module.loss = pull
    with torch.no_grad():
        module.model.clip.logit_scale.fill_(start)
    make_trainer(callbacks=[seen], limit_val_batches=0).fit(module, Toy(batches=3))
    assert module.model.scale.item() == pytest.approx(expected, rel=1e-5)
    assert min(seen.scales) >= 1 and max(seen.scales) <= 100.001
    assert seen.scales[1:] == pytest.approx([expected] * 2, rel=1e-5)


def test_a_fixed_scale_does_not_move() -> None:
    module = make_module(fixed_scale=50.0)
    make_trainer(limit_val_batches=0).fit(module, Toy(batches=2))
    assert module.model.scale.item() == 50.0
    assert module.model.clip.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_a_loss_that_is_not_finite_stops_and_names_the_parameters() -> None:
    module = make_module()
    with torch.no_grad():
        module.model.clip.visual.proj[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"loss nan at step 0.*model\.clip\.visual\.proj.*lower optim\.lr"):
        make_trainer(limit_val_batches=0).fit(module, Toy(batches=1))


def test_every_step_draws_from_a_seed_of_its_own() -> None:
    def draws(epochs: int, seed: int) -> list[float]:
        drawn: list[float] = []

        def loss(query: Tensor, target: Tensor, scale: Tensor, score: Any) -> Tensor:
            drawn.append(torch.rand(()).item())
            return info_nce(query, target, scale)

        module = make_module()
        module.loss, module.seed = loss, seed
        torch.manual_seed(epochs)  # what was drawn before must not matter
        make_trainer(epochs, limit_val_batches=0).fit(module, Toy(batches=2))
        return drawn

    first = draws(3, seed=0)
    assert len(set(first)) == 6
    assert draws(2, seed=0) == first[:4]
    assert not set(draws(2, seed=1)) & set(first)


def ranks_by_hand(queries: Tensor, gallery: Tensor) -> list[float]:
    """References kept out, ties against the target."""
    scores = queries.double() @ gallery.double().T
    return [
        1.0 + sum(scores[q, j].item() >= scores[q, text].item() for j in range(COLOURS) if j not in (text, reference))
        for q, (reference, text) in enumerate(ROWS)
    ]


def test_testing_ranks_the_model_and_its_baselines() -> None:
    module, data = make_module("sum"), Toy()
    metrics = make_trainer().test(module, data, verbose=False)[0]
    assert data.asked == ["test"]
    assert module.outcome.keys() == {"", "image_only", "text_only"}
    model = module.model.eval()
    with torch.no_grad():
        gallery = model.encode_target({"image": torch.stack([picture(colour) for colour in range(COLOURS)])})
        query = composed(ROWS)
        image, text = model.encode_target({"image": query["image"]}), model.encode_target({"text": query["text"]})
        by_label = {"": model.encode_query(query), "image_only": image, "text_only": text}
    for label, queries in by_label.items():
        ranked = module.outcome[label]["toy"]
        ranks = ranks_by_hand(queries, gallery)
        assert ranked.ranks_under_protocol().tolist() == ranks, label
        assert ranked.metrics["R@1"] == pytest.approx(100 * sum(rank <= 1 for rank in ranks) / len(ranks))
    own = module.outcome[""]["toy"].metrics
    assert {key: value for key, value in metrics.items() if key.startswith("test/toy/")} == pytest.approx(
        {f"test/toy/{key}": value for key, value in own.items()}
    )
    assert metrics["test/mean/R@1"] == pytest.approx(own["R@1"])
    assert not module.evaluators, "the embeddings of the evaluators are let go"


def test_validation_ranks_the_model_alone() -> None:
    module, data = make_module("artemis"), Toy()
    metrics = make_trainer().validate(module, data, verbose=False)[0]
    assert data.asked == ["val"] and module.outcome.keys() == {""}
    assert metrics["val/toy/R@10"] == 100
    assert module.outcome[""]["toy"].queries.shape == (len(ROWS), 2, D)


@pytest.mark.parametrize("composer", [None, "sum", "artemis"])
def test_queries_of_one_modality_are_ranked_by_cosine(composer: str | None) -> None:
    module = make_module(composer)
    make_trainer().test(module, Toy(single=True), verbose=False)
    model = module.model.eval()
    with torch.no_grad():
        gallery = model.encode_target({"image": torch.stack([picture(colour) for colour in range(COLOURS)])})
        queries = model.encode_target({"text": composed(ROWS)["text"]})
    scores = queries.double() @ gallery.double().T
    ranks = [
        1 + sum(scores[q, j].item() >= scores[q, t].item() for j in range(COLOURS) if j != t)
        for q, (_, t) in enumerate(ROWS)
    ]
    assert module.outcome[""]["toy"].ranks_under_protocol().tolist() == ranks


def test_groups_follow_the_options() -> None:
    module = make_module("combiner", weight_decay=0.3, lr_multipliers={"image_encoder": 0.0, "composer": 2.0})
    lr = {group.part: group.lr for group in module.groups()}
    assert lr == {"image_encoder": 0, "text_encoder": 3e-3, "composer": 6e-3, "temperature": 3e-3}
    before = module.model.clip.visual.proj.detach().clone()
    make_trainer(limit_val_batches=0).fit(module, Toy(batches=2))
    assert torch.equal(module.model.clip.visual.proj, before)


@pytest.mark.parametrize("weight_decay", [0.01, 0.0])
def test_the_learning_rate_of_every_group_is_logged(weight_decay: float, tmp_path: Path) -> None:
    logger, monitor = CSVLogger(str(tmp_path)), LearningRateMonitor("step")
    module = make_module("combiner", weight_decay=weight_decay)
    make_trainer(logger=logger, callbacks=[monitor], limit_val_batches=0).fit(module, Toy(batches=1))
    assert len(monitor.lrs) == len(module.groups()) >= 4


def test_mixed_precision_may_clip() -> None:
    """Lightning refuses to clip for optimisers that unscale gradients themselves, as fused ones say they do."""
    module = make_module(schedule="constant", warmup=0.0)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    make_trainer(precision="bf16-mixed", gradient_clip_val=1.0).fit(module, Toy(batches=2).train_dataloader())
    assert any(not torch.equal(p, before[name]) for name, p in module.named_parameters())
