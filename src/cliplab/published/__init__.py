"""Published numbers as data: what others printed, with its source, our confidence in it, and its protocol.

One YAML file per benchmark lies beside this module; its header explains the fields. A published number may be shown
beside ours only where `matching_rows` returns it, and then with the names of the protocol fields that are unknown.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

FIELDS = (
    "gallery",
    "exclude_reference",
    "caption_join",
    "query_unit",
    "prompt",
    "captions_per_image",
    "ties",
    "missing_images",
)


@dataclass(frozen=True)
class PublishedRow:
    """One published result in percent, its metrics named as in results.json without the `test/`.

    `protocol` holds FIELDS (None = unknown) and `label`, the source's grouping.
    """

    benchmark: str
    split: str
    method: str
    backbone: str
    metrics: dict[str, float]
    protocol: dict[str, object]
    source: str
    confidence: str
    year: int | None = None
    printed_average: dict[str, float] | None = None
    note: str | None = None


def load_published(benchmark: str) -> list[PublishedRow]:
    """Return the published rows of a benchmark in file order; a benchmark that has no file has no rows."""
    return list(_read(benchmark))


@dataclass(frozen=True)
class Edition:
    """Counts of a released data set, in the words of its `counts()`."""

    edition: str
    confidence: str
    counts: dict[str, Any]


def published_counts(benchmark: str) -> list[Edition]:
    """Return the editions of a data set; one that nobody published has none."""
    import yaml

    editions = yaml.safe_load(files(__name__).joinpath("counts.yaml").read_text(encoding="utf-8"))
    return [Edition(**row) for row in editions.get(benchmark, [])]


def differing_fields(row: PublishedRow, protocol: Mapping[str, object]) -> tuple[str, ...]:
    """Name the fields whose published value is known and is not ours."""
    return tuple(name for name in FIELDS if row.protocol[name] not in (None, _ours(protocol, name)))


def matching_rows(benchmark: str, protocol: Mapping[str, object]) -> list[tuple[PublishedRow, tuple[str, ...]]]:
    """Return the rows whose known fields (at least one) all equal ours, each with the names of its unknown fields.

    A field that is None in `protocol` does not apply to us and is not reported as unknown. The split of a row is not
    a protocol field: compare `row.split` as well.
    """
    return [
        (row, _unknown_fields(row, protocol))
        for row in _read(benchmark)
        if any(row.protocol[name] is not None for name in FIELDS) and not differing_fields(row, protocol)
    ]


def _unknown_fields(row: PublishedRow, protocol: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(name for name in FIELDS if row.protocol[name] is None and _ours(protocol, name) is not None)


def _ours(protocol: Mapping[str, object], name: str) -> object:
    """Our value of a field, None where it does not apply; of captioned images, no number of captions means all."""
    value = protocol.get(name)
    is_all = name == "captions_per_image" and value is None and protocol.get("hit") == "any_positive"
    return "all" if is_all else value


@cache
def _read(benchmark: str) -> tuple[PublishedRow, ...]:
    # Imported here, because this module is imported where no published number is asked for.
    import yaml

    file = files(__name__).joinpath(f"{benchmark}.yaml")
    if not file.is_file():
        return ()
    rows = yaml.safe_load(file.read_text(encoding="utf-8"))
    for row in rows:  # the files of data sets with one benchmark leave its name out
        row["metrics"] = {
            f"{benchmark}/{k}" if k.partition("@")[0].isalpha() else k: v for k, v in row["metrics"].items()
        }
        row["protocol"] = dict.fromkeys(FIELDS) | row["protocol"]
    return tuple(PublishedRow(**row) for row in rows)
