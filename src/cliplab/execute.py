"""Run what was built: fit, test, write results.json, print the table."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L

from cliplab import build, charts, report
from cliplab.config import Config
from cliplab.data.dataset import RetrievalDataset
from cliplab.evaluation.audit import SHARES, SOLVED, modality_audit
from cliplab.evaluation.bootstrap import bootstrap_intervals
from cliplab.evaluation.evaluator import RankedBenchmark
from cliplab.evaluation.metrics import with_mean
from cliplab.evaluation.submissions import write_submission
from cliplab.models.checkpoints.weights import load_strictly
from cliplab.results import write_json, write_ranks, write_results
from cliplab.run import RunDirectory, claim_run, find_run, read_checkpoint, run_directory
from cliplab.trainer import build_evaluator, build_trainer
from cliplab.training.failures import shared_failures
from cliplab.training.loggers import read_curves
from cliplab.training.module import RetrievalModule

log = logging.getLogger(__name__)


def train(config: Config, dataset: RetrievalDataset) -> None:
    """Train, test the best checkpoint, leave a complete run directory."""
    started = time.perf_counter()
    run = find_run(config)
    L.seed_everything(config.seed, workers=True, verbose=False)
    model, built_from = build.build_model(config)
    datamodule = build.build_datamodule(config, dataset, model, built_from)
    module = build.build_module(config, model, built_from)
    if run.resume_from is not None:
        load_checkpoint(module, run.resume_from)  # says what is wrong with it before the Trainer stumbles over it
    trainer = build_trainer(config, run)
    if trainer.is_global_zero:
        report.console().print(report.parts_table(model.part_parameters(), module.groups()))
    claim_run(run, config)
    seconds = {"set-up": time.perf_counter() - started}
    with shared_failures(trainer):
        with timed(seconds, "fit"):
            trainer.fit(module, datamodule, ckpt_path=run.resume_from, weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        selected = run.best if run.best.is_file() else run.last
        load_checkpoint(module, selected)
        with timed(seconds, "test"):
            trainer.test(module, datamodule, verbose=False)
    if trainer.is_global_zero:
        selection = f"best {config.trainer.monitor}" if selected == run.best else "last weights"
        finish(run, config, module, dataset, seconds, checkpoint=selected, selection=selection)


def evaluate(
    config: Config,
    dataset: RetrievalDataset,
    checkpoint: Path | None,
    stored: dict[str, Any] | None,
    run: RunDirectory | None = None,
) -> None:
    """Test a checkpoint (or, without one, the weights of the config) and leave results.json, ranks and pictures.

    They go to `run`, or else beside the checkpoint.
    """
    started = time.perf_counter()
    L.seed_everything(config.seed, workers=True, verbose=False)
    model, built_from = build.build_model(config, stored and stored["hyper_parameters"]["built_from"])
    module = build.build_module(config, model, built_from, train=False)
    if stored is not None:
        load_strictly(module, stored["state_dict"], str(checkpoint))
    datamodule = build.build_datamodule(config, dataset, model, built_from, train=False)
    run = run or RunDirectory(evaluation_folder(config, datamodule.protocol.name, checkpoint))
    trainer = build_evaluator(config, run)
    seconds = {"set-up": time.perf_counter() - started}
    with shared_failures(trainer), timed(seconds, "test"):
        trainer.test(module, datamodule, verbose=False)
    if trainer.is_global_zero:
        run.path.mkdir(parents=True, exist_ok=True)
        finish(run, config, module, dataset, seconds, checkpoint=checkpoint, selection="given")


def load_checkpoint(module: RetrievalModule, path: Path) -> None:
    """Put the weights of a run's checkpoint into its module."""
    load_strictly(module, read_checkpoint(path)["state_dict"], str(path))


def evaluation_folder(config: Config, protocol: str, checkpoint: Path | None) -> Path:
    """RUN/eval/DATA-PROTOCOL, with the name of a checkpoint that is not the best of its run."""
    name = f"{config.data.name}-{protocol}"
    if checkpoint is None:
        run = run_directory(config).path
    elif checkpoint.parent.name == "checkpoints":
        run = checkpoint.parent.parent
        name = name if checkpoint.stem == "best" else f"{name}-{checkpoint.stem}"
    else:
        run, name = checkpoint.parent, f"{name}-{checkpoint.stem}"
    return run / "eval" / "".join(c if c.isalnum() or c in "-_=.," else "_" for c in name)


class timed:  # noqa: N801 - reads as a statement
    """`with timed(seconds, "fit"):` adds the wall-clock seconds of the block."""

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self.seconds, self.phase = seconds, phase

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.seconds[self.phase] = time.perf_counter() - self.started


def finish(
    run: RunDirectory,
    config: Config,
    module: RetrievalModule,
    dataset: RetrievalDataset,
    seconds: dict[str, float],
    **origin: Any,
) -> None:
    """Write ranks, audit.json and results.json, print the tables, draw the charts."""
    own = module.outcome[""]
    told = {
        "seconds": {phase: round(value, 2) for phase, value in seconds.items()},
        "checkpoint": str(origin["checkpoint"]) if origin["checkpoint"] else None,
        "selection": origin["selection"],
    }
    if any(ranked.benchmark.blind for ranked in own.values()):
        files = [str(file) for ranked in own.values() for file in write_submission(run.path / "submission", ranked)]
        write_results(run.results, {**_setting(config, module, dataset), **told, "submission": files, "metrics": {}})
        left_out = sum(ranked.benchmark.excluded.get("queries", 0) for ranked in own.values())
        if left_out:
            log.warning("%d queries were left out for missing pictures: the test server will refuse this", left_out)
        report.console().print(f"targets are known to the test server alone; to submit: {', '.join(files)}")
        return
    for name, ranked in own.items():
        ranks = {"rank": ranked.ranks_under_protocol().tolist(), "ties": ranked.ranks.ties.tolist()}
        told_by_rank = ranked.full_grade is None  # whether R@K is
        others = [k for k in ranked.per_query if not (told_by_rank and k.startswith("R@"))]
        ranks |= {kind: ranked.per_query[kind].tolist() for kind in others}
        write_ranks(run.path / "ranks" / f"{name}.csv", ranked.benchmark.query_names, ranks)
    content = results_of(config, module, dataset) | told
    solved = SOLVED[content["protocol"]["target"]]
    if content["audit"]:
        write_json(run.path / "audit.json", {"meaning": SHARES, "solved": solved, "percent": content["audit"]})
    write_results(run.results, content)
    console = report.console()
    composed = config.model.composer is not None and content["protocol"]["hit"] == "single_target"
    label = config.model.composer["name"] if composed and config.model.composer else config.model.arch
    console.print(report.results_table(content, label))
    if content["audit"]:
        title = report.title_of(content, "modality audit: queries")
        console.print(report.audit_table(content["audit"], title, solved))
    draw_charts(run, content)
    pictures = run.path / "pictures"
    shown = f"   pictures: {pictures}" if any(pictures.glob("*.png")) else ""
    console.print(f"results: {run.results}{shown}", style="dim", highlight=False)


def draw_charts(run: RunDirectory, content: dict[str, Any]) -> None:
    """audit.png where composed queries were audited, curves.png where something was trained."""
    audit, metrics = content["audit"], run.path / "metrics.csv"
    if audit:
        title = report.title_of(content, "modality audit: queries")
        charts.save_chart(lambda: charts.audit_figure(audit, title), run.path / "audit.png")
    if metrics.is_file():
        charts.save_chart(lambda: charts.curves_figure(read_curves(metrics), run.path.name), run.path / "curves.png")


def results_of(config: Config, module: RetrievalModule, dataset: RetrievalDataset) -> dict[str, Any]:
    """The measured part of results.json."""
    metrics = {label: _flat_metrics(ranked) for label, ranked in module.outcome.items()}
    probed = {}
    if module.probe is not None:
        metrics[""]["test/linear_probe/top1"] = module.probe.test_accuracy
        chosen = {"strength": module.probe.strength, "validation_top1": module.probe.validation_accuracy}
        probed = {"linear_probe": chosen}
    own = module.outcome[""]
    recall_at = next(iter(own.values())).benchmark.protocol.recall_at
    solved = {label: {n: r.solved_from() for n, r in ways.items()} for label, ways in module.outcome.items()}
    intervals = bootstrap_intervals({name: ranked.per_query for name, ranked in own.items()}, config.seed)
    return {
        "metrics": metrics.pop(""),
        "baselines": metrics,
        **probed,
        "audit": modality_audit(solved, recall_at),
        "intervals": {f"test/{key}": value for key, value in intervals.items()},
        **_setting(config, module, dataset),
    }


def _setting(config: Config, module: RetrievalModule, dataset: RetrievalDataset) -> dict[str, Any]:
    """What was measured, under which protocol."""
    own = module.outcome[""]
    benchmarks = {
        name: {
            "queries": len(ranked.benchmark.positives),
            "gallery": len(ranked.gallery),
            "excluded": dict(ranked.benchmark.excluded),
        }
        for name, ranked in own.items()
    }
    protocol = next(iter(own.values())).benchmark.protocol
    return {
        "protocol": {**protocol.as_dict(), "split": dataset.test_split},
        "config": asdict(config),
        "data": {**dataset.summary(), "benchmarks": benchmarks},
    }


def _flat_metrics(ranked: dict[str, RankedBenchmark]) -> dict[str, float]:
    return {f"test/{key}": value for key, value in with_mean({n: r.metrics for n, r in ranked.items()}).items()}
