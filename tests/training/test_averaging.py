from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from cliplab.errors import UserError
from cliplab.training.averaging import Averaging, build_averaging
from cliplab.training.module import RetrievalModule
from tests.training.test_module import Toy, make_module, make_trainer

KEY = "model.clip.visual.proj"


class Steps(L.Callback):
    """The weight after every step; as it is while a validation ranks, and after it."""

    def __init__(self) -> None:
        self.after: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []
        self.ranked: list[torch.Tensor] = []

    def weight(self, module: L.LightningModule) -> torch.Tensor:
        return module.get_parameter(KEY).detach().clone()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        self.after.append(self.weight(pl_module))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated.append(self.weight(pl_module))


def fit(part: dict[str, Any], epochs: int = 2, **options: Any) -> tuple[RetrievalModule, Steps, L.Trainer]:
    module, seen = make_module(), Steps()
    finish = module.on_validation_epoch_end

    def ranked() -> None:
        seen.ranked.append(seen.weight(module))
        finish()

    module.on_validation_epoch_end = ranked  # type: ignore[method-assign]
    trainer = make_trainer(epochs, callbacks=[seen, build_averaging(part)], **options)
    trainer.fit(module, Toy(batches=4))
    return module, seen, trainer


def ema(weights: list[torch.Tensor], decay: float, every: int = 1, start: int = 0) -> torch.Tensor:
    average = weights[start]
    for step in range(start + every, len(weights), every):
        average = decay * average + (1 - decay) * weights[step]
    return average


def test_an_exponential_average_is_validated_and_stays() -> None:
    module, seen, _ = fit({"name": "ema", "decay": 0.7})
    assert len(seen.after) == 8 and (seen.after[0] - seen.after[-1]).abs().max() > 1e-4
    for epoch, end in enumerate((4, 8)):
        expected = ema(seen.after[:end], 0.7)
        assert (expected - seen.after[end - 1]).abs().max() > 1e-4
        torch.testing.assert_close(seen.validated[epoch], expected)
        torch.testing.assert_close(seen.ranked[epoch], expected)  # where joint scores are computed
    torch.testing.assert_close(module.get_parameter(KEY).detach(), ema(seen.after, 0.7))


def test_training_goes_on_from_its_own_weights() -> None:
    averaged, plain = Steps(), Steps()
    for seen, callbacks in ((averaged, [build_averaging({"name": "ema", "decay": 0.7})]), (plain, [])):
        make_trainer(2, callbacks=[seen, *callbacks]).fit(make_module(), Toy(batches=4))
    assert all(torch.equal(one, other) for one, other in zip(averaged.after, plain.after, strict=True))


@pytest.mark.parametrize(("every", "start"), [(1, 0), (2, 0), (1, 5), (2, 3)])
def test_the_equal_average_of_some_steps(every: int, start: int) -> None:
    module, seen, _ = fit({"name": "swa", "every_n_steps": every, "start_step": start})
    expected = torch.stack(seen.after[start::every]).mean(dim=0)
    torch.testing.assert_close(module.get_parameter(KEY).detach(), expected)
    if start >= 4:
        torch.testing.assert_close(seen.validated[0], seen.after[3])  # nothing is averaged yet


def test_every_nth_step_counts() -> None:
    module, seen, _ = fit({"name": "ema", "decay": 0.7, "every_n_steps": 3, "start_step": 1})
    torch.testing.assert_close(module.get_parameter(KEY).detach(), ema(seen.after, 0.7, every=3, start=1))


def test_a_checkpoint_has_the_average_as_its_weights_and_a_resumed_run_is_the_whole_one(tmp_path: Path) -> None:
    part = {"name": "ema", "decay": 0.7}
    whole, seen, _ = fit(part)
    module, seen_again = make_module(), Steps()
    file = _checkpoint(tmp_path, part)
    stored = torch.load(file, weights_only=True)
    torch.testing.assert_close(stored["state_dict"][KEY], ema(seen.after[:4], 0.7))
    torch.testing.assert_close(stored["current_model_state"][KEY], seen.after[3])
    resumed = make_trainer(2, callbacks=[seen_again, build_averaging(part)])
    resumed.fit(module, Toy(batches=4), ckpt_path=file, weights_only=True)
    assert len(seen_again.after) == 4
    torch.testing.assert_close(seen_again.after[-1], seen.after[-1])
    torch.testing.assert_close(module.get_parameter(KEY), whole.get_parameter(KEY))


def _checkpoint(folder: Path, part: dict[str, Any]) -> Path:
    """Of the first of two epochs."""

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(folder / "half.ckpt")
            trainer.should_stop = True

    trainer = make_trainer(2, callbacks=[build_averaging(part), Stop()])
    trainer.fit(make_module(), Toy(batches=4))
    return folder / "half.ckpt"


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"name": "emma"}, "did you mean 'ema'"),
        ({"name": "ema", "decay": 1.0}, r"decay must be in \[0, 1\)"),
        ({"name": "ema", "every_n_steps": 0}, "every_n_steps of 1 or more"),
        ({"name": "swa", "start_step": -1}, "start_step of 0 or more"),
        ({"name": "swa", "decay": 0.9}, "has no option 'decay'"),
    ],
)
def test_mistakes_are_named(part: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_averaging(part)


def test_both_averages_are_lightnings_callback() -> None:
    assert isinstance(build_averaging({"name": "ema"}), Averaging)
    assert isinstance(build_averaging({"name": "swa"}), Averaging)
