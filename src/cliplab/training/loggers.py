"""metrics.csv of a run, from its first start on."""

import csv
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger


def continued_csv_logger(folder: Path, resumed: bool) -> CSVLogger:
    """A CSVLogger that writes folder/metrics.csv and, where a run is resumed, keeps the rows that are there.

    Lightning's own deletes the file that it finds.
    """
    file = folder / "metrics.csv"
    earlier = file.read_text(encoding="utf-8") if resumed and file.is_file() else ""
    logger = CSVLogger(str(folder), name="", version="")
    if earlier:
        writer = logger.experiment  # deletes the file
        file.write_text(earlier, encoding="utf-8")
        writer.metrics_keys = next(csv.reader(earlier.splitlines()))
    return logger
