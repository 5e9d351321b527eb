import logging
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cliplab.config import Config, TrainerConfig, merge_config
from cliplab.errors import UserError
from cliplab.run import RunDirectory, checkpoint_of, claim_run, find_run

WRITTEN = 1_700_000_000


def open_run(config: Config) -> RunDirectory:
    """Both steps of a start."""
    run = find_run(config)
    claim_run(run, config)
    return run


def test_finding_a_run_touches_nothing(config: Config) -> None:
    before = contents(finished(config).path)
    assert find_run(config).resume_from is None
    assert contents(Path(config.output_dir) / "a") == before
    assert moved_aside(config) == []


@pytest.fixture(autouse=True)
def no_further_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(name="a", output_dir=str(tmp_path / "runs"))


def interrupted(config: Config) -> RunDirectory:
    """A run that has ended after an epoch and has written no results."""
    run = open_run(config)
    run.last.parent.mkdir()
    run.last.write_text("weights of a")
    return run


def finished(config: Config) -> RunDirectory:
    run = interrupted(config)
    run.results.write_text("results of a")
    return run


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def stored(run: RunDirectory) -> Config:
    read = OmegaConf.to_container(OmegaConf.load(run.path / "config.yaml"))
    assert isinstance(read, dict)
    return merge_config([("stored", {str(key): value for key, value in read.items()})])


def moved_aside(config: Config) -> list[Path]:
    runs = Path(config.output_dir)
    return sorted(path for path in runs.iterdir() if path.name != config.name)


def test_the_first_run_makes_its_folder_with_the_config(config: Config) -> None:
    config = replace(config, loss={"name": "info_nce", "label_smoothing": 0.1}, seed=3)
    run = open_run(config)
    assert run == RunDirectory(Path(config.output_dir) / "a", None)
    assert stored(run) == config
    assert moved_aside(config) == []


def test_the_places_of_a_run() -> None:
    run = RunDirectory(Path("runs/a"))
    assert run.best == Path("runs/a/checkpoints/best.ckpt")
    assert run.last == Path("runs/a/checkpoints/last.ckpt")
    assert run.results == Path("runs/a/results.json")


def test_an_interrupted_run_of_the_same_config_continues(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    before = contents(interrupted(config).path)
    with caplog.at_level(logging.INFO, "cliplab"):
        run = open_run(config)
    assert run.resume_from == run.last
    assert contents(run.path) == before
    assert moved_aside(config) == []
    assert "continuing the interrupted run" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda c: replace(c, trainer=TrainerConfig(max_epochs=99, max_steps=7)),
        lambda c: replace(c, debug=True),
        lambda c: replace(c, data=replace(c.data, num_workers=5)),
    ],
)
def test_how_and_how_long_may_change_when_a_run_continues(config: Config, change: Callable[[Config], Config]) -> None:
    interrupted(config)
    changed = change(config)
    run = open_run(changed)
    assert run.resume_from == run.last
    assert stored(run) == changed


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda c: replace(c, seed=1), "seed"),
        (lambda c: replace(c, optim=replace(c.optim, lr=1e-5)), "optim.lr"),
        (lambda c: replace(c, optim=replace(c.optim, lr_multipliers={"composer": 10.0})), "optim.lr_multipliers"),
        (lambda c: replace(c, loss={"name": "other"}), "loss.name"),
        (lambda c: replace(c, model=replace(c.model, composer={"name": "sum"})), "model.composer"),
        (lambda c: replace(c, data=replace(c.data, categories=["dress"])), "data.categories"),
    ],
)
def test_an_interrupted_run_of_another_config_moves_aside_whole(
    config: Config, change: Callable[[Config], Config], key: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(interrupted(config).path)
    changed = change(config)
    with caplog.at_level(logging.INFO, "cliplab"):
        run = open_run(changed)
    assert run.resume_from is None
    assert key in caplog.text
    assert [contents(path) for path in moved_aside(config)] == [before]
    assert set(contents(run.path)) == {"config.yaml"} and stored(run) == changed


def test_a_finished_run_moves_aside_whole(config: Config) -> None:
    before = contents(finished(config).path)
    run = open_run(config)
    assert run.resume_from is None
    assert [contents(path) for path in moved_aside(config)] == [before]
    assert set(contents(run.path)) == {"config.yaml"}


def test_never_does_not_continue_and_loses_nothing(config: Config) -> None:
    before = contents(interrupted(config).path)
    run = open_run(replace(config, resume="never"))
    assert run.resume_from is None
    assert [contents(path) for path in moved_aside(config)] == [before]


def test_a_folder_that_is_no_run_is_left_alone(config: Config) -> None:
    path = Path(config.output_dir) / "a" / "notes.txt"
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(UserError, match=r"holds files but no run.*name="):
        open_run(config)
    assert contents(path.parent) == {"notes.txt": "precious"}


@pytest.mark.parametrize("name", [".", "..", "../x", "a/../../x", "/x", ""])
def test_a_name_stays_below_the_output_folder(config: Config, name: str) -> None:
    before = contents(interrupted(config).path)
    with pytest.raises(UserError, match="name="):
        open_run(replace(config, name=name))
    assert contents(Path(config.output_dir) / "a") == before


def test_a_file_in_the_way_is_named(config: Config, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken is a file"):
        open_run(replace(config, output_dir=str(tmp_path / "taken")))


def test_a_finished_run_that_is_resumed_keeps_its_results(config: Config) -> None:
    run = finished(config)
    run.last.parent.mkdir(parents=True, exist_ok=True)
    run.last.touch()
    before = run.results.read_text()
    again = open_run(replace(config, resume=str(run.last.resolve())))
    assert again.resume_from is not None and again.resume_from.is_file()
    assert [path.read_text() for path in run.path.glob("results.*.json")] == [before]


@pytest.mark.parametrize("left", ["checkpoints/best.ckpt", "checkpoints/last.ckpt"])
def test_whatever_stands_there_moves_aside(config: Config, left: str) -> None:
    """Without a config.yaml nobody knows what a checkpoint belongs to."""
    path = Path(config.output_dir) / "a" / left
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    assert open_run(config).resume_from is None
    assert [contents(folder) for folder in moved_aside(config)] == [{left: "precious"}]


def test_an_empty_folder_is_used_as_it_is(config: Config) -> None:
    (Path(config.output_dir) / "a").mkdir(parents=True)
    open_run(config)
    assert moved_aside(config) == []


@pytest.mark.parametrize("damaged", ["{", "[1, 2]", "seed"])
def test_a_damaged_config_in_the_folder_is_no_reason_to_fail(config: Config, damaged: str) -> None:
    run = interrupted(config)
    (run.path / "config.yaml").write_text(damaged)
    before = contents(run.path)
    assert open_run(config).resume_from is None
    assert [contents(path) for path in moved_aside(config)] == [before]


def test_runs_move_under_the_time_they_were_last_written_and_never_over_each_other(config: Config) -> None:
    stamp = datetime.fromtimestamp(WRITTEN).strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(3):
        run = finished(config)
        run.results.write_text(f"results {number}")
        for path in run.path.rglob("*"):
            os.utime(path, (WRITTEN - 50, WRITTEN - 50))
        os.utime(run.results, (WRITTEN, WRITTEN))
    open_run(config)
    names = [f"a.{stamp}", f"a.{stamp}.2", f"a.{stamp}.3"]
    assert [path.name for path in moved_aside(config)] == names
    assert [(path / "results.json").read_text() for path in moved_aside(config)] == [f"results {n}" for n in range(3)]


def test_resume_from_a_file_of_the_run_continues_in_place(config: Config) -> None:
    before = contents(interrupted(config).path)
    best = Path(config.output_dir) / "a" / "checkpoints" / "best.ckpt"
    best.write_text("best of a")
    changed = replace(config, resume=str(best), seed=5)
    run = open_run(changed)
    assert (run.path, run.resume_from) == (Path(config.output_dir) / "a", best)
    assert moved_aside(config) == [] and contents(run.path).keys() > before.keys()
    assert stored(run) == changed


def test_resume_from_a_file_elsewhere_starts_a_new_folder(config: Config, tmp_path: Path) -> None:
    checkpoint = tmp_path / "elsewhere.ckpt"
    checkpoint.touch()
    run = open_run(replace(config, resume=str(checkpoint)))
    assert run.resume_from == checkpoint
    assert set(contents(run.path)) == {"config.yaml"}


def test_resume_from_a_file_elsewhere_loses_nothing_of_the_run_that_stands_there(
    config: Config, tmp_path: Path
) -> None:
    before = contents(finished(config).path)
    checkpoint = tmp_path / "elsewhere.ckpt"
    checkpoint.touch()
    run = open_run(replace(config, resume=str(checkpoint)))
    assert run.resume_from == checkpoint
    assert [contents(path) for path in moved_aside(config)] == [before]


@pytest.mark.parametrize("resume", ["nothing.ckpt", "yes", ""])
def test_resume_from_a_file_that_is_not_there_touches_nothing(config: Config, resume: str) -> None:
    before = contents(interrupted(config).path)
    with pytest.raises(UserError, match=f"resume={resume}: no such checkpoint file"):
        open_run(replace(config, resume=resume))
    assert contents(Path(config.output_dir) / "a") == before
    assert moved_aside(config) == []


def test_a_further_process_decides_alike_and_writes_nothing(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    leader = interrupted(config)
    (leader.path / "config.yaml").write_bytes((leader.path / "config.yaml").read_bytes() + b"# untouched\n")
    before = contents(leader.path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert open_run(config).resume_from == leader.last
    assert open_run(replace(config, seed=1)).resume_from is None
    assert contents(leader.path) == before
    assert moved_aside(config) == []


# checkpoint_of


def test_checkpoint_of_a_run_is_its_best_else_its_last(config: Config) -> None:
    run = interrupted(config)
    assert checkpoint_of(run.path) == checkpoint_of(str(run.path)) == run.last
    run.best.touch()
    assert checkpoint_of(run.path) == run.best


def test_checkpoint_of_a_file_is_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.touch()
    assert checkpoint_of(path) == path


def test_checkpoint_of_nothing_lists_each_run_beside_it_once(config: Config) -> None:
    with pytest.raises(UserError, match="runs beside it: none$"):
        checkpoint_of(Path(config.output_dir) / "zzz")
    first, second = interrupted(config), interrupted(replace(config, name="b"))
    first.best.touch()
    path = Path(config.output_dir) / "zzz"
    with pytest.raises(UserError) as error:
        checkpoint_of(path)
    expected = f"{path} is neither a checkpoint nor a run directory with checkpoints/; runs beside it: "
    assert str(error.value) == expected + f"{first.path}, {second.path}"
