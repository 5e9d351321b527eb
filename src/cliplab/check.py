"""Read everything that a run would read, before the run: python -m cliplab.check --config FILE [key=value ...]

Prints the counts beside the published ones and lists missing, unreadable and duplicate pictures. Exit code 0; 1 where
something differs from what is published or can't be read; 2 where the data are unusable, or with a traceback where the
check itself failed.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.progress import track
from rich.table import Table

from cliplab import build, report
from cliplab.cli import EXIT_USER_ERROR, parse, run_script
from cliplab.config import Config, load_config
from cliplab.data.dataset import RetrievalDataset
from cliplab.data.images import read_image
from cliplab.errors import UserError, message_of
from cliplab.published import Edition, published_counts
from cliplab.run import run_directory

log = logging.getLogger("cliplab.check")  # the module's own name is __main__ where it is run
THREADS = 8  # Pillow decodes outside the interpreter's lock
DIFFERENCES = 1
LISTED = 20


@dataclass
class Findings:
    """What was read, and what is wrong with it."""

    counts: dict[str, int]  # by dotted path
    edition: Edition | None
    pictures: int = 0
    missing: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)  # path -> why
    duplicates: list[list[str]] = field(default_factory=list)  # groups of paths with the same bytes
    manifest_hash: str = ""

    def differing(self) -> list[str]:
        """The counts that are published otherwise."""
        published = flat(self.edition.counts) if self.edition is not None else {}
        return [key for key, value in published.items() if self.counts.get(key) != value]

    def is_sound(self) -> bool:
        """Whether nothing differs, is missing or can't be read; duplicates are told and allowed."""
        return not (self.differing() or self.missing or self.unreadable)


def check_data(config: Config) -> Findings:
    """Read annotations and pictures of a config's data set. Raises UserError where they are unusable."""
    build.check_parts(config)
    dataset = build.build_dataset(config)
    dataset.prepare()
    protocol = replace(build.build_protocol(config), missing_images="report")  # listed here, whatever the run does
    splits = _splits(dataset)
    dataset.check(protocol, splits)
    counts = flat(dataset.counts())
    editions = published_counts(dataset.benchmark_name)
    nearest = min(editions, key=lambda edition: _distance(counts, flat(edition.counts)), default=None)
    found = Findings(counts, nearest)
    paths = sorted({path for split in splits for path in _pictures(dataset, protocol, split)})
    _read_all(paths, found)
    found.missing = dataset.missing
    found.manifest_hash = dataset.manifest_hash()
    return found


def _splits(dataset: RetrievalDataset) -> list[str]:
    """Those that are there, among what training and testing read."""
    there = {
        key for counts in (dataset.counts(), *dataset.counts().values()) if isinstance(counts, dict) for key in counts
    }
    # The split that is tested must be there, and says so itself where it isn't.
    return [
        *(split for split in ("train", "val") if split in there and split != dataset.test_split),
        dataset.test_split,
    ]


def _pictures(dataset: RetrievalDataset, protocol: Any, split: str) -> Iterator[str]:
    if split == "train":
        table = dataset.train_table(protocol)
        tables: list[Iterable[str | None]] = [table["reference"], table["target"]]
        if "negatives" in table.column_names:
            tables += table["negatives"]
    else:
        benchmarks = dataset.benchmarks(protocol, split)
        tables = [each["image"] for benchmark in benchmarks for each in (benchmark.queries, benchmark.gallery)]
    return (path for column in tables for path in column if path is not None)


def _read_all(paths: Sequence[str], found: Findings) -> None:
    """Decode every picture, in parallel with a progress bar."""
    by_content: dict[str, list[str]] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        steps = track(pool.map(_read, paths), "reading pictures", total=len(paths), console=report.console(stderr=True))
        for path, (digest, reason) in zip(paths, steps, strict=True):
            by_content.setdefault(digest, []).append(path)
            if reason is not None:
                found.unreadable[path] = reason
    found.pictures = len(paths)
    found.duplicates = [group for digest, group in by_content.items() if digest and len(group) > 1]


def _read(path: str) -> tuple[str, str | None]:
    try:
        digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
        read_image(path)
    except (UserError, OSError) as error:
        return "", message_of(error) if isinstance(error, UserError) else str(error)
    return digest, None


def flat(counts: Mapping[str, Any], prefix: str = "") -> dict[str, int]:
    """Nested counts by dotted path."""
    found: dict[str, int] = {}
    for key, value in counts.items():
        nested = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def _distance(counts: Mapping[str, int], published: Mapping[str, int]) -> int:
    return sum(counts.get(key) != value for key, value in published.items())


def counts_table(found: Findings, title: str) -> Table:
    """What is there beside what is published; what differs in bold."""
    published = flat(found.edition.counts) if found.edition is not None else {}
    told = (
        f"published: {found.edition.edition} ({found.edition.confidence})"
        if found.edition is not None
        else "none published"
    )
    table = Table(title=title, caption=told, caption_justify="left")
    for column in ("", "here", "published"):
        table.add_column(column, justify="left" if not column else "right")
    for key in dict.fromkeys([*found.counts, *published]):
        differs = key in published and found.counts.get(key) != published[key]
        cells = [f"{each[key]:,}" if key in each else "-" for each in (found.counts, published)]
        table.add_row(key, *cells, style="bold red" if differs else None)
    return table


def main(arguments: Sequence[str]) -> None:
    """Leave with 1 where something differs, with 2 where nothing could be found out."""
    try:
        found = tell(arguments)
    except UserError:
        raise
    except Exception:  # any other would leave with 1, which says here that the data were read and differ
        log.exception("the check itself failed:")
        sys.exit(EXIT_USER_ERROR)
    if not found.is_sound():
        sys.exit(DIFFERENCES)


def tell(arguments: Sequence[str]) -> Findings:
    """Parse, read, print, write."""
    given = parse("Check the data of a config: counts, pictures, duplicates.", ["config"], arguments)
    if given.config is None:
        raise UserError("cliplab.check needs --config FILE")
    config = load_config(given.config, given.overrides)
    run_directory(config)  # what can't be written is told before everything is read
    found = check_data(config)
    console = report.console()
    console.print(counts_table(found, f"{config.data.name} in {config.data.root}"))
    unreadable = [f"{path}: {reason}" for path, reason in found.unreadable.items()]
    duplicates = [" = ".join(group) for group in found.duplicates]
    for what, lines in (("missing", found.missing), ("unreadable", unreadable), ("duplicate", duplicates)):
        console.print(f"{what}: {len(lines)}", style="bold" if lines else "", highlight=False)
        for line in lines[:LISTED]:
            console.print(f"  {line}", highlight=False, markup=False)
    path = Path(config.output_dir) / f"check-{config.name}.json"
    content = {"counts": found.counts, "differing": found.differing(), "pictures": found.pictures}
    content |= {"missing": found.missing, "unreadable": found.unreadable, "duplicates": found.duplicates}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content | {"manifest_hash": found.manifest_hash}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"output_dir={config.output_dir}: can't write {path}: {error}") from error
    console.print(
        f"{found.pictures:,} pictures read; manifest {found.manifest_hash}; all of it in {path}", highlight=False
    )
    return found


if __name__ == "__main__":
    run_script(main)
