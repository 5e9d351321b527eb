import csv
from pathlib import Path

from cliplab.training.loggers import Curves, continued_csv_logger, read_curves


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def log(folder: Path, resumed: bool, metrics: list[tuple[int, dict[str, float]]]) -> None:
    """One session, saved after every row as at the end of an epoch."""
    logger = continued_csv_logger(folder, resumed)
    for step, values in metrics:
        logger.log_metrics(values, step)
        logger.save()
    logger.finalize("success")


FIRST = [(0, {"train/loss": 2.0}), (1, {"train/loss": 1.5, "val/R@10": 40.0})]
EXPECTED = [{"train/loss": "2.0", "step": "0"}, {"train/loss": "1.5", "val/R@10": "40.0", "step": "1"}]


def test_one_session(tmp_path: Path) -> None:
    log(tmp_path, False, FIRST)
    assert rows(tmp_path) == EXPECTED
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix == ".csv") == ["metrics.csv"]


def test_a_resumed_run_keeps_its_rows(tmp_path: Path) -> None:
    log(tmp_path, False, FIRST)
    log(tmp_path, True, [(2, {"train/loss": 1.0})])
    assert rows(tmp_path) == [*EXPECTED, {"train/loss": "1.0", "step": "2"}]


def test_new_columns_join_the_old_rows(tmp_path: Path) -> None:
    log(tmp_path, False, FIRST[:1])
    log(tmp_path, True, [(1, {"val/R@10": 40.0}), (2, {"train/loss": 1.0, "a, b": 3.0})])
    log(tmp_path, True, [(3, {"val/R@10": 50.0})])
    assert rows(tmp_path) == [
        EXPECTED[0],
        {"val/R@10": "40.0", "step": "1"},
        {"train/loss": "1.0", "a, b": "3.0", "step": "2"},
        {"val/R@10": "50.0", "step": "3"},
    ]


def test_a_session_that_logs_nothing_loses_nothing(tmp_path: Path) -> None:
    log(tmp_path, False, FIRST)
    log(tmp_path, True, [])
    assert rows(tmp_path) == EXPECTED


def test_a_new_run_starts_afresh(tmp_path: Path) -> None:
    log(tmp_path, False, FIRST)
    log(tmp_path, False, [(0, {"train/loss": 9.0})])
    assert rows(tmp_path) == [{"train/loss": "9.0", "step": "0"}]


def test_a_resumed_run_without_a_file_starts_one(tmp_path: Path) -> None:
    log(tmp_path, True, FIRST)
    assert rows(tmp_path) == EXPECTED


def curves(folder: Path, sessions: list[list[tuple[int, dict[str, float]]]]) -> Curves:
    for number, session in enumerate(sessions):
        log(folder, number > 0, session)
    return read_curves(folder / "metrics.csv")


EPOCH = [(9, {"train/loss": 4.0, "epoch": 0}), (11, {"val/dress/R@10": 20.0, "val/mean/R@10": 30.0, "epoch": 0})]


def test_curves_are_the_loss_by_step_and_the_recalls_by_epochs_trained(tmp_path: Path) -> None:
    more = [(19, {"train/loss": 3.0, "lr": 0.1, "epoch": 1}), (23, {"val/dress/R@10": 25.0, "epoch": 1})]
    noise = [(23, {"test/dress/R@10": 99.0, "val/dress/R@10_optimistic": 98.0, "val/dress/mean_rank": 7.0, "epoch": 2})]
    found = curves(tmp_path, [[*EPOCH, *more, *noise]])
    assert found.loss == {9: 4.0, 19: 3.0}
    assert found.recalls == {"dress/R@10": {1: 20.0, 2: 25.0}, "mean/R@10": {1: 30.0}}


def test_curves_go_on_where_a_run_was_resumed(tmp_path: Path) -> None:
    """Killed at step 35 of the second epoch, continued after the first; step 19 is there twice."""
    killed = [(19, {"train/loss": 3.9, "epoch": 1}), (29, {"train/loss": 3.8, "epoch": 1})]
    found = curves(tmp_path, [[*EPOCH, *killed], [(19, {"train/loss": 3.0, "epoch": 1})]])
    assert found.loss == {9: 4.0, 19: 3.0}, "29 was taken back and not trained again"
    assert found.recalls == {"dress/R@10": {1: 20.0}, "mean/R@10": {1: 30.0}}


def test_curves_of_a_run_that_logged_nothing_are_empty(tmp_path: Path) -> None:
    assert curves(tmp_path, [[(0, {"lr": 0.1})]]) == Curves()
