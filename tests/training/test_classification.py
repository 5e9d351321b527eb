from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor

from cliplab.benchmark import make_protocol
from cliplab.config import OptimConfig
from cliplab.data.datamodule import RetrievalDataModule
from cliplab.data.image_folder import ImageFolderDataset
from cliplab.data.images import ImageTransform, Preprocess, read_image
from cliplab.data.templates import CIFAR
from cliplab.evaluation.linear_probe import linear_probe
from cliplab.evaluation.zero_shot import zero_shot_weights
from cliplab.losses.info_nce import info_nce
from cliplab.models.clip import CLIP
from cliplab.models.composed import ComposedRetriever
from cliplab.tokenizer import Tokenizer
from cliplab.training.classification import Probe, ZeroShot, labels
from cliplab.training.module import RetrievalModule
from tests.conftest import TINY
from tests.image_folders import make_image_folder
from tests.processes import in_processes

CIFAR_PROTOCOL = make_protocol({"name": "zero_shot_cifar"})
NAMES = ["dress", "polar bear", "t-shirt"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("data") / "pictures")


def make_module() -> RetrievalModule:
    torch.manual_seed(0)
    model = ComposedRetriever(CLIP(**TINY), None, (0.5,) * 3, (0.5,) * 3)
    return RetrievalModule(model, partial(info_nce), OptimConfig(lr=1e-3))


def make_data(root: Path, **options: Any) -> RetrievalDataModule:
    loaders = {"batch_size": 4, "eval_batch_size": 4} | options
    return RetrievalDataModule(ImageFolderDataset(root), CIFAR_PROTOCOL, Preprocess(size=32), Tokenizer(32), **loaders)


def zero_shot(root: Path, every_n_epochs: int = 1) -> ZeroShot:
    return ZeroShot(ImageFolderDataset(root), CIFAR_PROTOCOL, "test", every_n_epochs)


def make_trainer(folder: Path, epochs: int = 1, callbacks: list[Callback] | None = None) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )


def features_of(model: ComposedRetriever, root: Path, split: str) -> tuple[Tensor, Tensor]:
    """Unit features [N, D] and labels [N], one picture after the other."""
    transform = ImageTransform(Preprocess(size=32))
    folders = [root / split / name for name in ("dress", "polar_bear", "t-shirt")]
    files = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.glob("*.png"))]
    with torch.no_grad():
        found = [model.encode_target({"image": transform(read_image(path))[None]})[0] for path, _ in files]
    return torch.stack(found), torch.tensor([label for _, label in files])


def accuracy_by_hand(model: ComposedRetriever, root: Path, k: int) -> float:
    """Top-k accuracy from the weights of `zero_shot_weights`, in percent."""
    weights = zero_shot_weights(model.clip.eval(), Tokenizer(32), NAMES, CIFAR)
    features, truth = features_of(model.eval(), root, "test")
    hits = 0
    for feature, label in zip(features, truth.tolist(), strict=True):
        scores = [float(feature.double() @ weights[:, n].double()) for n in range(3)]
        hits += sum(score >= scores[label] for score in scores) <= k
    return 100 * hits / len(truth)


class Seen(Callback):
    """What is logged and the state of the random numbers after each validation."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.random: list[Tensor] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.logged.append({key: value.item() for key, value in trainer.callback_metrics.items()})
        self.random.append(torch.get_rng_state())


def test_the_benchmark_is_the_classifier_of_zero_shot_weights(root: Path, tmp_path: Path) -> None:
    module = make_module()
    make_trainer(tmp_path).test(module, make_data(root), verbose=False)
    assert module.outcome.keys() == {""} and module.outcome[""].keys() == {"zero_shot"}
    ranked = module.outcome[""]["zero_shot"]
    torch.testing.assert_close(ranked.queries, features_of(module.model, root, "test")[0], atol=1e-5, rtol=0)
    weights = zero_shot_weights(module.model.clip, Tokenizer(32), NAMES, CIFAR)
    torch.testing.assert_close(ranked.gallery, weights.T, atol=1e-6, rtol=0)
    assert ranked.metrics["R@1"] == pytest.approx(accuracy_by_hand(module.model, root, 1))
    assert 0 < ranked.metrics["R@1"] < 100, "the case must be worth it"
    assert ranked.metrics["R@5"] == 100, "with five classes or fewer"


def test_a_training_logs_the_accuracy_of_its_towers_and_is_not_disturbed(root: Path, tmp_path: Path) -> None:
    runs = {}
    for name, extra in (("without", []), ("with", [zero_shot(root)])):
        module, seen = make_module(), Seen()
        make_trainer(tmp_path, 3, [*extra, seen]).fit(module, make_data(root))
        runs[name] = module, seen
    (plain, plain_seen), (module, seen) = runs["without"], runs["with"]
    for key, value in plain.state_dict().items():
        assert torch.equal(value, module.state_dict()[key]), key
    assert all(torch.equal(a, b) for a, b in zip(plain_seen.random, seen.random, strict=True))
    for before, now in zip(plain_seen.logged, seen.logged, strict=True):
        assert now.keys() - before.keys() == {"zero_shot/top1", "zero_shot/top5"}
        assert {key: now[key] for key in before} == before
    assert seen.logged[-1]["zero_shot/top1"] == pytest.approx(accuracy_by_hand(module.model, root, 1))
    assert seen.logged[-1]["zero_shot/top5"] == 100
    assert module.outcome[""]["zero_shot"].benchmark.query_names[0].startswith("dress/validation"), "of the validation"


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 1, 1, 1]), (2, [0, 1, 0, 1]), (3, [0, 0, 1, 0])])
def test_every_n_epochs(root: Path, tmp_path: Path, every: int, expected: list[int]) -> None:
    module, epochs = make_module(), []
    log = module.log

    def logged(name: str, *arguments: Any, **options: Any) -> None:
        epochs.extend([module.current_epoch] if name == "zero_shot/top1" else [])
        log(name, *arguments, **options)

    module.log = logged  # type: ignore[method-assign]
    make_trainer(tmp_path, 4, [zero_shot(root, every)]).fit(module, make_data(root))
    assert [epochs.count(epoch) for epoch in range(4)] == expected


def test_the_random_state_is_given_back(root: Path) -> None:
    trainer, module = fake_trainer(make_data(root)), make_module().eval()
    module.log = lambda *arguments, **options: None  # type: ignore[method-assign]
    before = torch.get_rng_state()
    zero_shot(root).on_validation_epoch_end(trainer, module)
    assert torch.equal(torch.get_rng_state(), before)
    next(iter(make_data(root).test_dataloader()[0]))
    assert not torch.equal(torch.get_rng_state(), before), "a loader draws"


def test_a_probe_is_fitted_to_the_features_of_the_tested_model(root: Path, tmp_path: Path) -> None:
    module = make_module()
    make_trainer(tmp_path, callbacks=[Probe()]).test(module, make_data(root), verbose=False)
    found = module.probe
    assert found is not None
    train, validation, test = (features_of(module.model, root, split) for split in ("train", "validation", "test"))
    expected = linear_probe(train, validation, test)
    assert (found.strength, found.validation_accuracy, found.test_accuracy) == pytest.approx(
        (expected.strength, expected.validation_accuracy, expected.test_accuracy)
    )
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-2, rtol=1e-2)


def fake_trainer(data: RetrievalDataModule, world: int = 1, rank: int = 0) -> Any:
    strategy = SimpleNamespace(batch_to_device=lambda batch, device: batch)
    trainer = SimpleNamespace(
        current_epoch=0,
        datamodule=data,
        world_size=world,
        global_rank=rank,
        is_global_zero=rank == 0,
        precision_plugin=Precision(),
        strategy=strategy,
    )
    data.trainer = trainer  # type: ignore[assignment]
    return trainer


def of_one_process(rank: int, world: int, root: Path) -> tuple[dict[str, float], int, list[float] | None]:
    """What a process logs, how many batches it embeds and what its probe measures."""
    module, logged, batches = make_module().eval(), {}, []
    module.log = lambda name, value, **options: logged.update({name: value})  # type: ignore[method-assign]
    embed = module.embed
    module.embed = lambda batch, evaluator: batches.append(embed(batch, evaluator))  # type: ignore[method-assign]
    trainer = fake_trainer(make_data(root, eval_batch_size=1), world, rank)
    with torch.inference_mode():
        zero_shot(root).on_validation_epoch_end(trainer, module)
        count = len(batches)
        module.start_evaluation(trainer.datamodule.benchmarks("test"), baselines=False)
        for number, loader in enumerate(trainer.datamodule.test_dataloader()):
            for batch in loader:
                module.evaluation_step(batch, number)
        module.finish_evaluation("test")
        Probe().on_test_end(trainer, module)
    probe = module.probe and [module.probe.strength, module.probe.validation_accuracy, module.probe.test_accuracy]
    return logged, count, probe


def test_two_processes_share_the_work_and_measure_what_one_does(root: Path) -> None:
    alone, batches, probe = of_one_process(0, 1, root)
    assert batches == 6 + 3 * len(CIFAR) and probe is not None
    first, second = in_processes(of_one_process, 2, 2, root)
    assert first[0] == second[0] == alone
    assert first[1] == second[1] == batches / 2
    assert first[2] == pytest.approx(probe) and second[2] is None


def test_labels_are_by_picture(root: Path) -> None:
    (benchmark,) = ImageFolderDataset(root).benchmarks(CIFAR_PROTOCOL, "test")
    assert labels(benchmark).tolist() == [0, 1, 1, 1, 2, 2]
