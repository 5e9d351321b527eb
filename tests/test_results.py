import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cliplab import files, results
from cliplab.errors import UserError
from cliplab.results import SCHEMA, read_results, write_json, write_ranks, write_results

CONTENT = {"metrics": {"test/dress/R@10": 12.5}, "data": {"name": "wardrobe", "counts": None}, "text": "Größe"}


def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "a.yaml", "seed=1"])
    write_results(tmp_path / "results.json", CONTENT)
    read = read_results(tmp_path / "results.json")
    assert {key: read[key] for key in CONTENT} == CONTENT
    assert set(read) == {*CONTENT, "schema", "versions", "commit", "command"}
    assert read["schema"] == SCHEMA
    assert read["command"].endswith("train.py --config a.yaml seed=1")
    assert read["versions"]["python"] == sys.version.split()[0]
    assert read["versions"]["torch"].split("+")[0].count(".") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_results(path, {"run": 1})
    replaced: list[int] = []

    def replace(source: Path, target: Path) -> None:
        assert json.loads(path.read_text())["run"] == 1
        assert json.loads(Path(source).read_text())["run"] == 2
        assert Path(source).parent == Path(target).parent  # a rename is atomic within a file system only
        replaced.append(1)
        os.rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    write_results(path, {"run": 2})
    assert replaced == [1] and read_results(path)["run"] == 2


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, {"run": 1})
    with pytest.raises(TypeError):
        write_results(path, {"run": object()})
    assert read_results(path)["run"] == 1


@pytest.mark.parametrize("text", ["", '{"schema": 1', "not json", '"\\ud800', "\x00"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"can't read {path}: "):
        read_results(path)


def test_a_file_of_other_bytes_or_none_at_all_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for make in (lambda: None, lambda: path.write_bytes(b"\xff\xfe"), lambda: (path.unlink(), path.mkdir())):
        make()
        with pytest.raises(UserError, match=f"can't read {path}: "):
            read_results(path)


@pytest.mark.parametrize("content", [{"schema": SCHEMA + 1}, {"schema": str(SCHEMA)}, {}, [], None, 3])
def test_another_schema_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{path} is no results.json of schema {SCHEMA}"):
        read_results(path)


def test_the_commit_is_known_dirty_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def git(returncode: int, stdout: str) -> None:
        done = subprocess.CompletedProcess([], returncode, stdout, "")
        monkeypatch.setattr(results.subprocess, "run", lambda *args, **kwargs: done)

    git(0, "0123abcd-dirty\n")
    assert results.commit() == "0123abcd-dirty"
    git(128, "")
    assert results.commit() is None

    def no_git(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(results.subprocess, "run", no_git)
    assert results.commit() is None


def test_ranks_are_a_row_per_query(tmp_path: Path) -> None:
    path = tmp_path / "ranks" / "dress.csv"
    columns = {"rank": [1.0, 2.5], "ties": [0, 3], "mAP@5": [100.0, 100 / 3]}
    write_ranks(path, ['a->b, "c"', "d->e#1"], columns)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    first, second = ['a->b, "c"', "1.0", "0", "100.0"], ["d->e#1", "2.5", "3", str(100 / 3)]
    assert rows == [["query", "rank", "ties", "mAP@5"], first, second]


def test_ranks_of_unequal_length_are_a_defect(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_ranks(tmp_path / "dress.csv", ["a", "b"], {"rank": [1.0], "ties": [0]})


def test_json_beside_the_results(tmp_path: Path) -> None:
    write_json(tmp_path / "audit.json", {"percent": {"dress": 12.5}})
    assert json.loads((tmp_path / "audit.json").read_text()) == {"percent": {"dress": 12.5}}
