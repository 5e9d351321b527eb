"""metrics.csv of a run, from its first start on."""

import csv
import re
from dataclasses import dataclass, field
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from cliplab.errors import UserError


def continued_csv_logger(folder: Path, resumed: bool) -> CSVLogger:
    """A CSVLogger that writes folder/metrics.csv and, where a run is resumed, keeps the rows that are there.

    Lightning's own deletes the file that it finds.
    """
    file = folder / "metrics.csv"
    try:
        earlier = file.read_text(encoding="utf-8") if resumed and file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't continue {file}: {error}; remove it to go on without the earlier curves") from error
    logger = CSVLogger(str(folder), name="", version="")
    if earlier:
        writer = logger.experiment  # deletes the file
        file.write_text(earlier, encoding="utf-8")
        writer.metrics_keys = next(csv.reader(earlier.splitlines()))
    return logger


@dataclass
class Curves:
    """What a run's metrics.csv tells about its training."""

    loss: dict[int, float] = field(default_factory=dict)  # train/loss by step
    recalls: dict[str, dict[int, float]] = field(default_factory=dict)  # NAME/R@K of the validations, by epochs trained


def read_curves(file: Path) -> Curves:
    """The curves of a metrics.csv; what a resumed run repeated counts once, and steps that it took back don't."""
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["step"]]
    standing: list[dict[str, str]] = []
    for row in rows:
        while standing and int(standing[-1]["step"]) > int(row["step"]):
            standing.pop()
        standing.append(row)
    curves = Curves()
    for row in standing:
        for key, value in row.items():
            recall = re.fullmatch(r"val/(.+/R@\d+)", key)
            if key == "train/loss" and value:
                curves.loss[int(row["step"])] = float(value)
            elif recall and value:
                curves.recalls.setdefault(recall[1], {})[int(row["epoch"]) + 1] = float(value)
    return curves
