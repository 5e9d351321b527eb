"""What a worker keeps, continues, makes again or moves aside. The runs themselves are train.py's and eval.py's."""

import json
import shutil
import threading

import pytest
import torch
from filelock import FileLock

from cliplab.errors import UserError
from cliplab.results import write_json
from cliplab.sweeps import worker
from cliplab.sweeps.held import beside, holds, read_json

IDENTITY = {"optim.lr": 1}


@pytest.fixture
def given(tmp_path, monkeypatch):
    """(run directory, path of its request, which runs were made)."""
    directory, made = tmp_path / "out" / "exp" / "a" / "seed-0", []
    config = {"name": "exp/a/seed-0", "output_dir": str(tmp_path / "out")}
    request = {
        "config": config,
        "identity": IDENTITY,
        "evaluated": False,
        "checkpoint": None,
        "keeps_checkpoint": False,
    }
    write_json(beside(directory, "request.json"), request)
    monkeypatch.setattr(worker, "_run", lambda config, request: made.append(sorted(p.name for p in inside(directory))))
    return directory, beside(directory, "request.json"), made


def inside(directory):
    return directory.iterdir() if directory.is_dir() else []


def earlier(directory, identity, results="{}"):
    """An earlier run of an identity, with checkpoints that are whole as far as a look tells."""
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "config.yaml").write_text("seed: 0\n")
    for name in ("best", "last"):
        content = {"hyper_parameters": {"config": {}, "built_from": {}}, "state_dict": {}}
        torch.save(content, directory / "checkpoints" / f"{name}.ckpt")
    if results:
        (directory / "results.json").write_text(results)
    write_json(beside(directory, "started.json"), identity)


def moved(directory):
    return sorted(p.name for p in directory.parent.iterdir() if p.name.startswith("seed-0.2"))


def test_a_fresh_run_starts_and_says_what_it_is(given):
    directory, request, made = given
    worker.main([str(request)])
    assert made == [[]] and read_json(beside(directory, "started.json")) == IDENTITY


def test_an_interrupted_run_of_the_same_identity_is_left_to_continue(given):
    directory, request, made = given
    earlier(directory, IDENTITY, results="")
    worker.main([str(request)])
    assert made == [["checkpoints", "config.yaml"]] and not moved(directory)


def test_another_identity_is_moved_aside_whole_also_where_only_a_first_run_differs(given):
    directory, request, made = given
    earlier(directory, {**IDENTITY, "first.stage": "x"}, results="")
    worker.main([str(request)])
    assert made == [[]] and len(moved(directory)) == 1
    assert read_json(beside(directory, "started.json")) == IDENTITY


def test_damaged_results_are_made_again_from_the_checkpoints(given):
    directory, request, made = given
    earlier(directory, IDENTITY, results="{damaged")
    worker.main([str(request)])
    assert len(made) == 1 and "checkpoints" in made[0] and "results.json" not in made[0]
    assert not moved(directory) and len(list(directory.glob("results.2*.json"))) == 1


@pytest.mark.parametrize(
    ("name", "content"), [("best", b"cut off"), ("last", b"cut off"), ("last", b"PK\x05\x06" + bytes(18))]
)
def test_a_damaged_checkpoint_is_not_continued(given, name, content):
    directory, request, made = given
    earlier(directory, IDENTITY, results="")
    (directory / "checkpoints" / f"{name}.ckpt").write_bytes(content)
    worker.main([str(request)])
    assert made == [[]] and len(moved(directory)) == 1


def test_what_is_left_of_the_sweep_s_own_run_is_moved_aside_and_what_is_not_its_own_stays(given):
    directory, request, made = given
    earlier(directory, IDENTITY)
    shutil.rmtree(directory / "checkpoints")
    for name in ("config.yaml", "results.json"):
        (directory / name).unlink()
    (directory / "metrics.csv").write_text("epoch\n")
    worker.main([str(request)])
    assert made == [[]] and len(moved(directory)) == 1
    beside(directory, "started.json").unlink()
    directory.mkdir()
    (directory / "mine.txt").write_text("no run")
    worker.main([str(request)])
    assert made[1] == ["mine.txt"], "train.py refuses it then"


def test_the_lock_is_waited_for_and_what_was_done_meanwhile_is_kept(given, monkeypatch):
    directory, request, made = given
    lock = FileLock(beside(directory, "lock"), thread_local=False)
    lock.acquire()
    thread = threading.Thread(target=worker.main, args=([str(request)],))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and made == []
    monkeypatch.setattr(worker, "holds", lambda *_: holds.__globals__["Held"](""))  # the other worker has finished it
    lock.release()
    thread.join(10)
    assert not thread.is_alive() and made == []


def test_a_process_beside_the_first_neither_locks_nor_moves(given, monkeypatch):
    directory, request, made = given
    earlier(directory, {"other": 1})
    monkeypatch.setenv("LOCAL_RANK", "1")
    with FileLock(beside(directory, "lock")):
        worker.main([str(request)])
    assert len(made) == 1 and not moved(directory) and read_json(beside(directory, "started.json")) == {"other": 1}


def test_a_request_that_is_none_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="takes the REQUEST"):
        worker.main([])
    (tmp_path / "r.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="can't read the request"):
        worker.main([str(tmp_path / "r.json")])
