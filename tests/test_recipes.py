"""What the recipes are made of, through whole runs: stage 2 from stage 1, LoRA, averages, a bias that a loss brings."""

import json
from pathlib import Path

import open_clip
import pytest
import torch

import cliplab
from cliplab import build
from cliplab.config import load_config
from cliplab.models.clip import CLIP
from cliplab.training.loggers import read_curves
from tests.test_train import main_of

LORA = ["model.lora={rank: 2, alpha: 8}", "model.composer=sum", "trainer.weight_averaging={name: ema, decay: 0.5}"]
LORA += ["optim.layer_decay=0.7", "optim.lr=1e-2", "loss=sigmoid", "trainer.log_every_n_steps=1"]


def train(config: Path, name: str, given: list[str]) -> Path:
    main_of("train")(["--config", str(config), f"name={name}", *given])
    return config.parent / "runs" / name


@pytest.fixture(scope="module")
def stage_1(tiny_config: Path) -> Path:
    """A run with low-rank updates, averaged weights and a bias."""
    return train(tiny_config, "stage_1", LORA)


def state(run: Path, name: str = "best") -> dict:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def features(clip: CLIP) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(2, 3, 32, 32, generator=generator)
    text = torch.randint(1, 49000, (2, 32), generator=generator)
    text[:, -1] = 49407
    return clip.eval().encode_image(pictures), clip.encode_text(text)


def test_an_adapted_run_is_tested_again_with_the_same_numbers(stage_1: Path) -> None:
    main_of("eval")(["--checkpoint", str(stage_1)])
    results = json.loads((stage_1 / "results.json").read_text())
    again = json.loads(next((stage_1 / "eval").glob("*/results.json")).read_text())
    assert again["metrics"] == results["metrics"]
    losses = list(read_curves(stage_1 / "metrics.csv").loss.values())
    assert len(losses) == 18 and sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_its_checkpoints_hold_the_average_and_the_weights(stage_1: Path) -> None:
    best = state(stage_1)
    up = [key for key in best["state_dict"] if key.endswith(".up")]
    assert len(up) == 2 and any(best["state_dict"][key].abs().max() > 1e-4 for key in up)
    assert any((best["state_dict"][key] - best["current_model_state"][key]).abs().max() > 1e-5 for key in up)
    assert best["hyper_parameters"]["built_from"]["architecture"]["init_logit_bias"] == -10
    assert best["state_dict"]["model.clip.logit_bias"] != -10, "the bias learns"


def test_the_base_weights_stay(stage_1: Path, tiny_config: Path) -> None:
    config = load_config(tiny_config, LORA)
    import lightning as L

    L.seed_everything(config.seed, workers=True, verbose=False)
    model, _ = build.build_model(config)
    trained = state(stage_1)["state_dict"]
    for name, value in model.state_dict().items():
        moved = name.endswith((".up", ".down")) or "logit" in name
        assert moved or torch.equal(trained[f"model.{name}"], value), name


def test_load_and_save_give_plain_weights(stage_1: Path, tiny_config: Path, tmp_path: Path) -> None:
    loaded = cliplab.load(stage_1).model
    config = load_config(tiny_config, LORA)
    adapted, _ = build.build_model(config)
    stored = {key.removeprefix("model."): value for key, value in state(stage_1)["state_dict"].items()}
    adapted.load_state_dict(stored, strict=True)
    cliplab.save(adapted.clip, tmp_path / "from_adapted")
    cliplab.save(loaded, tmp_path / "from_loaded")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'from_adapted'}")
    by_file = cliplab.load(tmp_path / "from_loaded").model
    expected = features(adapted.clip)
    assert not any("parametrizations" in key for key in loaded.state_dict())
    for other, tolerance in ((loaded, 1e-6), (by_file, 1e-6), (theirs, 1e-5)):
        for found, own in zip(features(other), expected, strict=True):
            torch.testing.assert_close(found, own, atol=tolerance, rtol=0)


@pytest.mark.parametrize("key", ["model.weights", "model.arch"])
def test_one_key_starts_stage_2_from_the_towers_of_stage_1(stage_1: Path, tiny_config: Path, key: str) -> None:
    given = [f"{key}={stage_1}", "model.freeze=[image_encoder, text_encoder]"]
    config = load_config(tiny_config, given)
    build.check(config)
    model, _ = build.build_model(config)
    stored = cliplab.load(stage_1).model.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in model.clip.state_dict().items())
    assert type(model.composer).__name__ == "Combiner"
    module = build.build_module(config, model, build.BuiltFrom("", {}, {}))
    assert {group.part for group in module.groups()} == {"composer", "temperature"}


def test_stage_2_is_trained_and_tested(stage_1: Path, tiny_config: Path) -> None:
    given = [f"model.weights={stage_1}", "model.freeze=[image_encoder, text_encoder]", "trainer.max_epochs=1"]
    run = train(tiny_config, "stage_2", given)
    towers = {key: value for key, value in state(run)["state_dict"].items() if key.startswith("model.clip.visual")}
    loaded = cliplab.load(stage_1).model.state_dict()
    assert all(torch.equal(value, loaded[key.removeprefix("model.clip.")]) for key, value in towers.items())


def test_a_run_with_everything_resumes(stage_1: Path, tiny_config: Path) -> None:
    """Stopped after one of two epochs: as the uninterrupted run."""
    import lightning as L

    from cliplab.run import RunDirectory
    from cliplab.trainer import build_trainer

    config = load_config(tiny_config, [*LORA, "name=resumed"])
    dataset = build.check(config)
    folder = tiny_config.parent / "runs" / "resumed"

    def fit(checkpoint: Path | None, stop: bool) -> torch.Tensor:
        L.seed_everything(config.seed, workers=True, verbose=False)
        model, built_from = build.build_model(config)
        module = build.build_module(config, model, built_from)
        trainer = build_trainer(config, RunDirectory(folder, checkpoint))
        if stop:
            trainer.callbacks.insert(0, Stop())  # type: ignore[attr-defined]
        datamodule = build.build_datamodule(config, dataset, model, built_from)
        trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
        return module.state_dict()

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = True

    fit(None, stop=True)
    assert state(folder, "last")["epoch"] == 0
    found = fit(folder / "checkpoints" / "last.ckpt", stop=False)
    expected = state(stage_1, "last")["state_dict"]
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)
