import pytest
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from cliplab.config import load_config
from cliplab.errors import UserError
from cliplab.run import RunDirectory
from cliplab.trainer import build_evaluator, build_trainer
from cliplab.training.averaging import Averaging
from cliplab.training.callbacks import RetrievalPictures


def test_the_average_comes_behind_what_looks_at_a_validation(tiny_config, tmp_path) -> None:
    given = ["trainer.weight_averaging={name: ema, decay: 0.9}", "trainer.early_stopping_patience=3"]
    trainer = build_trainer(load_config(tiny_config, given), RunDirectory(tmp_path))
    kinds = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    place = kinds.index(Averaging)
    assert kinds.index(RetrievalPictures) < place and kinds.index(EarlyStopping) < place
    assert all(number > place for number, kind in enumerate(kinds) if kind is ModelCheckpoint)


def test_without_an_average_there_is_none(tiny_config, tmp_path) -> None:
    trainer = build_trainer(load_config(tiny_config), RunDirectory(tmp_path))
    assert not any(isinstance(callback, Averaging) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def test_an_evaluator_writes_no_checkpoints(tiny_config, tmp_path) -> None:
    trainer = build_evaluator(load_config(tiny_config), RunDirectory(tmp_path))
    assert trainer.checkpoint_callback is None and not trainer.loggers


def test_what_the_trainer_refuses_is_named(tiny_config, tmp_path) -> None:
    with pytest.raises(UserError, match="^trainer: "):
        build_trainer(load_config(tiny_config, ["trainer.precision=17"]), RunDirectory(tmp_path))


def test_under_slurm_lightning_requeues_nothing(tiny_config, tmp_path, monkeypatch):
    for key, value in {"JOB_ID": "7", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    config = load_config(tiny_config)
    trainer = build_evaluator(config, RunDirectory(tmp_path))
    environment = trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue
    monkeypatch.delenv("SLURM_NTASKS")
    trainer = build_evaluator(config, RunDirectory(tmp_path))
    assert not isinstance(trainer._accelerator_connector.cluster_environment, SLURMEnvironment)
