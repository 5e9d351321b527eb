"""What a person reads in the terminal: what trains, and the table at the end."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cliplab.benchmark import metric_names
from cliplab.evaluation.audit import SHARES, SOLVED, Audit
from cliplab.published import PublishedRow, matching_rows
from cliplab.training.optim import ParameterGroup

STAND_IN_NOTICE = (
    "The pictures are STAND-INS, not the photographs the annotations describe: this run shows that the pipeline works; "
    "its recalls say nothing about retrieval quality and are not comparable with any published number."
)


def console(stderr: bool = False) -> Console:
    """Standard output, or error; wide enough for a table where it is no terminal."""
    plain = Console(stderr=stderr)
    return plain if plain.is_terminal else Console(stderr=stderr, width=160)


def parts_table(parts: Mapping[str, Sequence[Any]], groups: Sequence[ParameterGroup]) -> Table:
    """What trains, at which learning rate, and what is frozen."""
    table = Table(title="parameters")
    for column in ("part", "parameters", "trainable", "lr", "decayed"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, parameters in parts.items():
        if not parameters:
            continue
        own = [group for group in groups if group.part == part]
        trained = sum(p.numel() for group in own for p in group.parameters)
        decayed = sum(p.numel() for group in own if group.weight_decay for p in group.parameters)
        lr = f"{own[0].lr:g}" if own else "frozen"
        table.add_row(part, f"{sum(p.numel() for p in parameters):,}", f"{trained:,}", lr, f"{decayed:,}")
    return table


def results_table(results: Mapping[str, Any], name: str) -> Table:
    """One row per way of composing and per published row under the same protocol; one column per cell.

    Cells of our own run carry the 95 % bootstrap interval over queries.
    """
    protocol, data = results["protocol"], results["data"]
    table = Table(title=title_of(results, "recall"), caption=_caption(results), caption_justify="left")
    columns = _columns(results["metrics"], protocol)
    table.add_column("")
    for key in columns:
        table.add_column(key.removeprefix("test/").replace("/", "\n"), justify="right")
    table.add_row(
        escape(name), *(_cell(results["metrics"], results["intervals"], key) for key in columns), style="bold"
    )
    for label, metrics in results["baselines"].items():
        table.add_row(label, *(_cell(metrics, {}, key) for key in columns))
    if not data["stand_in_images"]:
        _add_published(table, columns, data["name"], protocol)
    return table


def title_of(results: Mapping[str, Any], what: str) -> str:
    """Data set, split and protocol of a run, and what is shown in percent."""
    protocol, data = results["protocol"], results["data"]
    stand_in = " | STAND-IN PICTURES" if data["stand_in_images"] else ""
    return f"{data['name']}, split {protocol['split']}, protocol {protocol['name']} ({what} in %){stand_in}"


def audit_table(audit: Audit, title: str, solved: str = SOLVED["hard"]) -> Table:
    """One row per benchmark and K: percent of the queries that one modality solves, that need both, and the rest.

    `solved` says when a query is.
    """
    meaning = "composer only: by neither alone, needs both; lost: by one alone, not by the composer; unsolved: by none"
    meaning += f"\nsolved at K: {solved}"
    table = Table(title=title, caption=meaning, caption_justify="left")
    table.add_column("")
    for share in SHARES:
        table.add_column(share.replace("_", " "), justify="right", style="bold" if share == "composer_only" else None)
    for name, shares in audit.items():
        if name == "mean" and len(audit) == 2:
            continue
        for kind, row in shares.items():
            table.add_row(f"{escape(name)} {kind}", *(f"{row[share]:.2f}" for share in SHARES))
    return table


def _columns(metrics: Mapping[str, float], protocol: Mapping[str, Any]) -> list[str]:
    """R@k per benchmark, the mean and accuracies; without the columns of a mean over a single benchmark."""
    kinds = metric_names(protocol["recall_at"], protocol.get("subset_at", ()), protocol.get("map_at", ()))
    keys = [key for key in metrics if key.split("/")[-1] in (*kinds, "Avg", "mean_per_class", "top1")]
    names = {key.split("/")[1] for key in keys if key.split("/")[-1] in kinds} - {"mean"}
    return keys if len(names) > 1 else [key for key in keys if "/mean/" not in key]


def _cell(metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]], key: str) -> str:
    if key not in metrics:
        return ""
    low_high = intervals.get(key)
    if low_high is None:
        return f"{metrics[key]:.2f}"
    low, high = (f"{value:.1f}" if value < 99.95 else "100" for value in low_high)
    return f"{metrics[key]:.2f}\n{low}-{high}"


def _caption(results: Mapping[str, Any]) -> str:
    protocol = results["protocol"]
    kept = "reference excluded" if protocol["exclude_reference"] else "reference kept"
    measured = f"gallery {protocol['gallery']}, {kept}, captions {protocol['caption_join']} ({protocol['query_unit']})"
    if protocol["hit"] == "class":
        measured = f"pictures among classes, R@k is top-k accuracy; prompts {protocol['caption_join']}"
    sizes = ", ".join(f"{k} {v['queries']}/{v['gallery']}" for k, v in results["data"]["benchmarks"].items())
    lines = [
        f"{measured}, ties {protocol['ties']}; queries/gallery: {sizes}; second line of a cell: 95 % bootstrap interval"
    ]
    if "linear_probe" in results:
        chosen = results["linear_probe"]
        lines.append(
            f"linear probe: strength {chosen['strength']:g} chosen with {chosen['validation_top1']:.2f} on validation, "
            "then fitted to train and validation"
        )
    left_out = {k: v["excluded"] for k, v in results["data"]["benchmarks"].items() if any(v["excluded"].values())}
    if left_out:
        lines.append(f"left out: {left_out}")
    empty = results["data"].get("empty_captions", {}).get(protocol["split"], 0)
    if empty:
        lines.append(f"empty captions in this split: {empty}")
    if results["data"]["stand_in_images"]:
        lines.append(STAND_IN_NOTICE)
    return "\n".join(lines)


def _add_published(table: Table, columns: list[str], benchmark: str, protocol: Mapping[str, Any]) -> None:
    rows = [(row, unknown) for row, unknown in matching_rows(benchmark, protocol) if row.split == protocol["split"]]
    for row, unknown in rows:
        metrics = published_metrics(row, columns)
        note = f"published{', ' + str(row.year) if row.year else ''}, {row.confidence}"
        note += f"; unknown: {', '.join(unknown)}" if unknown else ""
        table.add_row(
            f"{row.method} [{row.backbone}]\n  ({note})".replace("[", r"\["),
            *(_cell(metrics, {}, k) for k in columns),
            style="dim",
        )


def published_metrics(row: PublishedRow, columns: Collection[str]) -> dict[str, float]:
    """A published row in the keys of results.json, with the averages over the benchmarks that `columns` name.

    They are computed from the cells: printed ones disagree with their own cells in several papers.
    """
    metrics = row.metrics
    ours = {column.split("/")[1] for column in columns} - {"mean"}
    means: dict[str, float] = {}
    for kind in (column.split("/")[-1] for column in columns if column.startswith("test/mean/")):
        cells = [metrics[f"{name}/{kind}"] for name in sorted(ours) if f"{name}/{kind}" in metrics]
        if cells and len(cells) == len(ours):
            means[f"test/mean/{kind}"] = sum(cells) / len(cells)
    if {"test/mean/R@10", "test/mean/R@50"} <= means.keys():
        means["test/mean/Avg"] = (means["test/mean/R@10"] + means["test/mean/R@50"]) / 2
    for name in ours:
        if {f"{name}/R@5", f"{name}/Rsubset@1"} <= metrics.keys():
            means[f"test/{name}/Avg"] = (metrics[f"{name}/R@5"] + metrics[f"{name}/Rsubset@1"]) / 2
    return {f"test/{key}": value for key, value in metrics.items()} | means
