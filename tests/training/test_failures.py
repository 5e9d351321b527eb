import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import distributed

from cliplab.errors import UserError
from cliplab.training.failures import FOLDER, shared_failures
from tests.conftest import ROOT
from tests.image_folders import make_image_folder

SEVERAL: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=object()))
ALONE: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=None))


@pytest.mark.parametrize(("name", "workers"), [("dress/test0.png", 0), ("polar_bear/test0.png", 1)])
def test_a_damaged_picture_is_one_message_whoever_reads_it(name: str, workers: int, tiny_config: Path, tmp_path: Path):
    """Of two processes the first reads the pictures 0, 2, 4 and the second 1, 3, 5."""
    root = make_image_folder(tmp_path / "pictures")
    (root / "test" / name).write_bytes(b"no picture")
    given = ["data.name=image_folder", f"data.root={root}", f"data.num_workers={workers}", "trainer.devices=2"]
    given += [f"output_dir={tmp_path}", "model.composer=null", "data.protocol=zero_shot_plain"]
    command = [sys.executable, str(ROOT / "eval.py"), "--config", str(tiny_config), *given]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, cwd=tmp_path)
    assert found.returncode == 2, found.stderr
    assert found.stderr.count("error: can't read the image") == found.stderr.count(name) // 2 == 1, found.stderr
    assert "Traceback" not in found.stderr and "Connection closed" not in found.stderr


def test_the_first_process_tells_what_another_noted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(FOLDER, raising=False)
    with pytest.raises(UserError, match="^no picture: worn.png$"), shared_failures(SEVERAL):
        folder = Path(os.environ[FOLDER])
        with monkeypatch.context() as other:
            other.setattr(distributed, "is_initialized", lambda: True)
            other.setattr(distributed, "get_backend", lambda: "gloo")
            with pytest.raises(SystemExit) as left, shared_failures(SEVERAL):
                raise UserError("Caught in a worker.\ncliplab.errors.UserError: no picture: worn.png")
        assert left.value.code == 0
        with pytest.raises(SystemExit) as left, shared_failures(SEVERAL):
            raise RuntimeError("Connection closed by peer")  # a third one, which has nothing to add
        assert left.value.code == 0
        raise RuntimeError("Connection closed by peer")
    assert FOLDER not in os.environ and not folder.exists()


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(FOLDER, raising=False)
    with pytest.raises(RuntimeError, match="out of memory"), shared_failures(SEVERAL):
        with pytest.raises(RuntimeError, match="a bug"), shared_failures(SEVERAL):
            raise RuntimeError("a bug")
        with pytest.raises(UserError, match="mine"), shared_failures(SEVERAL):
            raise UserError("mine")  # no group of gloo: told by itself
        raise RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="alone"), shared_failures(ALONE):
        raise RuntimeError("alone")


def test_a_process_follows_the_first_in_silence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv(FOLDER, str(tmp_path / "gone"))
    with pytest.raises(SystemExit) as left, shared_failures(SEVERAL):
        raise RuntimeError("Connection closed by peer")
    assert left.value.code == 0
