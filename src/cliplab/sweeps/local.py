"""Runs as processes of this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cliplab.sweeps.held import beside
from cliplab.sweeps.plan import Run

PATIENCE = 30.0  # seconds that a stopped worker may take to leave


class Local:
    """At most `jobs` workers at once, each with its log; on several GPUs each takes its own ones."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._going: dict[int, tuple[Run, subprocess.Popen[bytes]]] = {}  # by slot

    @property
    def free(self) -> int:
        """How many more may start."""
        return self.jobs - len(self._going)

    def start(self, runs: Sequence[Run]) -> None:
        """Start a worker for each."""
        for run in runs:
            slot = next(slot for slot in range(self.jobs) if slot not in self._going)
            self._going[slot] = run, start_worker(run.directory, gpus_of(slot, run.config.trainer.devices))

    def ended(self) -> list[Run]:
        """Those whose worker has left since the last call."""
        slots = [slot for slot, (_, process) in self._going.items() if process.poll() is not None]
        return [self._going.pop(slot)[0] for slot in slots]

    def stop(self) -> str:
        """Stop all: a training keeps its last epoch. Says how things stand."""
        for _, process in self._going.values():
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + PATIENCE
        for _, process in self._going.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        self._going.clear()
        return "stopped; finished runs and the last epoch of the others are kept"


def start_worker(
    directory: Path, environment: Mapping[str, str], before: Callable[[], object] | None = None
) -> subprocess.Popen[bytes]:
    """The worker of the request beside a run directory; what it prints is added to the log there.

    It has a session of its own, so that Ctrl-C reaches it once, from `stop`. `before` is called in it first.
    """
    command = [sys.executable, "-m", "cliplab.sweeps.worker", str(beside(directory, "request.json"))]
    with beside(directory, "log").open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=before,
        )


def gpus_of(slot: int, devices: int) -> dict[str, str]:
    """The environment of the worker in a slot: where there are GPUs for several, it sees those of its own."""
    import torch

    environment = dict(os.environ)
    named = environment.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    there = named.split(",") if named else [str(gpu) for gpu in range(count)]
    if count > devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(
            there[(slot * devices + number) % count] for number in range(devices)
        )
    return environment
