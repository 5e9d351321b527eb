"""The whole of sweep.py in processes of its own: killed, interrupted, called again."""

import csv
import io
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cliplab.sweeps import sweep as whole
from cliplab.sweeps.held import beside
from cliplab.sweeps.spec import load_spec
from tests.conftest import ROOT
from tests.sweeps.conftest import sweep_here
from tests.test_train import script

ROWS = """
config: {config}
overrides: {{trainer.max_epochs: 8}}
runs: {{combiner: {{}}}}
columns: {{R@10: test/mean/R@10, dress R@10: test/dress/R@10}}
"""


@pytest.fixture(scope="module")
def experiment(tiny_config, tmp_path_factory):
    """An experiment of one run, long enough to be hit in the middle, and its metrics without any interruption."""
    path = tmp_path_factory.mktemp("killed") / "killed.yaml"
    path.write_text(ROWS.format(config=tiny_config))
    return path, sweep_here(path, f"output_dir={path.parent / 'reference'}").metrics


def started(path: Path, output: Path) -> subprocess.Popen:
    """A sweep whose run has finished its first epoch."""
    command = [sys.executable, str(ROOT / "sweep.py"), "--config", str(path), f"output_dir={output}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until(lambda: (directory(output) / "checkpoints" / "last.ckpt").is_file(), 180)
    return process


def directory(output: Path) -> Path:
    return output / "killed" / "combiner" / "seed-0"


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def workers(output: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_text()
        except OSError:
            continue
        if "cliplab.sweeps.worker" in command and str(output) in command:
            found.append(int(entry.name))
    return found


def test_a_sweep_that_is_killed_with_its_worker_continues_from_the_last_epoch(experiment, tmp_path):
    path, reference = experiment
    process = started(path, tmp_path)
    (worker,) = workers(tmp_path)
    process.kill()
    os.kill(worker, signal.SIGKILL)
    process.wait()
    assert not (directory(tmp_path) / "results.json").exists(), "killed too late to test anything"
    checkpoint = (directory(tmp_path) / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    swept = sweep_here(path, f"output_dir={tmp_path}")
    assert swept.started == ["combiner, seed 0"] and swept.metrics == reference
    epochs = [line.split(",")[0] for line in (directory(tmp_path) / "metrics.csv").read_text().splitlines()[1:]]
    assert {"0", "1"} <= set(epochs) and (
        directory(tmp_path) / "checkpoints" / "last.ckpt"
    ).stat().st_mtime_ns > checkpoint
    assert not list(directory(tmp_path).parent.glob("seed-0.2*")), "nothing had to start afresh"


def test_a_worker_that_outlives_its_sweep_is_waited_for_and_not_doubled(experiment, tmp_path):
    path, reference = experiment
    process = started(path, tmp_path)
    process.kill()
    process.wait()
    assert len(workers(tmp_path)) == 1
    done = script("sweep", "--config", path, f"output_dir={tmp_path}", "output=csv")
    assert done.returncode == 0, done.stderr
    assert beside(directory(tmp_path), "log").read_text().count("results: ") == 1, "trained and tested once"
    row = next(csv.DictReader(io.StringIO(done.stdout)))
    assert float(row["R@10"]) == pytest.approx(reference["combiner, seed 0"]["test/mean/R@10"], rel=1e-5)
    again = sweep_here(path, f"output_dir={tmp_path}")
    assert again.started == [] and again.metrics == reference


def test_ctrl_c_stops_the_workers_and_the_next_call_completes(experiment, tmp_path):
    path, reference = experiment
    process = started(path, tmp_path)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "Give the same command again" in told and "Traceback" not in told
    assert workers(tmp_path) == []
    assert sweep_here(path, f"output_dir={tmp_path}").metrics == reference


def test_a_second_call_prints_the_table_in_seconds_without_training(finished):
    path, output = finished
    command = [sys.executable, "-X", "importtime", "sweep.py", f"--config={path}", f"output_dir={output}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([*command, "output=markdown"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "| combiner |" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "torch" in imported and not imported & {"lightning", "torchmetrics", "torchvision", "transformers"}
    # Of computing; a shared machine takes its time. An idle one needs 5 s from the command to the table.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10


def test_bad_input_is_one_message_and_code_2(tmp_path):
    path = tmp_path / "exp.yaml"
    path.write_text(f"config: {ROOT / 'configs/quickstart.yaml'}\nruns: {{a: {{}}, a: {{}}}}\ncolumns: {{a: b}}\n")
    done = script("sweep", "--config", path)
    assert done.returncode == 2 and "duplicate key a" in done.stderr and "Traceback" not in done.stderr
    assert script("sweep").returncode == 2


def test_help_lists_the_experiments():
    done = script("sweep", "--help")
    assert "experiments/wardrobe_protocols.yaml" in done.stdout and "src/cliplab/sweeps/spec.py" in done.stdout


def test_run_false_shows_what_is_there_and_runs_nothing(finished, capsys):
    path, output = finished
    assert whole.sweep(load_spec(path, [f"output_dir={output}", "run=false", "seeds=[0,5]", "output=csv"])) == 0
    rows = {row["row"]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert rows["tirg"]["seeds"] == "1" and rows["tirg"]["note"] == "seed 5 not run yet"


def test_a_failed_row_is_exit_code_1_beside_the_table(tiny_config, tmp_path, capsys):
    path = tmp_path / "exp.yaml"
    text = ROWS.format(config=tiny_config).replace("{}", "{trainer.precision: '17'}")
    path.write_text(text)
    assert whole.sweep(load_spec(path, [f"output_dir={tmp_path / 'out'}", "output=csv"])) == 1
    told = capsys.readouterr()
    row = next(csv.DictReader(io.StringIO(told.out)))
    log = tmp_path / "out" / "exp" / "combiner" / "seed-0.log"
    assert row["R@10"] == "" and row["note"].startswith(f"seed 0 FAILED: {log}: error: trainer: ")
    assert "failed" in told.err
