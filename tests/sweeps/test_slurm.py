"""The executor of clusters: beside a squeue that says what it is told to, and on a real single-node SLURM."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from cliplab.config import Config
from cliplab.errors import UserError
from cliplab.results import write_json
from cliplab.sweeps import slurm
from cliplab.sweeps.held import beside
from cliplab.sweeps.identity import digest
from cliplab.sweeps.plan import Run
from cliplab.sweeps.slurm import Slurm, WorkerJob, states_of
from tests.sweeps.conftest import sweep_here
from tests.test_train import script

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
needs_slurm = pytest.mark.skipif(
    any(shutil.which(name) is None for name in DAEMONS) or getpass.getuser() != "root",
    reason="needs root and the packages slurmctld slurmd slurm-client munge",
)


@pytest.fixture
def squeue(monkeypatch):
    """What squeue says: lines, exit code, message; and the commands that were given."""
    said = {"stdout": "", "returncode": 0, "stderr": ""}
    given = []

    def run(command, **kwargs):
        given.append(command)
        return subprocess.CompletedProcess(command, said["returncode"], said["stdout"], said["stderr"])

    monkeypatch.setattr(slurm.subprocess, "run", run)
    return said, given


def test_states_are_squeue_s_and_a_job_it_does_not_know_is_gone(squeue):
    said, given = squeue
    said["stdout"] = "12_0 RUNNING\n12_1 COMPLETED\n"
    assert states_of(["12_0", "12_1", "12_2"]) == {"12_0": "RUNNING", "12_1": "COMPLETED", "12_2": "GONE"}
    assert len(given) == 1 and "--array" in given[0]
    said |= {"stdout": "", "returncode": 1, "stderr": "slurm_load_jobs error: Invalid job id specified"}
    assert states_of(["12_0"]) == {"12_0": "GONE"}
    said["stderr"] = "Unable to contact slurm controller"
    assert states_of(["12_0"]) == {"12_0": "UNKNOWN"}, "a controller that restarts ends no job"


class Submitter:
    """An AutoExecutor that hands out jobs 7_0, 7_1, ..."""

    def __init__(self, folder, cluster, **options):
        self.submitted, self.options = [], {}

    def update_parameters(self, **options):
        if "timeout" in options:
            raise NameError("Unknown argument 'timeout'")
        self.options = options

    def map_array(self, function, folders):
        self.submitted += folders
        return [type("Job", (), {"job_id": f"7_{number}"})() for number in range(len(folders))]


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """(an executor on a cluster that runs nothing, two runs)."""
    monkeypatch.setattr(slurm.submitit, "AutoExecutor", Submitter)
    monkeypatch.setattr(slurm, "ASKED_EVERY", 0.0)
    runs = [Run(str(n), Config(name=f"exp/{n}/seed-0", output_dir=str(tmp_path))) for n in range(2)]
    for run in runs:
        write_json(beside(run.directory, "request.json"), {"identity": {"n": run.label}})
    return Slurm(tmp_path / "exp" / ".slurm", {"timeout_min": 5}), runs


def test_runs_are_one_array_and_end_with_their_jobs(cluster, squeue):
    executor, runs = cluster
    executor.start(runs)
    assert executor._executor.submitted == [str(run.directory) for run in runs]
    assert executor._executor.options == {"name": "exp", "timeout_min": 5}
    squeue[0]["stdout"] = "7_0 PENDING\n7_1 COMPLETED\n"
    assert executor.ended() == [runs[1]]
    squeue[0]["stdout"] = "7_0 REQUEUED\n"
    assert executor.ended() == [], "a job that was preempted is not over"
    squeue[0]["stdout"] = "7_0 FAILED\n"
    assert executor.ended() == [runs[0]]


def test_the_job_of_an_earlier_sweep_is_waited_for_and_one_that_does_another_run_is_cancelled(cluster, squeue):
    executor, runs = cluster
    said, given = squeue
    said["stdout"] = "5_0 RUNNING\n5_1 PENDING\n"
    write_json(beside(runs[0].directory, "job.json"), {"id": "5_0", "identity": digest({"n": "0"})})
    write_json(beside(runs[1].directory, "job.json"), {"id": "5_1", "identity": "another"})
    executor.start(runs)
    assert executor._executor.submitted == [str(runs[1].directory)]
    assert [command for command in given if command[0] == "scancel"] == [["scancel", "5_1"]]
    assert "5_0" in executor.stop() and executor.ended() == []


def test_unknown_options_and_missing_clusters_are_user_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="executor=slurm: "):
        Slurm(tmp_path, {})
    monkeypatch.setattr(slurm.submitit, "AutoExecutor", Submitter)
    with pytest.raises(UserError, match="slurm: Unknown argument 'timeout'"):
        Slurm(tmp_path, {"timeout": 3})


def test_a_preempted_job_stops_its_worker_and_asks_for_another_start():
    job = WorkerJob()
    job._worker = subprocess.Popen(["sleep", "60"])
    again = job.checkpoint("folder")
    assert job._worker.wait(5) == -9
    assert isinstance(again.function, WorkerJob) and again.args == ("folder",) and again.function._worker is None


@pytest.fixture(scope="module")
def real_slurm(tmp_path_factory):
    """A controller, a node and munge of our own, stopped at the end."""
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().split(".")[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // 2
    (folder / "slurm.conf").write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=3
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
    )
    for name in ("state", "spool"):
        (folder / name).mkdir()
    for name in ("/run/munge", "/var/log/munge", "/etc/munge", "/var/lib/munge"):
        Path(name).mkdir(parents=True, exist_ok=True)
        subprocess.run(["chown", "-R", "munge:munge", name], check=True)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    munged = subprocess.Popen(["su", "munge", "-s", "/bin/sh", "-c", "exec munged --force --foreground"])
    time.sleep(1)
    daemons = [
        munged,
        *(subprocess.Popen([name, "-D", "-f", folder / "slurm.conf"]) for name in ("slurmctld", "slurmd")),
    ]
    deadline = time.monotonic() + 60
    while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline, "the node did not become idle"
        time.sleep(0.5)
    yield folder
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait(30)
    del os.environ["SLURM_CONF"]


ROWS = """
config: {config}
runs: {{combiner: {{}}}}
columns: {{R@10: test/mean/R@10}}
executor: slurm
slurm: {{timeout_min: 20, cpus_per_task: 1, slurm_partition: main}}
"""


@needs_slurm
def test_a_preempted_run_is_requeued_and_ends_with_the_numbers_of_an_uninterrupted_one(
    real_slurm, tiny_config, tmp_path
):
    path = tmp_path / "exp.yaml"
    path.write_text(ROWS.format(config=tiny_config))
    reference = sweep_here(path, f"output_dir={tmp_path / 'reference'}").metrics
    output = tmp_path / "out"
    directory = output / "exp" / "combiner" / "seed-0"
    preempted, requeued = [], []

    def preempt_after_an_epoch():
        deadline = time.monotonic() + 300
        while not (directory / "checkpoints" / "last.ckpt").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        job = json.loads(beside(directory, "job.json").read_text())["id"]
        preempted.append(subprocess.run(["scancel", "--signal=USR2", job], capture_output=True, text=True))
        while states_of([job])[job] != "PENDING" and time.monotonic() < deadline:
            time.sleep(0.2)
        requeued.append(states_of([job])[job])
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)  # SLURM waits 2 minutes

    thread = threading.Thread(target=preempt_after_an_epoch)
    thread.start()
    done = script("sweep", "--config", path, f"output_dir={output}", "output=csv")
    thread.join()
    assert preempted[0].returncode == 0, preempted[0].stderr
    assert requeued == ["PENDING"]
    assert done.returncode == 0, done.stderr + done.stdout
    assert "continuing the interrupted run" in beside(directory, "log").read_text()
    again = sweep_here(path, f"output_dir={output}")
    assert again.started == [] and again.metrics == reference
