"""Rankings for the test servers of CIRR and CIRCO: written, checked, and on a validation set scored.

python -m cliplab.evaluation.submissions check --benchmark cirr FILE [FILE] [--annotations FILE]
python -m cliplab.evaluation.submissions score --benchmark circo --annotations FILE FILE
"""

import argparse
import json
import re
import sys
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from cliplab.data import circo, cirr
from cliplab.data.dataset import read_json
from cliplab.errors import UserError
from cliplab.evaluation.evaluator import RankedBenchmark
from cliplab.evaluation.truth import SUBMITTED_IN_SUBSET

CIRR_KINDS = {"recall": 50, "recall_subset": SUBMITTED_IN_SUBSET}  # metric -> names per query
CIRR_QUERIES = 4148
CIRR_BYTES = 5_000_000
CIRCO_QUERIES = {"test": 800, "val": 220}
CIRCO_DEPTH = 50
MAP_AT = (5, 10, 25, 50)
_CIRR_NAME = re.compile(r"test1(-\d+)+-img\d+")

_UNREAD = {
    "cirr": " (pairids and names were not compared; --annotations cap.rc2.test1.json does that)",
    "circo": " (ids were not compared; --annotations image_info_unlabeled2017.json does that)",
}

Rankings = Mapping[str, Sequence[Any]]


def write_submission(folder: Path, ranked: RankedBenchmark) -> list[Path]:
    """What the test server of a blind benchmark takes: CIRR's pair of files where it has subsets, else CIRCO's file.

    CIRR's server refuses the reference among the predictions, whatever the protocol says of it.
    """
    benchmark = ranked.benchmark
    references = benchmark.references() if benchmark.subsets is not None else [-1] * len(benchmark.query_names)
    ids, names = list(benchmark.gallery["id"]), benchmark.query_names
    depth = CIRCO_DEPTH if benchmark.subsets is None else CIRR_KINDS["recall"]
    rankings: dict[str, list[str]] = {}
    for start in range(0, len(names), 512):
        asked = list(range(start, min(start + 512, len(names))))
        for query_id, rows in zip(asked, ranked.nearest(asked, depth + 1).tolist(), strict=True):
            rankings[names[query_id]] = [ids[row] for row in rows if row != references[query_id]][:depth]
    if benchmark.subsets is None:
        return write_circo(folder, rankings)
    within = {
        name: [ids[row] for row in ranked.nearest_in_subset(query_id, CIRR_KINDS["recall_subset"])]
        for query_id, name in enumerate(names)
    }
    return write_cirr(folder, rankings, within)


def write_cirr(folder: Path, recall: Rankings, recall_subset: Rankings) -> list[Path]:
    """The two files of CIRR's server: pairid -> 50 and 3 image names, best first."""
    files = []
    for metric, rankings in (("recall", recall), ("recall_subset", recall_subset)):
        content = {"version": "rc2", "metric": metric, **{key: list(names) for key, names in rankings.items()}}
        files.append(_write(folder / f"cirr_{metric}.json", content))
    return files


def write_circo(folder: Path, rankings: Rankings) -> list[Path]:
    """The file of CIRCO's server: query id -> 50 image ids, best first."""
    return [_write(folder / "circo.json", {key: [int(name) for name in names] for key, names in rankings.items()})]


def check_cirr(path: Path, annotations: Path | None = None) -> str:
    """Which of the two files it is. Raises UserError naming file and pairid for what the server would refuse.

    With `annotations` (cap.rc2.test1.json) the pairids, the references and the subsets are compared as well.
    """
    content = _read(path)
    metric = content.pop("metric", None)
    if not isinstance(metric, str) or metric not in CIRR_KINDS:
        raise UserError(f"{path}: 'metric' must be recall or recall_subset, found {metric!r}")
    if content.pop("version", None) != "rc2":
        raise UserError(f"{path}: 'version' must be rc2")
    if path.stat().st_size > CIRR_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes, more than {CIRR_BYTES}")
    rows = cirr.read_records(annotations, has_target=False) if annotations is not None else []
    records = {str(record.pairid): record for record in rows}
    known = {name for record in rows for name in record.members}
    if annotations is not None and not records:
        raise UserError(f"{annotations} holds no records")
    _check_keys(path, content, records, CIRR_QUERIES, "pairid")
    for key, names in content.items():
        where = f"{path}: pairid {key}"
        _check_ranking(where, names, CIRR_KINDS[metric], str)
        wrong = [name for name in names if not _CIRR_NAME.fullmatch(name)]
        if wrong:
            raise UserError(f"{where}: '{wrong[0]}' is no image name (like test1-147-1-img1, no folder, no extension)")
        if not key.isdecimal():
            raise UserError(f"{where}: a pairid is a number")
        if key in records:
            _check_cirr_names(where, names, records[key], metric)
            unknown = [name for name in names if name not in known]
            if unknown:
                raise UserError(f"{where}: '{unknown[0]}' is no image of test1")
    return metric


def _check_cirr_names(where: str, names: Sequence[str], record: cirr.Record, metric: str) -> None:
    if record.reference in names:
        raise UserError(f"{where}: the reference '{record.reference}' must not be predicted")
    outside = [name for name in names if name not in record.members]
    if metric == "recall_subset" and outside:
        raise UserError(f"{where}: '{outside[0]}' is no member of the query's subset")


def check_circo(path: Path, annotations: Path | None = None) -> str:
    """`val` or `test`. Raises UserError naming file and query for what the server would refuse.

    `annotations` is image_info_unlabeled2017.json: then every id must be in the gallery.
    """
    content = _read(path)
    split = "val" if 2 * len(content) <= sum(CIRCO_QUERIES.values()) else "test"
    _check_keys(path, content, {str(number): None for number in range(CIRCO_QUERIES[split])}, None, "query")
    gallery = {*circo.read_gallery(annotations)} if annotations is not None else None
    _check_circo_rankings(path, content, gallery)
    return split


def _check_circo_rankings(path: Path, content: Rankings, gallery: Container[int] | None = None) -> None:
    """Raise UserError unless every query has 50 different ids of images, of the gallery where that is known."""
    for key, ids in content.items():
        _check_ranking(f"{path}: query {key}", ids, CIRCO_DEPTH, int)
        unknown = [number for number in ids if number < 0 or (gallery is not None and number not in gallery)]
        if unknown:
            raise UserError(f"{path}: query {key}: {unknown[0]} is no image of the gallery")


def score_circo(path: Path, annotations: Path) -> dict[str, float]:
    """mAP@K and R@K in percent, and mAP@10 by semantic aspect, of a ranking of the validation queries.

    AP@K = 1 / min(|GT|, K) sum_k P@k rel(k); R@K looks at target_img_id alone (Baldrati et al., 2023). Raises UserError
    for a ranking that the server would refuse, such as one of fewer than 50 ids.
    """
    records = circo.read_records(annotations, has_target=True)
    rankings = _read(path)
    if not records:
        raise UserError(f"{annotations} holds no queries")
    _check_keys(path, rankings, {str(record.id): None for record in records}, None, "query")
    _check_circo_rankings(path, rankings)
    scores: dict[str, list[float]] = {}
    for record in records:
        ids = rankings[str(record.id)]
        for k in MAP_AT:
            scores.setdefault(f"mAP@{k}", []).append(average_precision(ids, record.relevant, k))
            scores.setdefault(f"R@{k}", []).append(float(record.target in ids[:k]))
        for aspect in record.aspects:
            scores.setdefault(f"mAP@10/{aspect}", []).append(average_precision(ids, record.relevant, 10))
    return {key: 100 * sum(values) / len(values) for key, values in scores.items()}


def average_precision(ranking: Sequence[Any], relevant: Sequence[Any], k: int) -> float:
    """AP@k of a ranking, best first: 1 / min(|relevant|, k) times the precision at each hit among the first k."""
    hits, total = 0, 0.0
    for place, name in enumerate(ranking[:k], 1):
        if name in relevant:
            hits += 1
            total += hits / place
    return total / min(len(relevant), k)


def _check_keys(
    path: Path, content: Mapping[str, Any], expected: Mapping[str, Any], count: int | None, kind: str
) -> None:
    missing = [key for key in expected if key not in content]
    unknown = [key for key in content if expected and key not in expected]
    if missing or unknown:
        what = f"lacks the {kind} {missing[0]}" if missing else f"has an unknown {kind} {unknown[0]}"
        raise UserError(f"{path} {what} ({len(missing)} missing, {len(unknown)} unknown)")
    if count is not None and len(content) != count:
        raise UserError(
            f"{path} has {len(content)} queries, the server expects {count}: a {kind} is missing or too many"
        )


def _check_ranking(where: str, names: Any, count: int, kind: type) -> None:
    if not isinstance(names, list) or not all(isinstance(name, kind) and not isinstance(name, bool) for name in names):
        raise UserError(f"{where} must be a list of {'image names' if kind is str else 'image ids (numbers)'}")
    if len(names) != count:
        raise UserError(f"{where} has {len(names)} predictions, {count} are expected")
    if len(set(names)) < len(names):
        raise UserError(f"{where} predicts {next(n for n in names if names.count(n) > 1)!r} more than once")


def _read(path: Path) -> Any:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")
    return content


def _write(path: Path, content: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
    return path


def main(arguments: Sequence[str]) -> None:
    """The two commands."""
    parser = argparse.ArgumentParser(prog="python -m cliplab.evaluation.submissions", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, benchmarks in (("check", ["cirr", "circo"]), ("score", ["circo"])):
        command = commands.add_parser(name)
        command.add_argument("--benchmark", required=True, choices=benchmarks)
        command.add_argument("--annotations", type=Path, required=name == "score", metavar="FILE")
        command.add_argument("files", type=Path, nargs="+", metavar="FILE")
    given = parser.parse_args(list(arguments))
    if given.command == "score":
        for path in given.files:
            sys.stdout.write(json.dumps(score_circo(path, given.annotations)) + "\n")
        return
    for line in _checked(given.benchmark, given.files, given.annotations):
        sys.stdout.write(f"{line}\n")


def _checked(benchmark: str, files: Sequence[Path], annotations: Path | None) -> list[str]:
    """A line per file. Raises UserError for a file the server would refuse, and for one of CIRR's two given twice."""
    check = check_cirr if benchmark == "cirr" else check_circo
    files_by_kind: dict[str, Path] = {}
    lines = []
    for path in files:
        kind = check(path, annotations)
        if benchmark == "cirr" and kind in files_by_kind:
            raise UserError(
                f"{files_by_kind[kind]} and {path} are both the file of the metric {kind}: give one of each"
            )
        files_by_kind[kind] = path
        lines.append(f"{path}: ok, {kind}{_UNREAD[benchmark] if annotations is None else ''}")
    return lines


if __name__ == "__main__":
    from cliplab.cli import run_script

    run_script(main)
