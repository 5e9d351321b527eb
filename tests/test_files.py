import logging
import os
import threading
from pathlib import Path

import pytest

from cliplab.files import alone, write_whole


def test_a_file_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "é old")
    assert path.read_text(encoding="utf-8") == "é old"

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left"):
        patched.setattr(os, "replace", full)
        write_whole(path, "new")
    assert path.read_text(encoding="utf-8") == "é old"
    write_whole(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_one_at_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    order: list[str] = []

    def other() -> None:
        with alone(tmp_path / "lock", "someone is at it", "it"):
            order.append("other")

    with alone(tmp_path / "lock", "someone is at it", "it"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive() and order == [] and "someone is at it: waiting for it" in caplog.text
        order.append("first")
    thread.join(timeout=30)
    assert order == ["first", "other"]


def test_a_disk_without_locks_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("no locks here")

    caplog.set_level(logging.INFO)
    monkeypatch.setattr("cliplab.files.FileLock.acquire", refuse)
    with alone(tmp_path / "lock", "busy", "the table"):
        pass
    assert "the table can't be locked (no locks here)" in caplog.text
