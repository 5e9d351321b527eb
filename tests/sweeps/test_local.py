import os
import signal
import subprocess
import sys
import time

import pytest

from cliplab.config import Config
from cliplab.sweeps import local
from cliplab.sweeps.held import beside
from cliplab.sweeps.local import Local, gpus_of, start_worker
from cliplab.sweeps.plan import Run


def runs_in(tmp_path, count):
    runs = [Run(str(n), Config(name=f"exp/{n}/seed-0", output_dir=str(tmp_path))) for n in range(count)]
    for run in runs:
        run.directory.parent.mkdir(parents=True)
    return runs


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


@pytest.fixture
def sleepers(monkeypatch):
    """Workers that sleep: their processes, as they were started."""
    started = []

    def start(directory, environment, before=None):
        code = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); time.sleep(60)"
        started.append(subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL))
        return started[-1]

    monkeypatch.setattr(local, "start_worker", start)
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_slots_are_taken_and_given_back(tmp_path, sleepers):
    executor, runs = Local(2), runs_in(tmp_path, 3)
    executor.start(runs[:2])
    assert executor.free == 0 and executor.ended() == []
    sleepers[0].kill()
    sleepers[0].wait()
    assert executor.ended() == [runs[0]] and executor.free == 1 and executor.ended() == []
    executor.start(runs[2:])
    assert executor.free == 0


def test_stopping_interrupts_all_and_kills_what_does_not_leave(tmp_path, sleepers, monkeypatch):
    executor = Local(2)
    executor.start(runs_in(tmp_path, 2))
    monkeypatch.setattr(local, "PATIENCE", 1.0)
    os.kill(sleepers[1].pid, signal.SIGSTOP)  # hears no SIGINT
    time.sleep(0.3)  # the other one has set up its handler
    assert "last epoch" in executor.stop()
    until(lambda: all(process.poll() is not None for process in sleepers))
    assert sleepers[1].returncode == -signal.SIGKILL and sleepers[0].returncode != -signal.SIGKILL


def test_a_worker_adds_to_its_log_and_survives_ctrl_c_of_the_terminal(tmp_path):
    (run,) = runs_in(tmp_path, 1)
    beside(run.directory, "log").write_text("earlier\n")
    process = start_worker(run.directory, dict(os.environ))
    assert os.getsid(process.pid) == process.pid != os.getsid(0)
    assert process.wait(60) == 2
    log = beside(run.directory, "log").read_text()
    assert log.startswith("earlier\n") and "error: can't read the request" in log


@pytest.mark.parametrize(
    ("count", "named", "slot", "devices", "seen"),
    [
        (0, None, 1, 1, None),
        (1, None, 1, 1, None),
        (4, None, 1, 1, "1"),
        (4, None, 5, 1, "1"),
        (4, None, 1, 2, "2,3"),
        (2, "6,7", 1, 1, "7"),
        (2, "6,7", 0, 2, "6,7"),
    ],
)
def test_each_worker_sees_gpus_of_its_own(monkeypatch, count, named, slot, devices, seen):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpus_of(slot, devices).get("CUDA_VISIBLE_DEVICES") == seen
