"""Runs as jobs of a SLURM cluster: an array per batch of runs, requeued on preemption by submitit.

A job starts the same worker as a local sweep does. What has become of a job is asked of squeue; what has become of its
run is read from the run's directory.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import Checkpointable, DelayedSubmission

from cliplab.errors import UserError
from cliplab.results import write_json
from cliplab.sweeps.held import beside, read_json
from cliplab.sweeps.identity import digest
from cliplab.sweeps.local import start_worker
from cliplab.sweeps.plan import Run

ASKED_EVERY = 2.0  # seconds between two questions to squeue
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "GONE"}


class WorkerJob(Checkpointable):
    """What a job does: start the worker and wait. Preempted, it stops the worker and asks to be started again."""

    def __init__(self) -> None:
        self._worker: subprocess.Popen[bytes] | None = None

    def __call__(self, directory: str) -> int:
        """The exit code of the worker of a run directory."""
        # Without SLURM's variables the worker starts its own processes, one per device, as it does anywhere.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        self._worker = start_worker(Path(directory), environment, _ignore_preemption)
        return self._worker.wait()

    def checkpoint(self, directory: str) -> DelayedSubmission:
        """Called by submitit on preemption and before a time limit; the worker's last epoch is on disk."""
        if self._worker is not None:
            self._worker.kill()
        return DelayedSubmission(WorkerJob(), directory)


class Slurm:
    """Submits to the cluster and watches; jobs go on without the sweep, and the next one finds them again."""

    free = 10_000  # the cluster's own limits hold; `array_parallelism` sets one

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self._going: dict[str, Run] = {}  # by job
        self._asked = 0.0
        given = dict(options)
        limit = {"slurm_max_num_timeout": given.pop("max_num_timeout")} if "max_num_timeout" in given else {}
        try:
            self._executor = submitit.AutoExecutor(folder, cluster="slurm", **limit)
            self._executor.update_parameters(name=folder.parent.name, **given)
        except RuntimeError as error:
            raise UserError(f"executor=slurm: {error}") from error
        except (NameError, TypeError, ValueError, AssertionError) as error:
            raise UserError(f"slurm: {error}") from error

    def start(self, runs: Sequence[Run]) -> None:
        """One array of jobs; a run whose job is in the queue already is waited for."""
        new = []
        for run in runs:
            job = self._job_of(run)
            if job is None:
                new.append(run)
            else:
                self._going[job] = run
        if not new:
            return
        try:
            jobs = self._executor.map_array(WorkerJob(), [str(run.directory.resolve()) for run in new])
        except (FailedJobError, FailedSubmissionError) as error:
            raise UserError(f"SLURM refused the jobs: {error}") from error
        for run, job in zip(new, jobs, strict=True):
            identity = digest(_identity_asked(run))
            write_json(beside(run.directory, "job.json"), {"id": job.job_id, "identity": identity})
            self._going[job.job_id] = run

    def ended(self) -> list[Run]:
        """Those whose job is over since the last call."""
        if not self._going or time.monotonic() < self._asked + ASKED_EVERY:
            return []
        self._asked = time.monotonic()
        states = states_of(list(self._going))
        return [self._going.pop(job) for job, state in states.items() if state in OVER]

    def stop(self) -> str:
        """Leave the jobs where they are. Says how things stand."""
        jobs = " ".join(self._going)
        self._going.clear()
        return f"the jobs {jobs} stay in the queue and the next call waits for them; `scancel {jobs}` stops them"

    def _job_of(self, run: Run) -> str | None:
        """The job of an earlier sweep that is still to do this run; one that would do another is cancelled."""
        noted = read_json(beside(run.directory, "job.json"))
        if noted is None or states_of([str(noted.get("id"))])[str(noted.get("id"))] in OVER:
            return None
        if noted.get("identity") == digest(_identity_asked(run)):
            return str(noted["id"])
        subprocess.run(["scancel", str(noted["id"])], check=False, capture_output=True)
        return None


def states_of(jobs: Sequence[str]) -> dict[str, str]:
    """Job -> its state in SLURM's words, GONE where the cluster knows it no longer, UNKNOWN where it can't be asked."""
    states: dict[str, str] = {}
    for array in {job.partition("_")[0] for job in jobs}:
        command = ["squeue", "--noheader", "--array", "--states", "all", "--jobs", array, "--format", "%i %T"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        known = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line.strip())
        absent = "GONE" if done.returncode == 0 or "Invalid job id" in done.stderr else "UNKNOWN"
        states |= {job: known.get(job, absent) for job in jobs if job.partition("_")[0] == array}
    return states


def _identity_asked(run: Run) -> dict[str, Any]:
    request = read_json(beside(run.directory, "request.json"))
    assert request is not None, "the sweep writes a request before it starts a run"
    return request["identity"]


def _ignore_preemption() -> None:
    """SLURM signals all processes of a job: those signals are for submitit."""
    for each in (signal.SIGUSR1, signal.SIGUSR2):
        with contextlib.suppress(OSError):
            signal.signal(each, signal.SIG_IGN)
